"""Signatures of compounds in several cell types: rankings of genes as normal scores, one row per condition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from scipy.stats import norm

from ._common import as_categories, as_names, describe, new_log
from ._fetch import cache_dir, fetch, registry
from ._r import read_rda_lists

__all__ = ["op3_2023", "sciplex_2020", "tahoe_2025"]

# names of compounds have plus signs
_KEYS = {"perturbation_key": "perturbation", "context_key": "cell_type", "values": "effects", "delimiter": "|"}
_MIN_RANKED = 0.8  # of the conditions must rank a gene
_OP3 = {"op3_b": "B cells", "op3_nk": "NK cells", "op3_t": "T cells"}
_TAHOE = {
    "tahoe_a498": "A498",
    "tahoe_hec_1_a": "HEC-1-A",
    "tahoe_lovo": "LoVo",
    "tahoe_miapaca_2": "MIA PaCa-2",
    "tahoe_nci_h23": "NCI-H23",
    "tahoe_snu_1": "SNU-1",
    "tahoe_snu_423": "SNU-423",
    "tahoe_sw48": "SW48",
}
_SCIPLEX = {"sciplex_a549": "A549", "sciplex_k562": "K562", "sciplex_mcf7": "MCF7"}


def op3_2023() -> AnnData:
    """Rankings of genes under 135 compounds in B, NK and T cells (OP3, NeurIPS 2023).

    405 conditions x 6,349 genes. The source ranks the genes of each condition from most up to most down by log fold change
    times -log10 adjusted p. Here they are normal scores: quantiles of the standard normal distribution at the ranks.

    Returns
    -------
    AnnData, conditions x genes: normal scores in ``X``, 0 for genes without a rank; ``obs``: ``perturbation`` and ``cell_type``.
    There are no controls: register it with ``values="effects"``, and with
    ``delimiter="|"``, as names of compounds have plus signs.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the files.

    References
    ----------
    Szałata et al. 2024, NeurIPS Datasets and Benchmarks; GSE279945. Rankings of the package sigrecon.
    """
    return _load("op3_2023", _OP3)


def tahoe_2025() -> AnnData:
    """Rankings of genes under about 109 compounds in eight cancer lines (Tahoe-100M).

    860 conditions x 8,268 genes: those that four fifths of the conditions rank. Conditions rank different genes; see
    :func:`op3_2023` for values, annotation and errors. The first call takes a minute or two, later ones read a file in the cache.

    References
    ----------
    Zhang et al. 2025, bioRxiv 2025.02.20.639398. Rankings of the package sigrecon.
    """
    return _load("tahoe_2025", _TAHOE)


def sciplex_2020() -> AnnData:
    """Rankings of genes under 23 compounds, at the highest dose, in three cancer lines (sci-Plex 3).

    69 conditions x 5,834 genes (Ensembl): those that four fifths of the conditions rank. Conditions rank different genes; see
    :func:`op3_2023` for values, annotation and errors.

    References
    ----------
    Srivatsan et al. 2020, Science 367:45-51; GSE139944. Rankings of the package sigrecon.
    """
    return _load("sciplex_2020", _SCIPLEX)


def _load(name: str, contexts: Mapping[str, str]) -> AnnData:
    """Normal scores of some files, converted once."""
    paths, dataset = [fetch(key) for key in contexts], describe(name, *contexts, **_KEYS)
    converted = cache_dir() / "signatures" / f"{name}-{registry()[next(iter(contexts))].sha256[:8]}.h5ad"
    if converted.exists():
        adata = read_h5ad(converted)
        return new_log(adata.X, obs=adata.obs, var=adata.var, dataset=dataset, scale="arbitrary")
    rankings = {
        (context, str(compound)): ranked["up_full"]
        for path, context in zip(paths, contexts.values(), strict=True)
        for compound, ranked in read_rda_lists(path).items()
    }
    adata = _normal_scores(rankings, dataset)
    try:
        adata.write_h5ad(converted, compression="gzip")
    except OSError:  # a cache that can not be written to
        pass
    return adata


def _normal_scores(rankings: Mapping[tuple[str, str], np.ndarray], dataset: dict[str, str]) -> AnnData:
    """Rankings, most up first, as normal scores; keys are cell type and compound."""
    number = Counter(gene for ranked in rankings.values() for gene in ranked)
    genes = as_names(sorted(gene for gene, n in number.items() if n >= _MIN_RANKED * len(rankings)))
    scores = np.zeros((len(rankings), len(genes)), dtype=np.float32)
    for row, ranked in zip(scores, rankings.values(), strict=True):
        at = genes.get_indexer(ranked)
        row[at[at >= 0]] = norm.isf((np.arange(len(ranked)) + 0.5) / len(ranked))[at >= 0]
    contexts, compounds = (as_categories(values) for values in zip(*rankings, strict=True))
    names = as_names([f"{context}: {compound}" for context, compound in rankings])
    obs = pd.DataFrame({"perturbation": compounds, "cell_type": contexts}, index=names)
    return new_log(scores, obs=obs, var=pd.DataFrame(index=genes), dataset=dataset, scale="arbitrary")
