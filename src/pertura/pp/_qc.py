"""Which cells failed quality control."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

_MAD_TO_SD = 1.4826


def qc_flags(
    adata: AnnData,
    *,
    by: str | None = None,
    layer: str | None = None,
    n_mads: float = 3.0,
    mitochondrial: str = "MT-",
    doublets: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Flag cells of poor technical quality, by scanpy's metrics with robust thresholds.

    A cell fails where log1p of its total counts or of its number of genes lies more than `n_mads` robust standard deviations
    (:math:`1.4826\,\mathrm{MAD}`) below the median of its batch, its share of mitochondrial counts as far above, or where Scrublet
    calls it a doublet. Ribosomal and haemoglobin shares are no criteria: perturbations may target them.

    Parameters
    ----------
    adata
        Cells x genes; left as it is.
    by
        Column of ``obs`` within whose values thresholds are taken; by default all cells are one batch.
    layer
        Layer with counts; `None` for ``X``.
    n_mads
        Distance from the median at which a cell fails.
    mitochondrial
        How the names of mitochondrial genes begin, in any case; without such genes that criterion is left out.
    doublets
        Whether Scrublet (:func:`scanpy.pp.scrublet`) looks for doublets, batch by batch. A cell is one where its score is above the
        value that best splits those of simulated doublets in two (Otsu): doublets of unlike cells score high, of like ones low.
    seed
        Of Scrublet.

    Returns
    -------
    DataFrame of booleans, one row per cell: ``low_counts``, ``few_genes``, ``high_mitochondrial``, ``doublet``, and ``failed``, any of
    them.

    Raises
    ------
    ValueError
        If `by` or `layer` is not there, the values are no counts, or `n_mads` is not positive.
    """
    import scanpy as sc

    if by is not None and by not in adata.obs:
        raise ValueError(f"`by`: `adata.obs` has no column {by!r}. Name the column with the batches, or leave it out.")
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"`layer`: `adata.layers` has no {layer!r}. Name the layer with the counts.")
    if not n_mads > 0:
        raise ValueError(f"`n_mads` must be a number above 0, got {n_mads!r}.")
    counts = adata.X if layer is None else adata.layers[layer]
    values = counts.data if sparse.issparse(counts) else np.asarray(counts)
    if values.size and ((values < 0).any() or (values != np.round(values)).any()):
        raise ValueError(f"`layer`: {layer or 'X'!r} holds values that are no counts. Name the layer with the counts.")
    light = AnnData(counts, obs=pd.DataFrame(index=adata.obs_names), var=pd.DataFrame(index=adata.var_names))
    light.var["mt"] = light.var_names.str.upper().str.startswith(mitochondrial.upper())
    metrics, _ = sc.pp.calculate_qc_metrics(light, qc_vars=["mt"], percent_top=None)
    batch = np.zeros(adata.n_obs, dtype=int) if by is None else pd.factorize(adata.obs[by])[0]
    flags = pd.DataFrame(index=adata.obs_names)
    flags["low_counts"] = _distance(metrics["log1p_total_counts"], batch) < -n_mads
    flags["few_genes"] = _distance(metrics["log1p_n_genes_by_counts"], batch) < -n_mads
    flags["high_mitochondrial"] = _distance(metrics["pct_counts_mt"], batch) > n_mads
    flags["doublet"] = False
    if doublets:
        for code in np.unique(batch):
            own = light[batch == code].copy()
            # with a threshold of its own, Scrublet needs scikit-image; it keeps a seventh of the genes
            n_components = int(np.clip(min(own.n_obs, own.n_vars // 7) - 1, 1, 30))
            with np.errstate(invalid="ignore"):
                sc.pp.scrublet(own, random_state=seed, threshold=1.0, n_prin_comps=n_components, verbose=False)
            threshold = _split(own.uns["scrublet"]["doublet_scores_sim"])
            flags.loc[own.obs_names, "doublet"] = own.obs["doublet_score"].to_numpy() > threshold
    flags["failed"] = flags.any(axis=1)
    return flags


def _distance(values: pd.Series, batch: np.ndarray) -> np.ndarray:
    """From the median of the batch, in robust standard deviations; 0 where a batch does not vary."""
    grouped = values.groupby(batch)
    deviation = values - grouped.transform("median")
    sd = _MAD_TO_SD * deviation.abs().groupby(batch).transform("median")
    return np.divide(deviation, sd, out=np.zeros(len(values)), where=sd.to_numpy() > 0)


def _split(scores: np.ndarray) -> float:
    """Threshold between two groups with the largest variance between them (Otsu 1979)."""
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    below = np.arange(1, len(ordered))
    total = np.cumsum(ordered)
    low, high = total[:-1] / below, (total[-1] - total[:-1]) / (len(ordered) - below)
    at = int(np.argmax(below * (len(ordered) - below) * (high - low) ** 2))
    return float(ordered[at : at + 2].mean())
