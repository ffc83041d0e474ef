"""Effects in the structure that scanpy reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats


def ranked_effects(table: pd.DataFrame, group: str, params: dict[str, Any]) -> dict[str, Any]:
    """Effect table in the structure of :func:`scanpy.tl.rank_genes_groups`.

    ``scores`` are effects in units of the gene's own error, genes are ranked by them; ``pvals`` is the posterior probability
    of the other sign (local false sign rate), ``pvals_adj`` its mean over all genes that rank at least as high;
    ``logfoldchanges`` is log2 where the scale has fold changes, else the effect. All hold if the perturbation acts on the
    group at all: how sure the amplitude is that all genes share, ``response_sd``, changes no gene's rank.

    Parameters
    ----------
    table
        Columns ``gene, lfc_mean, gene_sd, log2fc`` and `group`.
    group
        Column that makes the groups.
    params
        Goes to ``["params"]``.
    """
    dtypes = {
        "names": "O",
        "scores": "float32",
        "pvals": "float64",
        "pvals_adj": "float64",
        "logfoldchanges": "float32",
    }
    fields: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}
    groups = []
    for name, own in table.groupby(table[group].astype(str), sort=False):
        groups.append(str(name))
        score = (own["lfc_mean"] / own["gene_sd"].clip(lower=1e-9)).to_numpy()
        order = np.argsort(-score, kind="stable")
        wrong_sign = stats.norm.sf(np.abs(score))
        by_rate = np.argsort(wrong_sign)
        running = np.empty(len(own))
        running[by_rate] = np.cumsum(wrong_sign[by_rate]) / np.arange(1, len(own) + 1)
        fields["names"].append(own["gene"].to_numpy(dtype=object)[order])
        fields["scores"].append(score[order].astype(np.float32))
        fields["pvals"].append(wrong_sign[order])
        fields["pvals_adj"].append(running[order])
        fields["logfoldchanges"].append(own["log2fc"].to_numpy(dtype=np.float32)[order])
    out: dict[str, Any] = {"params": params}
    for field, columns in fields.items():
        out[field] = np.rec.fromarrays(columns, dtype=[(g, dtypes[field]) for g in groups])
    return out
