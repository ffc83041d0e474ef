"""Stimulated blood cells."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from os import PathLike

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from scipy import sparse

from ._common import as_categories, as_names, describe, new_counts
from ._fetch import fetch
from ._r import read_rda, to_csr, to_experiment

__all__ = ["kang_2018_mini", "kang_2018_wide"]

_CONDITIONS = ("ctrl", "stim")
_LABELS = {"perturbation_key": "condition", "control": "ctrl"}


def kang_2018_mini() -> AnnData:
    """Interferon-beta on blood cells of two donors, five cell types.

    1,556 cells x 1,267 genes; 15 to 100 cells per cell type, donor and condition. The cells are part of the package:
    neither cache nor network is needed.

    Returns
    -------
    AnnData, cells x genes: ``layers["counts"]``, log1p of counts per 10,000 in ``X``; ``obs``: ``condition``
    (``"ctrl"``, ``"stim"``), ``cell_type``, ``donor``; ``var``: ``ensembl``; ``obsm["X_tsne"]``.
    ``uns["dataset"]`` names the source: citation, license, address and SHA256 of the file that the cells were taken
    from.

    References
    ----------
    Kang et al. 2018, Nat Biotechnol 36:89-94, GSE96583; subset of the package muscat.
    """
    with resources.as_file(resources.files(__package__) / "_files" / "kang_2018_mini.h5ad") as path:
        stored = read_h5ad(path)
    return _kang_2018_mini(
        sparse.csr_matrix(stored.X, dtype=np.float32),
        obs={name: stored.obs[name] for name in stored.obs},
        cells=stored.obs_names,
        ensembl=stored.var["ensembl"],
        genes=stored.var_names,
        tsne=stored.obsm["X_tsne"],
    )


def _kang_2018_mini(
    counts: sparse.csr_matrix,
    *,
    obs: Mapping[str, pd.Series],
    cells: pd.Index | np.ndarray,
    ensembl: pd.Series,
    genes: pd.Index | pd.Series,
    tsne: np.ndarray,
) -> AnnData:
    var = pd.DataFrame({"ensembl": np.asarray(ensembl, dtype=object)}, index=as_names(genes))
    labels = {name: as_categories(obs[name]) for name in ("condition", "cell_type", "donor")}
    dataset = describe("kang_2018_mini", context_key="cell_type", **_LABELS)
    adata = new_counts(counts, obs=pd.DataFrame(labels, index=as_names(cells)), var=var, dataset=dataset)
    adata.obsm["X_tsne"] = np.asarray(tsne, dtype=float)
    return adata


def read_kang_2018_mini() -> AnnData:
    """What :func:`kang_2018_mini` returns, read from the file of the source.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file.
    """
    source = read_rda(fetch("kang_2018_mini"))["example_sce"]
    experiment = to_experiment(source)
    counts, cells, _ = to_csr(experiment.assays["counts"])
    return _kang_2018_mini(
        counts,
        obs={
            "condition": experiment.obs["group_id"],
            "cell_type": experiment.obs["cluster_id"],
            "donor": experiment.obs["sample_id"].str.extract(r"(\d+)$")[0],  # of ctrl101, stim101
        },
        cells=cells,
        ensembl=experiment.var["ENSEMBL"],
        genes=experiment.var["SYMBOL"],
        tsne=source.int_colData.listData["reducedDims"].listData["TSNE"],
    )


def write_kang_2018_mini(path: str | PathLike[str]) -> None:
    """Write the file that the package ships for :func:`kang_2018_mini`.

    Parameters
    ----------
    path
        File to write, ``.h5ad``.

    Raises
    ------
    DataNotAvailable
        Neither cache nor network has the file of the source.
    """
    adata = read_kang_2018_mini()
    # Half the size of the sparse matrix once compressed: the column numbers are what takes the space.
    counts = adata.layers["counts"].toarray().astype(np.uint16)
    stored = AnnData(X=counts, obs=adata.obs, var=adata.var, obsm={"X_tsne": adata.obsm["X_tsne"]})
    stored.write_h5ad(path, compression="gzip", compression_opts=9)


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
