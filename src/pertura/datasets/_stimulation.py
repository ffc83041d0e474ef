"""Stimulated blood cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ._common import as_categories, as_names, describe, new_counts
from ._fetch import fetch
from ._r import read_rda, to_csr, to_experiment

__all__ = ["kang_2018_mini", "kang_2018_wide"]

_CONDITIONS = ("ctrl", "stim")
_LABELS = {"perturbation_key": "condition", "control": "ctrl"}


def kang_2018_mini() -> AnnData:
    """Interferon-beta on blood cells of two donors, five cell types.

    1,556 cells x 1,267 genes; 15 to 100 cells per cell type, donor and condition.

    Returns
    -------
    AnnData, cells x genes: ``layers["counts"]``, log1p of counts per 10,000 in ``X``; ``obs``: ``condition``
    (``"ctrl"``, ``"stim"``), ``cell_type``, ``donor``; ``var``: ``ensembl``; ``obsm["X_tsne"]``.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.

    References
    ----------
    Kang et al. 2018, Nat Biotechnol 36:89-94, GSE96583; subset of the package muscat.
    """
    source = read_rda(fetch("kang_2018_mini"))["example_sce"]
    experiment = to_experiment(source)
    counts, cells, _ = to_csr(experiment.assays["counts"])
    var = pd.DataFrame({"ensembl": experiment.var["ENSEMBL"].to_numpy()}, index=as_names(experiment.var["SYMBOL"]))
    obs = pd.DataFrame(
        {
            "condition": as_categories(experiment.obs["group_id"], _CONDITIONS),
            "cell_type": as_categories(experiment.obs["cluster_id"]),
            "donor": as_categories(experiment.obs["sample_id"].str.extract(r"(\d+)$")[0]),  # of ctrl101, stim101
        },
        index=as_names(cells),
    )
    dataset = describe("kang_2018_mini", context_key="cell_type", **_LABELS)
    adata = new_counts(counts, obs=obs, var=var, dataset=dataset)
    adata.obsm["X_tsne"] = np.asarray(source.int_colData.listData["reducedDims"].listData["TSNE"], dtype=float)
    return adata


def kang_2018_wide() -> AnnData:
    """Interferon-beta on blood cells, many genes, no annotation.

    1,000 control and 1,000 stimulated cells x 9,015 genes. The source gives neither cell types nor donors.

    Returns
    -------
    AnnData, cells x genes: ``layers["counts"]``, log1p of counts per 10,000 in ``X``; ``obs``: ``condition``
    (``"ctrl"``, ``"stim"``).

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.

    References
    ----------
    Kang et al. 2018, Nat Biotechnol 36:89-94, GSE96583; subset of the package harmony.
    """
    source = read_rda(fetch("kang_2018_wide"))
    (control, control_cells, genes), (stimulated, stimulated_cells, stimulated_genes) = (
        to_csr(source[f"pbmc.{condition}"]) for condition in _CONDITIONS
    )
    if not np.array_equal(genes, stimulated_genes):
        raise ValueError("The genes of control and stimulated cells differ.")
    sizes = [control.shape[0], stimulated.shape[0]]
    obs = pd.DataFrame(
        {"condition": as_categories(np.repeat(_CONDITIONS, sizes), _CONDITIONS)},
        index=as_names(np.concatenate([control_cells, stimulated_cells])),
    )
    counts = sparse.vstack([control, stimulated], format="csr")
    dataset = describe("kang_2018_wide", **_LABELS)
    return new_counts(counts, obs=obs, var=pd.DataFrame(index=as_names(genes)), dataset=dataset)
