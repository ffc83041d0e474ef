"""CRISPR screens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import pandas as pd
from anndata import AnnData

from pertura.pp import call_guides

from ._common import as_categories, as_names, describe, new_counts, new_log
from ._fetch import fetch
from ._r import read_rda, to_csr

if TYPE_CHECKING:
    from mudata import MuData

__all__ = ["norman_mcfaline_mini", "papalexi_2021"]

CONTROL = "control"


@overload
def papalexi_2021(*, as_mudata: Literal[False] = ...) -> AnnData: ...
@overload
def papalexi_2021(*, as_mudata: Literal[True]) -> MuData: ...
def papalexi_2021(*, as_mudata: bool = False) -> AnnData | MuData:
    """CRISPR knock-outs in THP-1 cells stimulated to express PD-L1 (ECCITE-seq).

    20,729 cells x 299 genes (a random subset of all); 110 gRNAs, of which 9 are non-targeting; three
    replicates. The library targets 26 genes, the cells carry 25 of them (those with a gRNA against CD274 were
    left out by the study). Perturbations are called from the gRNA counts by :func:`pertura.pp.call_guides`;
    where the top gRNA holds more than 80 % of a cell's gRNA counts (16,093 cells) the call is ``confident``.

    Parameters
    ----------
    as_mudata
        Return the gRNA counts too, as a second modality.

    Returns
    -------
    AnnData, cells x genes: ``layers["counts"]``, log1p of counts per 10,000 in ``X`` (per 10,000 of the 299
    genes: the library of the other genes is not in the source); ``obs``: ``perturbation`` (target, or
    ``"control"``), ``gRNA``, ``confident``, ``gRNA_counts``, ``gRNA_fraction``, ``replicate``, ``cell_type``.
    Keep the confident cells unless a model is to learn from the others: ``adata[adata.obs["confident"]]``.

    With ``as_mudata``, MuData with that as ``"rna"`` and counts, cells x gRNAs, as ``"grna"`` with
    ``var["target"]`` (``"control"`` for non-targeting gRNAs).

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.

    References
    ----------
    Papalexi et al. 2021, Nat Genet 53:322-331; GSE153056.

    Examples
    --------
    >>> adata = pertura.datasets.papalexi_2021()  # doctest: +SKIP
    >>> adata = adata[adata.obs["confident"]].copy()  # doctest: +SKIP
    """
    source = read_rda(fetch("papalexi_2021"))["lowmoi_example_data"]
    counts, _, genes = to_csr(source["response_matrix"])
    guide_counts, _, guides = to_csr(source["grna_matrix"])
    cells = as_names([f"cell_{i:05d}" for i in range(1, counts.shape[0] + 1)])  # the source names no cells

    design = source["grna_target_data_frame"].astype(str).set_index("grna_id")["grna_target"]
    target = design.loc[guides].replace("non-targeting", CONTROL)
    dataset = describe("papalexi_2021", perturbation_key="perturbation", control=CONTROL)
    grna = AnnData(
        X=guide_counts,
        obs=pd.DataFrame(index=cells),
        var=pd.DataFrame({"target": as_categories(target)}, index=as_names(guides)),
    )
    call_guides(grna, threshold=0.8, control=CONTROL)
    obs = grna.obs.assign(
        replicate=as_categories(source["extra_covariates"]["bio_rep"]),
        cell_type=as_categories(np.repeat("THP-1", len(cells))),
    )
    rna = new_counts(counts, obs=obs, var=pd.DataFrame(index=as_names(genes)), dataset=dataset)
    if not as_mudata:
        return rna
    mdata = _new_mudata({"rna": rna, "grna": grna})
    mdata.obs[list(obs.columns)] = obs
    mdata.uns["dataset"] = dict(rna.uns["dataset"])
    return mdata


def _new_mudata(modalities: dict[str, AnnData]) -> MuData:
    """MuData whose own obs does not repeat the modalities' columns: default of mudata 0.4, option of 0.3."""
    import mudata

    request = getattr(mudata, "set_options", None)
    with request(pull_on_update=False) if request else nullcontext():
        return mudata.MuData(modalities)


def norman_mcfaline_mini() -> AnnData:
    """Single and double CRISPR perturbations in K562 and three glioblastoma lines.

    5,961 cells x 500 highly variable genes. Norman et al.: CRISPR activation in K562, 18 single and 15 double
    perturbations. McFaline-Figueroa et al.: CRISPR interference of 9 of the same genes in A172, T98G and
    U87MG. About 100 cells per perturbation and cell line.

    Returns
    -------
    AnnData, cells x genes. ``X``: log1p of counts per 10,000, CSR. **The source has no counts**, hence
    neither does this (``uns["dataset"]["scale"]`` is ``"log1p"``). ``obs``: ``perturbation`` (gene, ``A+B``,
    or ``"control"``), ``cell_type``, ``study``, ``perturbation_type`` (``"CRISPRa"``, ``"CRISPRi"``),
    ``perturbation_raw`` (symbols as published), ``n_counts`` and ``n_genes`` (of the full transcriptome).

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.

    References
    ----------
    Norman et al. 2019, Science 365:786-793, GSE133344; McFaline-Figueroa et al. 2024, Cell Genom 4:100487.
    Subset made by PerturBench.
    """
    from anndata import read_h5ad

    source = read_h5ad(fetch("norman_mcfaline_mini"))
    obs = pd.DataFrame(
        {
            "perturbation": as_categories(source.obs["condition"].astype(str).map(_combination)),
            "cell_type": as_categories(source.obs["cell_type"].astype(str).replace("k562", "K562")),
            "study": as_categories(source.obs["dataset"]),
            "perturbation_type": as_categories(source.obs["perturbation_type"]),
            "perturbation_raw": as_categories(source.obs["perturbation_raw"]),
            "n_counts": source.obs["ncounts"].to_numpy(),
            "n_genes": source.obs["ngenes"].to_numpy(),
        },
        index=as_names(source.obs_names),
    )
    dataset = describe(
        "norman_mcfaline_mini", perturbation_key="perturbation", control=CONTROL, context_key="cell_type"
    )
    var = source.var.set_index(as_names(source.var_names))
    adata = new_log(source.X.tocsr(), obs=obs, var=var, dataset=dataset, scale="log1p")
    adata.uns["log1p"] = {}  # what scanpy leaves behind: natural logarithm
    return adata


def _combination(name: str) -> str:
    """``A+ctrl`` and ``ctrl`` as other versions of these data write them; ``A+B`` stays."""
    parts = [part for part in name.split("+") if part not in {"ctrl", CONTROL}]
    return "+".join(parts) or CONTROL
