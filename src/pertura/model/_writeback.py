"""Where results go, and what may not be touched."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import stats

PROVENANCE = "pertura"


def provenance(model: Any, **asked: Any) -> dict[str, Any]:
    """What was asked, of which model, in a form that h5ad stores."""
    versions = {name: version(name) for name in ("pertura", "scvi-tools", "torch", "pyro-ppl", "anndata")}
    return {
        "by": PROVENANCE,
        "model": type(model).__name__,
        "model_summary": str(getattr(model, "_model_summary_string", "")),
        "versions": versions,
        **{k: ("" if v is None else v) for k, v in asked.items()},
    }


def reserve(adata: AnnData, targets: Mapping[str, list[str]], overwrite: bool) -> None:
    """Raise where a key holds something that is not pertura's own.

    Parameters
    ----------
    adata
        Where results will be written.
    targets
        Keys by slot, such as ``{"layers": ["stim"]}``.
    overwrite
        Whether the user allowed it.
    """
    if overwrite:
        return
    own: set[str] = set()
    for entry in adata.uns.values():
        if isinstance(entry, Mapping) and str(entry.get("by", "")) == PROVENANCE:
            own.update(str(k) for k in entry.get("wrote", ()))
    taken = [
        f"adata.{slot}[{key!r}]"
        for slot, keys in targets.items()
        for key in keys
        if key in getattr(adata, slot) and f"{slot}/{key}" not in own
    ]
    if taken:
        raise ValueError(
            f"`key_added`: {', '.join(taken)} exists and was not written by pertura. "
            "Choose another `key_added`, or pass `overwrite=True`."
        )


def ranked_effects(table: pd.DataFrame, group: str, params: dict[str, Any]) -> dict[str, Any]:
    """Effect table in the structure of :func:`scanpy.tl.rank_genes_groups`.

    ``scores`` are effects in units of their sd, genes are ranked by them; ``pvals`` is the posterior probability of the other
    sign (local false sign rate), ``pvals_adj`` its mean over all genes that rank at least as high; ``logfoldchanges`` is
    log2 where the scale has fold changes, else the effect.

    Parameters
    ----------
    table
        Columns ``gene, lfc_mean, lfc_sd, log2fc`` and `group`.
    group
        Column that makes the groups.
    params
        Goes to ``["params"]``.
    """
    groups = [str(g) for g in table[group].unique()]
    fields: dict[str, list[np.ndarray]] = {
        k: [] for k in ("names", "scores", "pvals", "pvals_adj", "logfoldchanges")
    }
    for name in groups:
        own = table[table[group].astype(str) == name]
        score = (own["lfc_mean"] / own["lfc_sd"].clip(lower=1e-9)).to_numpy()
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
    dtypes = {
        "names": "O",
        "scores": "float32",
        "pvals": "float64",
        "pvals_adj": "float64",
        "logfoldchanges": "float32",
    }
    out: dict[str, Any] = {"params": params}
    for field, columns in fields.items():
        out[field] = np.rec.fromarrays(columns, dtype=[(g, dtypes[field]) for g in groups])
    return out
