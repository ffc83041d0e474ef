"""Effects on mean expression: sums over cells in, a table with one row per gene out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from pertura.data._perturbation import Perturbation
from pertura.effects._discrepancy import Discrepancy

# sums of one pass over the cells may hold this many numbers (256 MiB)
_BUDGET = 2**25


class EffectSums:
    """Sums of draws over the cells of each context.

    Parameters
    ----------
    n_perturbations, n_samples, n_genes
        Sizes.
    codes
        Contexts that are present.
    """

    def __init__(self, n_perturbations: int, n_samples: int, n_genes: int, codes: NDArray[np.int64]) -> None:
        self.codes = codes
        self._shape = (n_perturbations, n_samples, len(codes), n_genes)
        self.control = np.zeros(self._shape[1:])
        self.perturbed = np.zeros(self._shape)
        self.library = np.zeros((len(codes), 1))
        self.number = np.zeros((len(codes), 1))

    @staticmethod
    def per_pass(n_samples: int, n_genes: int, n_contexts: int) -> int:
        """How many perturbations the budget allows at once."""
        return max(1, _BUDGET // (n_samples * n_genes * n_contexts))

    def weights(self, context: NDArray[np.int64], counted: NDArray[np.bool_], like: Tensor) -> Tensor:
        """Which cells of a block count for which context, ``(n_contexts, n_cells)``."""
        member = (self.codes[:, None] == context) & counted
        return torch.as_tensor(member, dtype=like.dtype, device=like.device)

    def add_cells(self, weights: Tensor, library: Tensor) -> None:
        """Count the cells of a block."""
        self.number += weights.sum(1, keepdim=True).cpu().numpy()
        self.library += (weights @ library).cpu().numpy()

    def add_control(self, weights: Tensor, x: Tensor) -> None:
        """Draws of unperturbed expression, ``(n_samples, n_cells, n_genes)``."""
        self.control += (weights @ x).cpu().numpy()

    def add(self, which: int, weights: Tensor, x: Tensor) -> None:
        """Draws under one of the perturbations."""
        self.perturbed[which] += (weights @ x).cpu().numpy()

    def means(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Control, perturbed, and library means; divides the sums in place."""
        number = np.maximum(self.number, 1.0)
        self.control /= number
        self.perturbed /= number
        return self.control, self.perturbed, self.library / number


def effect_table(
    sums: EffectSums,
    perturbations: Sequence[Perturbation],
    *,
    contexts: Sequence[str],
    genes: pd.Index,
    discrepancy: Discrepancy,
    has_dose: bool,
    ci: float,
    delta: float,
    scale: str,
) -> pd.DataFrame:
    """Effects per perturbation, context and gene; the columns are those of ``get_perturbation_effect``."""
    control, perturbed, library = sums.means()
    z = stats.norm.ppf((1 + ci) / 2)
    before = control.mean(0)
    names = genes.to_numpy(dtype=object)
    tables = []
    for q, perturbation in enumerate(perturbations):
        change = perturbed[q] - control
        effect, after = change.mean(0), perturbed[q].mean(0)
        total, shared, own = posterior_spread(change, effect)
        for c, code in enumerate(sums.codes):
            unit = discrepancy.unit(scale, before[c], library[c])
            asked = (perturbation, contexts[code])
            distance = discrepancy.variance(*asked, effect[c], unit)
            sd = np.sqrt(total[c] + distance)
            half = z * np.sqrt(total[c] + discrepancy.variance(*asked, effect[c], unit, ci))
            common = discrepancy.spread(*asked).response
            gene_sd = np.sqrt(np.maximum(own[c] + distance - common * effect[c] ** 2, 0.0))
            columns = {
                "perturbation": perturbation.label,
                "dose": perturbation.dose_text,
                "context": contexts[code],
                "gene": names,
                "lfc_mean": effect[c],
                "lfc_sd": sd,
                "ci_low": effect[c] - half,
                "ci_high": effect[c] + half,
                "gene_sd": gene_sd,
                "response_sd": np.sqrt(shared[c] + common),
                "proba_de": stats.norm.sf((delta - np.abs(effect[c])) / np.maximum(sd, 1e-12)),
                "log2fc": log2_fold_change(before[c], after[c], scale),
                "mean_control": before[c],
                "mean_perturbed": after[c],
                "novelty": discrepancy.novelty(perturbation, contexts[code]),
            }
            if not has_dose:
                columns.pop("dose")
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def posterior_spread(change: NDArray, effect: NDArray) -> tuple[NDArray[np.float64], ...]:
    """Variance of effects over draws: in all, of the amplitude that all genes share, and of the gene alone.

    Parameters
    ----------
    change
        Draws, ``(n_samples, n_contexts, n_genes)``.
    effect
        Their mean, ``(n_contexts, n_genes)``.

    Returns
    -------
    ``(n_contexts, n_genes)``; ``(n_contexts,)`` in units of the squared effect; ``(n_contexts, n_genes)``.
    """
    if len(change) < 2:
        return np.zeros_like(effect), np.zeros(len(effect)), np.zeros_like(effect)
    total, left = change.var(0, ddof=1), change - effect
    energy = (effect**2).sum(-1, keepdims=True)
    # amplitude in the other genes: that of a gene itself would follow its own error
    others = np.maximum(energy - effect**2, 1e-3 * energy + 1e-30)
    amplitude = ((left * effect).sum(-1, keepdims=True) - left * effect) / others
    shared = (effect * (left * amplitude).sum(0)).sum(-1) / (len(change) - 1) / (energy[..., 0] + 1e-30)
    shared = np.maximum(shared, 0.0)
    own = np.minimum((left - amplitude * effect).var(0, ddof=1), total)
    return total, shared, np.where(shared[:, None] > 0, own, total)


def log2_fold_change(before: NDArray, after: NDArray, scale: str) -> NDArray[np.float64]:
    """As scanpy computes it from means of log1p values; the plain difference on other than count scales."""
    if scale == "log1p":
        before, after = np.expm1(before), np.expm1(after)
    elif scale != "counts":
        return after - before
    return np.log2((after + 1e-9) / (before + 1e-9))
