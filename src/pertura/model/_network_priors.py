"""Prior knowledge on genes for models of networks: regulators, embeddings, known edges, by name or by a key of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse


def regulator_names(adata: AnnData | None, given: str | Sequence[str] | None, genes: pd.Index) -> list[str]:
    """Names of the genes that may regulate, in the order of the genes.

    Parameters
    ----------
    adata
        Where a key is looked up.
    given
        Boolean column of ``var``, names, or `None` for every gene.
    genes
        Genes of the model.
    """
    if given is None:
        return list(genes)
    if isinstance(given, str):
        if adata is None or given not in adata.var:
            raise ValueError(
                f"`regulators`: {given!r} is not a column of `adata.var`. Name a boolean column (`pertura.priors.regulators` "
                "writes one), or pass the names of the regulators."
            )
        column = adata.var[given]
        if column.dtype != bool:
            raise ValueError(f"`regulators`: `adata.var[{given!r}]` must be boolean, got {column.dtype}.")
        named = set(adata.var_names[column.to_numpy()].astype(str))
    else:
        if not isinstance(given, (list, tuple, set, pd.Index, np.ndarray)) or not all(
            isinstance(g, str) for g in given
        ):
            raise ValueError(f"`regulators` must be a column of `adata.var`, names of genes or None, got {given!r}.")
        named = set(given)
    found = [gene for gene in genes if gene in named]
    if not found:
        raise ValueError("`regulators`: none of them is a gene of the data. Check names and upper/lower case.")
    return found


def embedding_table(adata: AnnData | None, given: Any, genes: pd.Index) -> pd.DataFrame:
    """Embeddings of the model's genes, one row each; NaN where there is none."""
    if isinstance(given, str):
        if adata is None or given not in adata.varm:
            raise ValueError(
                f"`embedding_key`: {given!r} is not in `adata.varm`. `pertura.priors.gene_embeddings` writes embeddings, or pass a "
                "DataFrame with one row per gene."
            )
        values = adata.varm[given]
        values = values.toarray() if sparse.issparse(values) else np.asarray(values)
        given = pd.DataFrame(values, index=adata.var_names.astype(str))
    if not isinstance(given, pd.DataFrame):
        raise ValueError(f"`embedding_key` must be a key of `adata.varm` or a DataFrame, got {type(given).__name__}.")
    if not given.index.is_unique:
        raise ValueError("`embedding_key`: some genes have several rows.")
    try:
        table = given.astype(np.float32).reindex(genes)
    except (TypeError, ValueError) as error:
        raise ValueError("`embedding_key`: embeddings must be numbers.") from error
    values = table.to_numpy()
    if np.isinf(values).any():
        raise ValueError("`embedding_key`: some embeddings are infinite.")
    if not (np.isfinite(values).all(1) & values.any(1)).sum() > 1:
        raise ValueError("`embedding_key`: fewer than two genes of the data have an embedding. Check names and case.")
    return table


def gene_descriptions(table: pd.DataFrame, n_components: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whitened components of gene embeddings, as :func:`embedding_table` gives them, and similarities of the genes.

    Embeddings are centered first: raw ones of language models all point in one direction.

    Returns
    -------
    ``(n_genes, n_components)`` with unit variance, and cosines, at least 0, ``(n_genes, n_genes)``; 0 for genes without an
    embedding.
    """
    values = table.to_numpy(np.float64)
    has_one = np.isfinite(values).all(1) & (np.nan_to_num(values) != 0).any(1)
    values = np.where(has_one[:, None], np.nan_to_num(values), 0.0)
    values = np.where(has_one[:, None], values - values[has_one].mean(0), 0.0)
    u, s, _ = np.linalg.svd(values, full_matrices=False)
    k = min(n_components, int((s > 1e-6 * s[0]).sum()))
    components = u[:, :k] * np.sqrt(has_one.sum())
    length = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.maximum(length, 1e-12)
    return components.astype(np.float32), np.maximum(unit @ unit.T, 0.0).astype(np.float32)


def known_table(adata: AnnData | None, given: Any, genes: pd.Index) -> pd.DataFrame:
    """Known edges ``source, target, weight``: above 0 for edges, below for pairs that are known to be none."""
    if isinstance(given, str):
        if adata is None or given not in adata.varp:
            raise ValueError(
                f"`edges_key`: {given!r} is not in `adata.varp`. `pertura.priors.known_edges` writes known edges, or pass a "
                "DataFrame with columns source, target."
            )
        matrix = sparse.coo_matrix(adata.varp[given])
        names = adata.var_names.astype(str).to_numpy(object)
        given = pd.DataFrame({"source": names[matrix.row], "target": names[matrix.col], "weight": matrix.data})
    if not isinstance(given, pd.DataFrame):
        raise ValueError(f"`edges_key` must be a key of `adata.varp` or a DataFrame, got {type(given).__name__}.")
    missing = {"source", "target"} - set(given.columns)
    if missing:
        raise ValueError(f"`edges_key` lacks the column(s) {sorted(missing)}; it has {list(given.columns)[:10]}.")
    table = given.assign(weight=given["weight"] if "weight" in given else 1.0)[["source", "target", "weight"]]
    table = table[(table["weight"] != 0) & table["source"].isin(genes) & table["target"].isin(genes)]
    if not len(table):
        raise ValueError("`edges_key`: no known edge is between genes of the data. Check names and upper/lower case.")
    return table.drop_duplicates(["source", "target"], ignore_index=True)


def label_matrix(table: pd.DataFrame, regulators: Sequence[str], genes: pd.Index) -> NDArray[np.int8]:
    """1 for known edges, -1 for known non-edges, 0 for unknown pairs, ``(n_regulators, n_genes)``."""
    rows, columns = pd.Index(regulators).get_indexer(table["source"]), genes.get_indexer(table["target"])
    inside = (rows >= 0) & (columns >= 0)
    labels = np.zeros((len(regulators), len(genes)), dtype=np.int8)
    labels[rows[inside], columns[inside]] = np.sign(table["weight"].to_numpy()[inside])
    return labels
