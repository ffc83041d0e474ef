"""Embeddings of genes into ``varm``: from gene sets, texts, BioBERT, or vectors of one's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from ._drugs import TextEncoder, TfidfEncoder
from ._symbols import check_free, match_genes, no_match, symbols

logger = logging.getLogger(__name__)

_COLLECTIONS = ("go_bp", "hallmark", "coessential_modules")
_NAMED = (*_COLLECTIONS, "biobert")


def gene_embeddings(
    adata: AnnData,
    source: str | Path | Mapping[str, Any] | pd.DataFrame | pd.Series | NDArray = "go_bp",
    *,
    key_added: str = "gene_embedding",
    n_components: int | None = 64,
    symbol_key: str | None = None,
    aliases: Mapping[str, str] | None = None,
    encoder: TextEncoder | None = None,
    max_set_size: int | None = 500,
    overwrite: bool = False,
) -> None:
    """Write a vector per gene to ``varm``, from what is known of the genes and not from their expression.

    Parameters
    ----------
    adata
        Genes of human or mouse; matched by symbol (:func:`match_genes`).
    source
        * ``"go_bp"``, ``"hallmark"`` or ``"coessential_modules"``: gene sets of :func:`pertura.datasets.gene_sets`; a path to a GMT file; a dictionary from
          the name of a set to its genes; a table with the columns ``source`` (set) and ``target`` (gene), as decoupler has them.
          A gene is a document whose words are its sets: inverse document frequency over all genes of the collection, length 1.
        * ``"biobert"``: :func:`pertura.datasets.biobert_mesc500`, 1,120 genes.
        * a Series, or a dictionary, from gene to text: see `encoder`.
        * any other DataFrame: vectors, genes x dimensions, genes in the index.
        * an array ``(n_vars, n)``: vectors in the order of ``var_names``; rows of NaN are missing.
    key_added
        Key of ``varm`` (``(n_vars, n)``, float32) and of ``uns`` (how it was made, ``unmatched`` genes).
    n_components
        Most principal components to keep (of the centred vectors of the genes of `adata`); `None` keeps an embedding's own
        dimensions, and all components of gene sets.
    symbol_key
        Column of ``var`` with gene symbols; `None` for ``var_names``.
    aliases
        Symbol in the data to symbol in the source.
    encoder
        Of texts; by default :class:`TfidfEncoder`.
    max_set_size
        Gene sets with more genes than that say little about any; `None` keeps all.
    overwrite
        Whether an existing key is replaced.

    Raises
    ------
    ValueError
        Where the key is taken, the source is none of the above, or fewer than two genes have a vector.

    Notes
    -----
    Vectors are centred over the genes that have one, and divided by one number so that their mean squared length is 1; angles
    between centred vectors are kept (as far as the components kept do). A gene without a vector gets zeros, which is the mean gene: it
    is neither like nor unlike any other. Raw BioBERT vectors have a mean correlation of 0.86: hence the centring.

    What is known of genes is not independent of known networks: STRING draws on the same annotations as the Gene
    Ontology. A score against it says in part how well one copies the other.
    """
    check_free(key_added, overwrite, varm=adata.varm, uns=adata.uns)
    if n_components is not None and (
        isinstance(n_components, bool) or int(n_components) != n_components or n_components < 1
    ):
        raise ValueError(f"`n_components` must be a whole number above 0 or None, got {n_components!r}.")
    genes = symbols(adata, symbol_key)
    vectors, has_vector, name = _vectors(source, genes, aliases, encoder, max_set_size)
    if has_vector.sum() < 2:
        raise ValueError(f"`source`: {int(has_vector.sum())} of {len(genes)} genes have a vector, but 2 are needed.")
    vectors = vectors[np.flatnonzero(has_vector)]
    if not abs(vectors - vectors[[0]][np.zeros(vectors.shape[0], int)]).max() > 0:
        raise ValueError("`source`: the vectors of all genes are the same.")
    own = _reduce(vectors, n_components)
    scale = np.sqrt((own**2).sum(1).mean())
    embedding = np.zeros((len(genes), own.shape[1]), np.float32)
    embedding[has_vector] = own / scale
    unmatched = adata.var_names[~has_vector].astype(str)
    adata.varm[key_added] = embedding
    adata.uns[key_added] = {
        "source": name,
        "n_components": own.shape[1],
        "n_matched": int(has_vector.sum()),
        "unmatched": unmatched.to_numpy(str),
    }
    if len(unmatched):
        logger.warning(
            "%d of %d genes have no vector in %s and get zeros (%s%s): see `adata.uns[%r]['unmatched']`.",
            len(unmatched), len(genes), name, ", ".join(unmatched[:5]), ", …" if len(unmatched) > 5 else "", key_added,
        )  # fmt: skip


def _vectors(
    source: Any,
    genes: pd.Index,
    aliases: Mapping[str, str] | None,
    encoder: TextEncoder | None,
    max_set_size: int | None,
) -> tuple[NDArray | sparse.csr_matrix, NDArray[np.bool_], str]:
    """Vectors of all genes (zeros where there is none), whether there is one, and the name of the source."""
    if isinstance(source, np.ndarray):
        if source.ndim != 2 or len(source) != len(genes):
            raise ValueError(
                f"`source` is an array of shape {source.shape}; it must have {len(genes)} rows, one per gene."
            )
        values = source.astype(np.float64)
        known = ~np.isnan(values).any(1)
        return np.where(known[:, None], values, 0.0), known, "array"
    if isinstance(source, str) and source == "biobert":
        from pertura.datasets import biobert_mesc500

        return *_rows(biobert_mesc500(), genes, aliases), "biobert"
    if isinstance(source, pd.Series) or (isinstance(source, Mapping) and _is_text(source.values())):
        return *_texts(pd.Series(source), genes, aliases, encoder), "text"
    if isinstance(source, pd.DataFrame) and not {"source", "target"} <= set(source.columns):
        return *_rows(source, genes, aliases), "table"
    table, name = _gene_sets(source)
    return *_annotations(table, genes, aliases, max_set_size), name


def _is_text(values: Any) -> bool:
    return all(isinstance(v, str) for v in values)


def _rows(table: pd.DataFrame, genes: pd.Index, aliases: Mapping[str, str] | None) -> tuple[NDArray, NDArray[np.bool_]]:
    try:
        values = table.to_numpy(np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`source`: a table must be numbers with genes in its index, or have the columns 'source' (set) and 'target' "
            f"(gene); its columns are {list(table.columns)[:5]}."
        ) from error
    if not table.index.is_unique:
        raise ValueError("`source`: the index of the table names some genes twice.")
    found = match_genes(genes, table.index, aliases=aliases)
    if (found < 0).all():
        raise no_match("source", table.index, genes)
    known = (found >= 0) & ~np.isnan(values).any(1)[found]
    return np.where(known[:, None], np.nan_to_num(values)[found], 0.0), known


def _texts(
    texts: pd.Series, genes: pd.Index, aliases: Mapping[str, str] | None, encoder: TextEncoder | None
) -> tuple[NDArray, NDArray[np.bool_]]:
    found = match_genes(genes, texts.index, aliases=aliases)
    if (found < 0).all():
        raise no_match("source", texts.index, genes)
    own = [str(texts.iloc[i]) if i >= 0 and isinstance(texts.iloc[i], str) else "" for i in found]
    encoder = TfidfEncoder() if encoder is None else encoder
    return np.asarray(encoder.fit(own).transform(own), np.float64), np.array([bool(t.strip()) for t in own])


def _gene_sets(source: Any) -> tuple[pd.DataFrame, str]:
    """Table of sets (``source``) and genes (``target``), and its name."""
    if isinstance(source, pd.DataFrame):
        return source, "gene sets"
    if isinstance(source, str) and source in _COLLECTIONS:
        from pertura.datasets import gene_sets

        return gene_sets(source, as_frame=True), source
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"`source`: {str(source)!r} is neither one of {_NAMED} nor a GMT file.")
        fields = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if any(len(f) < 3 for f in fields):
            raise ValueError(f"`source`: {str(source)!r} is no GMT file (name, description, genes; separated by tabs).")
        sets, name = {f[0]: [g for g in f[2:] if g] for f in fields}, path.name
    elif isinstance(source, Mapping):
        sets, name = {str(k): list(v) for k, v in source.items()}, "gene sets"
    else:
        raise ValueError(f"`source` is a {type(source).__name__}; pass one of {_NAMED}, gene sets, texts or vectors.")
    return pd.Series(sets, dtype=object).explode().rename_axis("source").reset_index(name="target"), name


def _annotations(
    table: pd.DataFrame, genes: pd.Index, aliases: Mapping[str, str] | None, max_set_size: int | None
) -> tuple[sparse.csr_matrix, NDArray[np.bool_]]:
    """TF-IDF of genes x sets, rows of length 1."""
    table = table[["source", "target"]].dropna().astype(str).drop_duplicates()
    size = table.groupby("source")["target"].transform("size")
    table = table[size <= (np.inf if max_set_size is None else max_set_size)]
    if table.empty:
        raise ValueError("`source`: there is no gene set with at most `max_set_size` genes.")
    documents, known_genes = pd.factorize(table["target"])
    words, _ = pd.factorize(table["source"])
    counts = sparse.csr_matrix((np.ones(len(table)), (documents, words)), shape=(len(known_genes), words.max() + 1))
    idf = np.log((1 + counts.shape[0]) / (1 + np.asarray(counts.sum(0)).ravel())) + 1
    weighted = counts @ sparse.diags(idf)
    length = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
    weighted = (sparse.diags(1 / np.maximum(length, 1e-12)) @ weighted).tocsr()
    found = match_genes(genes, known_genes, aliases=aliases)
    if (found < 0).all():
        raise no_match("source", known_genes, genes)
    return sparse.diags((found >= 0).astype(float)) @ weighted[np.maximum(found, 0)], found >= 0


def _reduce(values: NDArray | sparse.csr_matrix, n_components: int | None) -> NDArray[np.float64]:
    """Centred vectors, or their leading principal components with a fixed sign."""
    from sklearn.decomposition import PCA

    is_sparse = sparse.issparse(values)
    limit = min(values.shape[0] - 1, values.shape[1])
    if n_components is None and not is_sparse:
        return values - values.mean(0)
    n = limit if n_components is None else min(int(n_components), limit)
    if is_sparse:  # sets that none of these genes is in are columns of zeros
        values = np.asarray(values[:, np.flatnonzero(values.getnnz(0))].todense())
        n = min(n, min(values.shape))
    return PCA(n, svd_solver="auto", random_state=0).fit_transform(values)
