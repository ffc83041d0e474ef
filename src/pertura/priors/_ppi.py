"""Protein-protein interactions into ``varp``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse


def ppi_network(
    adata: AnnData,
    edges: pd.DataFrame | str | Sequence[str] = ("huri", "lit_bm"),
    *,
    key_added: str = "ppi",
    overwrite: bool = False,
) -> None:
    """Write a network of protein-protein interactions among the genes of `adata` to ``varp``.

    Parameters
    ----------
    adata
        ``var_names`` are gene symbols of human.
    edges
        Resources of :func:`pertura.datasets.ppi`, or a table with the columns ``source``, ``target`` and, if there is one,
        ``weight``. Of a pair that several list the largest weight counts.
    key_added
        Key of ``varp`` (sparse, symmetric, float32, no self-interactions) and of ``uns`` (how many pairs there were and are).
    overwrite
        Whether an existing key is replaced.

    Raises
    ------
    ValueError
        Where the key is taken, the table has not these columns, or none of its pairs is among the genes.
    """
    if (key_added in adata.varp or key_added in adata.uns) and not overwrite:
        raise ValueError(
            f"`key_added`: {key_added!r} is in `adata.varp` or `adata.uns` already. Choose another, or `overwrite=True`."
        )
    name = "table"
    if not isinstance(edges, pd.DataFrame):
        from pertura.datasets import ppi

        resources = [edges] if isinstance(edges, str) else list(edges)
        name = "+".join(resources)
        edges = pd.concat([ppi(r)[["source", "target", "weight"]] for r in resources], ignore_index=True)
    missing = {"source", "target"} - set(edges.columns)
    if missing:
        raise ValueError(f"`edges` must have the columns 'source' and 'target', got {list(edges.columns)}.")
    genes = pd.Index(adata.var_names.astype(str))
    source, target = (genes.get_indexer(edges[c].astype(str)) for c in ("source", "target"))
    weight = edges["weight"].to_numpy(np.float32) if "weight" in edges else np.ones(len(edges), np.float32)
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError("`edges`: weights must be finite and not negative.")
    kept = (source >= 0) & (target >= 0) & (source != target) & (weight > 0)
    if not kept.any():
        raise ValueError(
            f"`edges`: none of the {len(edges)} pairs is among the {len(genes)} genes ({', '.join(genes[:3])}, …). "
            "`var_names` must be the symbols that the table uses."
        )
    pairs = pd.DataFrame(
        {"i": np.minimum(source, target)[kept], "j": np.maximum(source, target)[kept], "w": weight[kept]}
    )
    pairs = pairs.groupby(["i", "j"], as_index=False)["w"].max()
    shape = (len(genes), len(genes))
    half = sparse.csr_matrix((pairs["w"], (pairs["i"], pairs["j"])), shape=shape, dtype=np.float32)
    adata.varp[key_added] = (half + half.T).tocsr()
    adata.uns[key_added] = {
        "edges": name,
        "n_pairs": len(pairs),
        "n_pairs_of_source": len(edges),
        "n_genes_without": int((np.asarray(adata.varp[key_added].sum(1)).ravel() == 0).sum()),
    }
