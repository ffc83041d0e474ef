"""Which gRNA a cell carries."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

if TYPE_CHECKING:
    from mudata import MuData

__all__ = ["call_guides"]

_COLUMNS = ("gRNA", "perturbation", "gRNA_counts", "gRNA_fraction", "confident")


def call_guides(
    data: AnnData | MuData,
    *,
    modality: str = "grna",
    layer: str | None = None,
    obsm_key: str | None = None,
    target_key: str = "target",
    targets: Mapping[str, str] | None = None,
    control: str = "control",
    non_targeting: Collection[str] = ("control", "non-targeting", "NT"),
    threshold: float = 0.8,
    min_counts: float = 1,
    overwrite: bool = False,
) -> None:
    """Call one gRNA per cell from gRNA counts (low multiplicity of infection).

    The gRNA with the most counts is the call, the first one if there are several. The call is confident where
    it holds more than `threshold` of the cell's gRNA counts.

    Parameters
    ----------
    data
        MuData with a modality of gRNA counts; or AnnData, cells x gRNAs; or (with `obsm_key`) AnnData, cells
        x genes, that carries them.
    modality
        Modality of the gRNA counts, if `data` is MuData.
    layer
        Layer with the gRNA counts; default ``X``.
    obsm_key
        Key of ``data.obsm`` with a DataFrame of counts, cells x gRNAs, whose columns are the gRNAs' names.
        Needs `targets`.
    target_key
        Column of the gRNAs' ``var`` that names what each gRNA targets.
    targets
        gRNA to target, instead of `target_key`.
    control
        Label of cells whose gRNA is non-targeting.
    non_targeting
        Targets that mean "none"; cells that carry such a gRNA are labelled `control`.
    threshold
        Fraction of a cell's gRNA counts, at least 0.5 and below 1, that a confident call must exceed.
    min_counts
        Cells with fewer gRNA counts get no call (missing `gRNA` and `perturbation`, not confident). At least
        1.
    overwrite
        Replace columns of these names that ``obs`` has already.

    Returns
    -------
    Nothing. ``data.obs`` gets ``gRNA`` and ``perturbation`` (categories), ``gRNA_counts`` (sum over gRNAs),
    ``gRNA_fraction`` (of the called one; 0 without counts) and ``confident``. Cells that MuData has but the
    modality has not are cells without counts. Cells of which the call is not confident keep it, for models
    that learn from them; others: ``data[data.obs["confident"]]``. ``mdata.push_obs`` hands the columns on to
    the modalities.

    Raises
    ------
    ValueError
        An argument is out of range, the counts are negative, targets are missing, or ``obs`` has such a
        column.

    References
    ----------
    Papalexi et al. 2021, Nat Genet 53:322-331, and most later screens call by the dominant gRNA.

    Examples
    --------
    >>> mdata = pertura.datasets.papalexi_2021(as_mudata=True)  # doctest: +SKIP
    >>> pertura.pp.call_guides(mdata, threshold=0.9, overwrite=True)  # doctest: +SKIP
    """
    if not 0.5 <= threshold < 1:
        raise ValueError(f"`threshold` is {threshold}; give a fraction from 0.5 to below 1.")
    if not min_counts >= 1:
        raise ValueError(f"`min_counts` is {min_counts}; give 1 or more.")
    taken = [column for column in _COLUMNS if column in data.obs]
    if taken and not overwrite:
        raise ValueError(f"`data.obs` has {', '.join(taken)} already; rename these, or pass `overwrite=True`.")

    counts, guides, cells, var = _guide_counts(data, modality, layer, obsm_key)
    labels = _labels(guides, var, target_key, targets, set(non_targeting), control)
    total = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    top, top_count = _row_argmax(counts)
    called = (total >= min_counts) & (top_count > 0)
    fraction = np.divide(top_count, total, out=np.zeros_like(total), where=total > 0)

    code = np.where(called, top, -1)
    target_code, target_names = pd.factorize(labels, sort=True)
    calls = pd.DataFrame(
        {
            "gRNA": pd.Categorical.from_codes(code, categories=pd.Index(guides)),
            "perturbation": pd.Categorical.from_codes(
                np.where(called, target_code[top], -1), categories=pd.Index(target_names)
            ),
            "gRNA_counts": total,
            "gRNA_fraction": fraction,
            "confident": called & (fraction > threshold),
        },
        index=cells,
    )
    if not cells.equals(data.obs_names):  # MuData: cells of other modalities
        calls = calls.reindex(data.obs_names)
        calls[["gRNA_counts", "gRNA_fraction"]] = calls[["gRNA_counts", "gRNA_fraction"]].fillna(0.0)
        calls["confident"] = calls["confident"].eq(True)
    for column in ("gRNA", "perturbation"):  # a category without cells is no perturbation of these data
        calls[column] = calls[column].cat.remove_unused_categories()
    data.obs[list(_COLUMNS)] = calls


def _guide_counts(
    data: AnnData | MuData, modality: str, layer: str | None, obsm_key: str | None
) -> tuple[sparse.csr_matrix, np.ndarray, pd.Index, pd.DataFrame | None]:
    """Return counts, cells x gRNAs; names of gRNAs and cells; the gRNAs' var where there is one."""
    adata = data
    if not isinstance(data, AnnData):
        if modality not in data.mod:
            raise ValueError(f"`modality` {modality!r} is not one of {sorted(data.mod)}.")
        adata = data.mod[modality]
    var: pd.DataFrame | None = adata.var
    names = adata.var_names
    if obsm_key is not None:
        if obsm_key not in adata.obsm:
            raise ValueError(f"`obsm_key` {obsm_key!r} is not in `data.obsm`, which has {sorted(adata.obsm)}.")
        table = adata.obsm[obsm_key]
        if not isinstance(table, pd.DataFrame):
            raise ValueError(
                f"`obsm_key` {obsm_key!r} is a {type(table).__name__}; make it a DataFrame whose columns are "
                "the names of the gRNAs."
            )
        names, var, values = table.columns, None, table.to_numpy()
    elif layer is None:
        values = adata.X
    elif layer in adata.layers:
        values = adata.layers[layer]
    else:
        known = sorted(key for key in adata.layers if key is not None)
        raise ValueError(f"`layer` {layer!r} is not one of {known}.")
    counts = sparse.csr_matrix(values)
    if counts.data.size and not counts.data.min() >= 0:
        raise ValueError("gRNA counts are negative or missing; pass raw counts (`layer`).")
    return counts, names.to_numpy().astype(str).astype(object), adata.obs_names, var


def _labels(
    guides: np.ndarray,
    var: pd.DataFrame | None,
    target_key: str,
    targets: Mapping[str, str] | None,
    non_targeting: set[str],
    control: str,
) -> np.ndarray:
    """Perturbation of each gRNA."""
    if targets is not None:
        found = pd.Series(guides).map(dict(targets))
        source = "`targets`"
    elif var is not None and target_key in var:
        found = pd.Series(var[target_key].to_numpy(dtype=object))
        source = f"`target_key` {target_key!r}"
    elif var is not None:
        raise ValueError(f"`target_key` {target_key!r} is not one of the gRNAs' columns {list(var.columns)}.")
    else:
        raise ValueError("`targets` is needed with `obsm_key`: a mapping from gRNA to what it targets.")
    missing = found.isna().to_numpy()
    if missing.any():
        raise ValueError(f"{source} has no target for {missing.sum()} gRNAs, such as {guides[missing][0]!r}.")
    labels = found.astype(str)
    return labels.mask(labels.isin(non_targeting), control).to_numpy(dtype=object)


def _row_argmax(counts: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Column of the first largest entry of each row (0 in empty rows), and the entry."""
    largest = np.asarray(counts.max(axis=1).todense(), dtype=float).ravel()
    entries = counts.tocoo()
    hit = (entries.data == largest[entries.row]) & (entries.data > 0)
    column = np.full(counts.shape[0], counts.shape[1], dtype=np.int64)
    np.minimum.at(column, entries.row[hit], entries.col[hit])
    column[column == counts.shape[1]] = 0
    return column, largest
