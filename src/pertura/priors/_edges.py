"""Known edges into ``varp`` and lists of regulators into ``var``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from ._symbols import check_free, match_genes, no_match, symbols

logger = logging.getLogger(__name__)

# Columns of decoupler and pertura, omnipath, DoRothEA's and BEELINE's own files, in the order in which they are looked for.
_SOURCE = ("source", "source_genesymbol", "tf", "TF", "Gene1", "regulator")
_TARGET = ("target", "target_genesymbol", "Target", "Gene2", "gene")


def known_edges(
    adata: AnnData,
    table: str | pd.DataFrame | Iterable[tuple[str, str]],
    *,
    key_added: str = "known_edges",
    negatives: Literal["unlisted"] | pd.DataFrame | Iterable[tuple[str, str]] | None = None,
    symbol_key: str | None = None,
    aliases: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write known regulatory edges among the genes of `adata` to ``varp``.

    Parameters
    ----------
    adata
        Genes of human or mouse; matched by symbol (:func:`match_genes`).
    table
        ``"trrust"`` or ``"dorothea"`` (levels A to C); pairs; or a table in decoupler's form (``source``, ``target``), omnipath's
        (``source_genesymbol``, ``target_genesymbol``) or DoRothEA's (``tf``, ``target``). Its weights, which say whether a
        regulator activates, do not matter. A column ``label`` does: true or positive is an edge, anything else is known *not* to be
        one, as in :attr:`pertura.data.GRNSplit.train`.
    key_added
        Key of ``varp`` (sparse, ``[source, target]``: 1 known edge, -1 known non-edge, absent unknown) and of ``uns`` (counts).
    negatives
        Pairs known not to be edges. ``"unlisted"``: every pair of a regulator that `table` lists and a gene that it does not list
        with it. Lists are incomplete: unlisted is not the same as absent.
    symbol_key
        Column of ``var`` with gene symbols; `None` for ``var_names``.
    aliases
        Symbol in the data to symbol in the table.
    overwrite
        Whether an existing key is replaced.

    Raises
    ------
    ValueError
        Where the key is taken, the table has no such columns, none of its pairs is among the genes, or a pair is both.
    """
    check_free(key_added, overwrite, varp=adata.varp, uns=adata.uns)
    genes = symbols(adata, symbol_key)
    edges, name = _edge_table(table, "table")
    label = edges["label"].to_numpy() if "label" in edges else np.ones(len(edges), bool)
    lookup = _lookup(genes, edges, aliases)
    source, target = lookup(edges["source"]), lookup(edges["target"])
    kept = (source >= 0) & (target >= 0) & (source != target)
    if not (kept & label).any() and not (kept.any() and "label" in edges):
        raise no_match("table", edges["source"], genes)
    n = len(genes)
    listed = np.unique(source[source >= 0])
    code = source.astype(np.int64) * n + target
    positive, negative = np.unique(code[kept & label]), np.unique(code[kept & ~label])
    if isinstance(negatives, str):
        if negatives != "unlisted":
            raise ValueError(f"`negatives` must be 'unlisted' or pairs, got {negatives!r}.")
        every = (listed[:, None].astype(np.int64) * n + np.arange(n))[listed[:, None] != np.arange(n)]
        negative = np.union1d(negative, np.setdiff1d(every, positive))
    elif negatives is not None:
        more, _ = _edge_table(negatives, "negatives")
        lookup = _lookup(genes, more, aliases)
        i, j = lookup(more["source"]), lookup(more["target"])
        inside = (i >= 0) & (j >= 0) & (i != j)
        negative = np.union1d(negative, i[inside].astype(np.int64) * n + j[inside])
    both = np.intersect1d(positive, negative)
    if len(both):
        raise ValueError(
            f"`table`: {len(both)} pairs are both an edge and known not to be one, e.g. "
            f"{genes[both[0] // n]} -> {genes[both[0] % n]}."
        )
    codes = np.concatenate([positive, negative])
    values = np.repeat(np.array([1, -1], np.float32), [len(positive), len(negative)])
    adata.varp[key_added] = sparse.csr_matrix((values, (codes // n, codes % n)), shape=(n, n))
    adata.uns[key_added] = {
        "table": name,
        "n_edges": len(positive),
        "n_non_edges": len(negative),
        "n_of_table": len(edges),
        "n_regulators": len(np.unique(positive // n)),
    }
    logger.info("%d of %d rows of %s are among the %d genes.", int(kept.sum()), len(edges), name, n)


def regulators(
    adata: AnnData,
    source: str | pd.DataFrame | Iterable[str] | None = None,
    *,
    key_added: str = "regulator",
    symbol_key: str | None = None,
    aliases: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Mark the genes that may regulate others in a boolean column of ``var``.

    Parameters
    ----------
    adata
        Genes of human or mouse; matched by symbol (:func:`match_genes`).
    source
        Names of regulators; or a table of edges as in :func:`known_edges`, or ``"trrust"`` or ``"dorothea"`` (all levels), whose
        sources are taken. There is no default: the error for `None` lists what there is.
    key_added
        Column of ``var`` and key of ``uns``.
    symbol_key, aliases, overwrite
        See :func:`known_edges`.

    Raises
    ------
    ValueError
        Where the key is taken, or none of the regulators is among the genes.
    """
    if source is None:
        raise ValueError(
            "`source`: say which genes may regulate others: 'trrust' (TRRUST 2, human), 'dorothea' (DoRothEA, human, all "
            "levels), a list of gene names, or a table of edges with the columns 'source' and 'target'."
        )
    check_free(key_added, overwrite, var=adata.var, uns=adata.uns)
    genes = symbols(adata, symbol_key)
    if isinstance(source, (str, pd.DataFrame)):
        table, name = _edge_table(source, "source", levels="ABCDE")
        names = table["source"].unique()
    else:
        names, name = np.array(list(dict.fromkeys(map(str, source))), dtype=object), "list"
    found = match_genes(genes, names, aliases=aliases) >= 0
    if not found.any():
        raise no_match("source", names, genes)
    adata.var[key_added] = found
    adata.uns[key_added] = {"source": name, "n_regulators": int(found.sum()), "n_of_source": len(names)}


def _edge_table(table: Any, argument: str, levels: str = "ABC") -> tuple[pd.DataFrame, str]:
    """Columns ``source``, ``target`` (strings) and, if there is one, boolean ``label``; and a name."""
    name = "table"
    if isinstance(table, str):
        from pertura import datasets

        if table not in ("trrust", "dorothea"):
            raise ValueError(f"`{argument}`: {table!r} is neither 'trrust' nor 'dorothea', nor a table of edges.")
        name, table = table, datasets.trrust() if table == "trrust" else datasets.dorothea(levels)
    elif not isinstance(table, pd.DataFrame):
        pairs = list(table)
        if any(isinstance(p, str) or len(p) != 2 for p in pairs):
            raise ValueError(f"`{argument}` must be a table of edges, or pairs (source, target).")
        table = pd.DataFrame(pairs, columns=["source", "target"])
    columns = [next((c for c in names if c in table.columns), None) for names in (_SOURCE, _TARGET)]
    if None in columns:
        raise ValueError(
            f"`{argument}` needs columns such as 'source' and 'target'; it has {list(table.columns)[:10]}."
        )
    edges = pd.DataFrame({"source": table[columns[0]].astype(str), "target": table[columns[1]].astype(str)})
    if "label" in table:
        if table["label"].isna().any():
            raise ValueError(f"`{argument}`: the column 'label' has missing values; leave out pairs that are unknown.")
        edges["label"] = table["label"].to_numpy(np.float64) > 0
    return edges, name


def _lookup(
    genes: pd.Index, edges: pd.DataFrame, aliases: Mapping[str, str] | None
) -> Callable[[pd.Series], NDArray[np.intp]]:
    """Function from names of the table to positions among the genes, -1 where there is none."""
    names = pd.Index(pd.unique(edges[["source", "target"]].to_numpy().ravel()))
    backward = None if aliases is None else {new: old for old, new in aliases.items()}
    positions = match_genes(names, genes, aliases=backward)
    return lambda column: positions[names.get_indexer(column)]
