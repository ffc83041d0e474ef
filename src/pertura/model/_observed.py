r"""What was measured of an effect beyond what the latent shift of a model says.

With measured effect :math:`y_t` (a vector over genes), predicted effect :math:`m_t` and effect :math:`\delta_t`,

.. math::

    y_{tg} \mid \delta_{tg} \sim N(\delta_{tg}, v_g (1 / n_t + 1 / n_0)), \quad
    \delta_{tg} \sim N(m_{tg} / 2, v_g b_g),

where :math:`v_g` is the variance of a gene within conditions and :math:`b_g`, by how much it responds to perturbations, is estimated
from all of them (empirical Bayes). The prediction is the posterior mean: the measured effect where there are many cells, and towards
the model's where there are few. The latter enters by half, because it was fitted to the same cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ._calibration import conditions
from ._engine import Question

if TYPE_CHECKING:
    from ._base import PerturbationModel

_MAX_CONTROLS, _STEPS, _PROBE = 600, 6, 0.2
_FLOOR, _TRUST = 0.5, 0.5
Matrix = NDArray[np.float64]


def shrink(measured: Matrix, predicted: Matrix, spread: Matrix, noise: Matrix) -> tuple[Matrix, Matrix]:
    r"""Posterior mean and sd of effects, given what was measured and what the latent shift predicts.

    Parameters
    ----------
    measured, predicted
        Effects, ``(n_effects, n_genes)``.
    spread
        Sd of each gene within conditions, ``(n_genes,)``.
    noise
        :math:`1 / n_t + 1 / n_0`, ``(n_effects,)``.
    """
    excess = (measured / spread) ** 2 - noise[:, None]
    overall = max(float(excess.mean()), 1e-8)
    # how much a gene responds to perturbations at all, itself shrunk: few perturbations say little about it
    prior = np.maximum(excess.mean(0), _FLOOR * overall)
    weight = prior / (prior + noise[:, None])
    mean = weight * measured + (1.0 - weight) * _TRUST * predicted
    return mean, np.sqrt(weight * noise[:, None]) * spread


class ObservedEffectsMixin:
    """Sets a module's ``residual`` from the measured effects of the training cells."""

    @torch.no_grad()
    def _fit_residuals(self: PerturbationModel, train_idx: NDArray[np.int64], seed: int = 0) -> None:
        """Residuals of single perturbations, then of combinations beyond the sum of their members'."""
        measured = _Measured(self, train_idx, seed)
        singles = {(name,): code for code, name in enumerate(self.vocabulary.names)}
        pairs = {c: len(singles) + row for row, c in enumerate(self.vocabulary.combinations)}
        slope = None
        for rows in (singles, pairs):
            chosen = [i for i, members in enumerate(measured.members) if members in rows]
            if not chosen:
                continue
            if slope is None:
                slope = measured.slope()
            self._match(measured, chosen, np.array([rows[measured.members[i]] for i in chosen]), slope)

    def _match(
        self: PerturbationModel,
        measured: _Measured,
        chosen: list[int],
        rows: NDArray[np.int64],
        slope: Callable[[Matrix, Matrix], Matrix],
    ) -> None:
        """Choose residuals by which the predicted means become the posterior means of the effects."""
        module = self.module
        predicted = measured.predicted(chosen)
        # conditions of one perturbation (contexts, doses) share its residual
        unique, which = np.unique(rows, return_inverse=True)
        precision = 1.0 / measured.noise[chosen]
        share = np.zeros((len(unique), len(chosen)))
        share[which, np.arange(len(chosen))] = precision
        noise = 1.0 / share.sum(1)
        share *= noise[:, None]
        current = share @ predicted
        target, sd = shrink(share @ measured.effect[chosen], current, measured.spread, noise)
        dtype, device = module.residual.dtype, module.residual.device
        at = torch.as_tensor(unique, device=device)
        residual = np.zeros_like(target)
        level = share @ measured.base[chosen]
        for step in range(_STEPS):
            # shorter steps average the noise of the draws out
            here = slope(level, level + current)
            residual = np.clip(
                residual + np.clip((target - current) / here, -1.0, 1.0) * min(1.0, 2 / (1 + step)), -6, 6
            )
            module.residual[at] = torch.as_tensor(residual, dtype=dtype, device=device)
            current = share @ measured.predicted(chosen)
        sd = np.minimum(sd / slope(level, level + current), 2.0)
        module.residual_sd[at] = torch.as_tensor(sd, dtype=dtype, device=device)


class _Measured:
    """Measured effects of the training conditions, and how a model predicts them now.

    Attributes
    ----------
    members
        Members of each condition's perturbation.
    effect
        Mean of the condition less that of the controls of its context, ``(n_conditions, n_genes)``.
    base
        Mean of those controls, ``(n_conditions, n_genes)``.
    noise
        :math:`1 / n_t + 1 / n_0`, ``(n_conditions,)``.
    spread
        Sd of genes within conditions, ``(n_genes,)``.
    """

    def __init__(self, model: PerturbationModel, train_idx: NDArray[np.int64], seed: int) -> None:
        self.model, self.seed, self.scale = model, seed, model._resolve_scale(None)
        cells = conditions(model, train_idx)
        rng = np.random.default_rng(seed)
        is_control = cells["label"] == model.vocabulary.control
        own = {c: g.to_numpy() for c, g in cells[is_control].groupby("context")["row"]}
        base = {c: self._moments(rows) for c, rows in own.items()}
        self.controls = {c: _some(rows, _MAX_CONTROLS, rng) for c, rows in own.items()}
        self.questions: list[Question] = []
        self.contexts: list[int] = []
        effect, level, noise, squares, freedom = [], [], [], 0.0, 0
        for _, square, n in base.values():
            squares, freedom = squares + square, freedom + n - 1
        treated = cells[~is_control & cells["context"].isin(list(own))]
        for (_, context), group in treated.groupby(["condition", "context"]):
            mean, square, n = self._moments(group["row"].to_numpy())
            squares, freedom = squares + square, freedom + n - 1
            self.questions.append(Question(group["label"].iloc[0], group["dose"].iloc[0]))
            self.contexts.append(context)
            effect.append(mean - base[context][0])
            level.append(base[context][0])
            noise.append(1.0 / n + 1.0 / base[context][2])
        self.members = [model.vocabulary.parse(q.label) for q in self.questions]
        n_genes = len(model.gene_names)
        self.effect = np.stack(effect) if effect else np.zeros((0, n_genes))
        self.base = np.stack(level) if level else self.effect
        self.noise = np.array(noise)
        self.spread = np.sqrt(np.maximum(squares / max(freedom, 1), 1e-8)) * np.ones(n_genes)

    def _moments(self, rows: NDArray[np.int64]) -> tuple[Matrix, Matrix, int]:
        """Mean, sum of squared deviations and number of cells."""
        mean, variance = self.model._moments(rows, self.scale)
        return mean, variance * max(len(rows) - 1, 1) * len(rows), len(rows)

    def predicted(self, chosen: list[int]) -> Matrix:
        """Predicted effects of some conditions, ``(n_chosen, n_genes)``."""
        result = np.zeros((len(chosen), self.effect.shape[1]))
        contexts = np.array([self.contexts[i] for i in chosen])
        for context in np.unique(contexts):
            at = np.flatnonzero(contexts == context)
            questions = [self.questions[chosen[i]] for i in at]
            result[at] = self.model._mean_effects(self.controls[context], questions, self.scale, self.seed)
        return result

    def slope(self) -> Callable[[Matrix, Matrix], Matrix]:
        """By how much the mean on the default scale moves with the residual of a gene.

        Probed at the level of the controls. Where a gene falls to nothing, its mean moves in proportion to its level.

        Returns
        -------
        Function of the mean of the controls and of the mean now, both ``(n_effects, n_genes)``.
        """
        module = self.model.module
        if module.native_scale != "counts":
            return lambda level, now: np.ones_like(now)
        sign = np.random.default_rng(self.seed).choice([-1.0, 1.0], self.effect.shape[1])
        name = self.model.vocabulary.names[0]
        question = [Question(name, (self.model.vocabulary.reference_dose[0],))]
        means = []
        for direction in (1.0, -1.0):
            module.residual[0] = torch.as_tensor(direction * _PROBE * sign).to(module.residual)
            rows = self.controls[self.contexts[0]]
            means.append(self.model._mean_effects(rows, question, self.scale, self.seed)[0])
        module.residual[0] = 0.0
        probed = np.clip((means[0] - means[1]) * sign / (2 * _PROBE), 0.1, 1.5)

        def at(level: Matrix, now: Matrix) -> Matrix:
            ratio = -np.expm1(-np.maximum(now, 1e-3)) / -np.expm1(-np.maximum(level, 1e-3))
            return np.clip(probed * ratio, 0.1, 1.5)

        return at


def _some(rows: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= n else np.sort(rng.choice(rows, n, replace=False))
