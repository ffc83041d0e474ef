"""Expected effects of a simulation, and how to read its truth back.

The expectation of ``log1p(1e4 * count / total)`` has no closed form, so it is computed, not simulated: given
a cell's gene rates, the count of a gene within the cell's total is binomial, and for a binomial count the
expectation is a smooth function of (total, share) that is tabulated to about 1e-4. What remains random (cell
state, overdispersion, library size, batch) is averaged over cells that control and perturbed have in common.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.special import log_softmax, ndtri

from pertura.datasets._simulate_settings import Settings
from pertura.datasets._simulate_world import World

TARGET_SUM = 1e4
BLOCK_ENTRIES = 30_000  # cells x genes at a time: what a processor cache holds


def lognormal_parameters(mean: float, sd: float) -> tuple[float, float]:
    """Location and scale of the log of a lognormal variable with this mean and standard deviation."""
    variance = np.log1p((sd / mean) ** 2)
    return np.log(mean) - variance / 2, float(np.sqrt(variance))


class ExpectedLog1p:
    r"""Table of ``E[log1p(1e4 * k / N)]`` for ``k ~ Binomial(N, p)``.

    From :math:`\log(1 + y) = \int_0^\infty (1 - e^{-ys})\, e^{-s} s^{-1} ds` follows, with the binomial's
    Laplace transform, :math:`E = \int_0^\infty (1 - (1 - p + p e^{-cs})^N)\, e^{-s} s^{-1} ds` with c = 1e4 /
    N, which the trapezoid rule in log s integrates to about seven digits. Between the nodes (in log N and log
    Np, where it is nearly straight) the table is linear.

    Parameters
    ----------
    low, high
        Range of the totals N; a total outside counts as the nearest one inside.
    """

    def __init__(self, low: float, high: float) -> None:
        self._log_total = np.linspace(np.log(low), np.log(high), 2 + int(np.log(high / low) / 0.06))
        self._log_mean = np.linspace(np.log(1e-7), np.log(high), 1200)
        log_s = np.linspace(np.log(1e-11), np.log(60.0), 100)
        s = np.exp(log_s)
        weight = np.exp(-s) * (log_s[1] - log_s[0])
        self._values = np.stack([self._row(n, s, weight) for n in np.exp(self._log_total)])

    def _row(self, total: float, s: np.ndarray, weight: np.ndarray) -> np.ndarray:
        share = np.minimum(np.exp(self._log_mean) / total, 1 - 1e-9)
        log_transform = total * np.log1p(share[:, None] * np.expm1(-TARGET_SUM / total * s)[None, :])
        return -np.expm1(log_transform) @ weight

    def __call__(self, total: np.ndarray, log_mean: np.ndarray) -> np.ndarray:
        """Look up totals `(M,)` and log means `log(N p)` `(M, G)`; the result is `(M, G)`."""
        row, right = _place(np.log(total)[:, None], self._log_total)
        column, up = _place(log_mean, self._log_mean)
        width = len(self._log_mean)
        corner = row * width + column
        flat = self._values.ravel()
        lower = flat[corner] + up * (flat[corner + 1] - flat[corner])
        corner += width
        upper = flat[corner] + up * (flat[corner + 1] - flat[corner])
        return lower + right * (upper - lower)


def _place(value: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of values among equally spaced nodes: the node below, and the part of a step beyond it."""
    steps = np.clip((value - nodes[0]) / (nodes[1] - nodes[0]), 0, len(nodes) - 1)
    below = np.minimum(steps.astype(np.intp), len(nodes) - 2)
    return below, steps - below


class _CommonCells:
    """Cells of one context that control and perturbed have in common: M cells, G genes.

    Parameters
    ----------
    table
        Expectation over counts.
    depth, poisson
        Library sizes and standard normal deviates of the totals `(M,)`.
    log_rate, gamma
        Log-rates in control and overdispersion `(M, G)`.
    """

    def __init__(
        self,
        table: ExpectedLog1p,
        depth: np.ndarray,
        poisson: np.ndarray,
        log_rate: np.ndarray,
        gamma: np.ndarray,
    ) -> None:
        log_share = log_softmax(log_rate, axis=1)
        self._table, self._depth, self._poisson = table, depth, poisson
        self._rate, self._log_noisy = np.exp(log_share), log_share + np.log(gamma)
        self._noisy = np.exp(self._log_noisy)

    def expected(self, shift: np.ndarray) -> np.ndarray:
        """Expect X `(M, G)` of these cells, their log-rates shifted by `(G,)`, over their counts."""
        abundance = self._noisy @ np.exp(shift)
        total = self._depth * abundance / (self._rate @ np.exp(shift))
        total = np.maximum(total + np.sqrt(total) * self._poisson, 1.0)
        return self._table(total, self._log_noisy + shift + np.log(total / abundance)[:, None])


def expected_effects(s: Settings, world: World, seed: np.random.SeedSequence) -> dict[str, np.ndarray]:
    """Compute population means of X in control, and of perturbed minus control, for cells that pass QC.

    Returns ------- ``control_mean`` (C x G) and ``effect``, ``effect_se`` (each (K - 1) * C x G,
    condition-major); the standard error is that of the average over `n_truth_cells` common cells.
    """
    factor = world.contexts["response_factor"].to_numpy()
    shift = world.shift[1:, None, :] * factor[None, :, None]  # (K - 1, C, G)
    if s.modality == "log":
        effect = shift.reshape(-1, s.n_genes)
        return {"control_mean": world.baseline, "effect": effect, "effect_se": np.zeros_like(effect)}

    rng = np.random.default_rng(seed)
    m = s.n_truth_cells
    # Library sizes at equally likely quantiles and batches in turn: sampled without error.
    location, scale = lognormal_parameters(s.library_size, s.library_size_sd)
    depth = np.exp(location + scale * ndtri((rng.permutation(m) + 0.5) / m))
    state = s.state_sd * rng.standard_normal((m, s.n_genes))
    state += state[:, world.regulators] @ world.propagation + world.batch_shift[np.arange(m) % s.n_batches]
    gamma = np.ones((m, s.n_genes))
    if s.dispersion > 0:
        gamma = np.maximum(rng.standard_gamma(1 / s.dispersion, gamma.shape) * s.dispersion, 1e-12)
    poisson = rng.standard_normal(m)
    table = ExpectedLog1p(max(1.0, depth.min() / 5), max(2.0, 5 * depth.max()))

    control_mean = np.zeros((s.n_contexts, s.n_genes))
    effect, square = np.zeros(shift.shape), np.zeros(shift.shape)
    step = max(1, BLOCK_ENTRIES // s.n_genes)
    for c, start in product(range(s.n_contexts), range(0, m, step)):
        rows = slice(start, start + step)
        cells = _CommonCells(table, depth[rows], poisson[rows], world.baseline[c] + state[rows], gamma[rows])
        control = cells.expected(np.zeros(s.n_genes))
        control_mean[c] += control.sum(axis=0) / m
        for k in range(len(shift)):
            difference = cells.expected(shift[k, c]) - control
            effect[k, c] += difference.sum(axis=0) / m
            square[k, c] += np.einsum("ij,ij->j", difference, difference) / m
    variance = np.maximum(square - effect**2, 0) / (m - 1)
    return {
        "control_mean": control_mean,
        "effect": effect.reshape(-1, s.n_genes),
        "effect_se": np.sqrt(variance).reshape(-1, s.n_genes),
    }


def true_effects(adata: AnnData, *, kind: Literal["effect", "effect_se", "log_rate_shift"] = "effect") -> pd.DataFrame:
    """Read the planted effects of a simulated AnnData.

    Parameters
    ----------
    adata
        From :func:`pertura.datasets.simulate`, also after a round trip through h5ad or with fewer genes or
        cells.
    kind
        ``"effect"``: expected mean of `X` under the perturbation minus that of control cells of the same
        context, over cells that pass QC. ``"effect_se"``: the numerical error (one standard error) of it.
        ``"log_rate_shift"``: the planted shift of the log-rate, before the composition is normalised.

    Returns
    -------
    Rows: perturbation, dose (where doses were simulated) and cell_type, as an index. Columns: the genes of
    `adata` in their order.

    Raises
    ------
    ValueError
        If `adata` was not simulated, has genes that were not, or `kind` is unknown.
    """
    truth = _read_truth(adata)
    if kind not in ("effect", "effect_se", "log_rate_shift"):
        raise ValueError(f"`kind` is {kind!r}; it must be 'effect', 'effect_se' or 'log_rate_shift'.")
    conditions = pd.MultiIndex.from_frame(truth["conditions"].astype({"perturbation": str, "cell_type": str}))
    table = pd.DataFrame(truth[kind], index=conditions, columns=np.asarray(truth["genes"], dtype=str))
    unknown = adata.var_names.difference(table.columns)
    if len(unknown):
        raise ValueError(
            f"`adata` has {len(unknown)} genes that were not simulated, such as {unknown[0]!r}; "
            "leave the names in `var_names` as they were."
        )
    return table[adata.var_names]


def true_network(adata: AnnData) -> pd.DataFrame:
    """Read the planted network as a table of edges.

    Parameters
    ----------
    adata
        From :func:`pertura.datasets.simulate`; with fewer genes, the edges among these.

    Returns
    -------
    One row per edge: `source` (the regulator), `target`, `weight`, strongest first.

    Raises
    ------
    ValueError
        If `adata` was not simulated.
    """
    _read_truth(adata)
    edges = adata.varp["true_grn"].tocoo()
    names = adata.var_names.to_numpy()
    table = pd.DataFrame({"source": names[edges.row], "target": names[edges.col], "weight": edges.data})
    return table.sort_values("weight", key=np.abs, ascending=False, ignore_index=True)


def _read_truth(adata: AnnData) -> dict:
    if "truth" not in adata.uns or "true_grn" not in adata.varp:
        raise ValueError(
            "`adata` has no uns['truth'] and varp['true_grn']; pass what pertura.datasets.simulate returned."
        )
    return adata.uns["truth"]
