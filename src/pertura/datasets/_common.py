"""What all loaders share: provenance, plain labels, counts to log1p."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ._citations import CITATIONS
from ._fetch import registry

__all__ = ["as_categories", "as_names", "choose", "describe", "edges_to_csr", "new_counts", "new_log"]

TARGET_SUM = 1e4


def describe(name: str, *keys: str, **extra: str) -> dict[str, str]:
    """Provenance of a data set, for ``uns["dataset"]`` or ``DataFrame.attrs["dataset"]``.

    Parameters
    ----------
    name
        Name of the data set, a key of the citations.
    keys
        Registry keys of its files, the main one first; default ``name``.
    extra
        Further entries, such as ``control``.
    """
    files = [registry()[key] for key in keys or (name,)]
    main = files[0]
    record = {
        "name": name,
        "citation": CITATIONS[name],
        "licence": main.licence,
        "origin": main.origin,
        "url": main.url,
        "sha256": main.sha256,
    }
    if len(files) > 1:
        record["other_urls"] = " ".join(file.url for file in files[1:])
    return record | extra


def choose(argument: str, value: str, allowed: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"`{argument}` is {value!r}; choose one of {', '.join(map(repr, allowed))}.")


def as_categories(values: Any, categories: Iterable[str] | None = None) -> pd.Categorical:
    """Labels as a categorical of plain strings; missing values stay missing."""
    labels = pd.Series(np.asarray(values, dtype=object))
    labels = labels.where(labels.isna(), labels.astype(str))
    return pd.Categorical(labels, categories=None if categories is None else list(categories))


def as_names(values: Any) -> pd.Index:
    """Names of cells or genes: plain strings, the index itself unnamed."""
    return pd.Index(np.asarray(values).astype(str).astype(object))


def new_counts(counts: sparse.csr_matrix, *, obs: pd.DataFrame, var: pd.DataFrame, dataset: dict[str, str]) -> AnnData:
    """AnnData with ``layers["counts"]`` and log1p of counts per 10,000 in ``X``, both CSR float32."""
    import scanpy as sc

    adata = AnnData(X=counts.copy(), obs=obs, var=var)
    adata.layers["counts"] = counts
    sc.pp.normalize_total(adata, target_sum=TARGET_SUM)
    sc.pp.log1p(adata)
    adata.uns["dataset"] = dataset | {"scale": "counts"}
    return adata


def new_log(
    x: np.ndarray | sparse.csr_matrix,
    *,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    dataset: dict[str, str],
    scale: Literal["log1p", "log2", "log", "arbitrary"],
) -> AnnData:
    """AnnData of a source that has no counts; ``X`` float32 as it is there."""
    adata = AnnData(X=x.astype(np.float32), obs=obs, var=var)
    adata.uns["dataset"] = dataset | {"scale": scale}
    return adata


def edges_to_csr(edges: pd.DataFrame, genes: pd.Index) -> sparse.csr_matrix:
    """Edges (`source`, `target`, `weight`, no pair twice) as a genes x genes matrix ``[source, target]``."""
    rows, columns = genes.get_indexer(edges["source"]), genes.get_indexer(edges["target"])
    if min(rows.min(initial=0), columns.min(initial=0)) < 0:
        raise ValueError("`edges` name genes that are not in `genes`.")
    weights = edges["weight"].to_numpy(np.float32)
    return sparse.csr_matrix((weights, (rows, columns)), shape=(len(genes), len(genes)))
