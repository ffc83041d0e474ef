r"""What was measured of an effect beyond what the latent shift of a model says.

Effects of single perturbations become the measured ones, shrunk by :func:`~pertura.model._shrinkage.shrink`; those of combinations
the sum of their members' and what was measured beyond it, shrunk in the same way. Everything comes from the training cells. The latent
shift does not enter: it was fitted to the same cells, and is a noisier account of them (``docs/trust.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pertura.nn._ridge import fit_descriptions

from ._engine import Question
from ._measured import MeasuredEffects
from ._shrinkage import Halves, Matrix, shrink

if TYPE_CHECKING:
    from ._base import PerturbationModel

_STEPS, _PROBE = 4, 0.2


class ObservedEffectsMixin:
    """Sets a module's ``residual`` from the measured effects of the training cells."""

    _describes_unseen = True

    @torch.no_grad()
    def _fit_residuals(self: PerturbationModel, train_idx: NDArray[np.int64], seed: int = 0) -> None:
        """Residuals of single perturbations, then of combinations beyond the sum of their members'."""
        measured = MeasuredEffects(self, train_idx, seed)
        singles = {(name,): code for code, name in enumerate(self.vocabulary.names)}
        pairs = {c: len(singles) + row for row, c in enumerate(self.vocabulary.combinations)}
        slope = None
        for rows in (singles, pairs):
            chosen = [i for i, members in enumerate(measured.members) if members in rows]
            if not chosen:
                continue
            if slope is None:
                slope = self._slope(measured)
            which = np.array([rows[measured.members[i]] for i in chosen])
            unique, found = self._match(measured, chosen, which, slope, beyond=rows is pairs)
            if rows is singles and self._describes_unseen and self.module.effect_features is not None:
                self._describe(unique, found)

    def _describe(self: PerturbationModel, rows: NDArray[np.int64], effects: Matrix) -> None:
        """Effects of perturbations that were not seen: the mean, and of their features what left-out ones bear out."""
        module = self.module
        features = module.features[torch.as_tensor(rows, device=module.features.device)].cpu().numpy()
        found = fit_descriptions(features, effects, [slice(0, features.shape[1])])
        module.described.copy_(torch.as_tensor(found.intercept))
        module.described_weight.copy_(torch.as_tensor(found.weight))
        module.described_sd.copy_(torch.as_tensor(np.sqrt(((effects - found.left_out) ** 2).mean(0))))

    def _match(
        self: PerturbationModel,
        measured: MeasuredEffects,
        chosen: list[int],
        rows: NDArray[np.int64],
        slope: Callable[[Matrix, Matrix], Matrix],
        *,
        beyond: bool,
    ) -> tuple[NDArray[np.int64], Matrix]:
        """Choose residuals by which the predicted means become the posterior means of the effects.

        `beyond`: effects are shrunk towards what is predicted now (the sum of the members'), not towards 0.

        Returns
        -------
        Rows of the residual, and the effects in its units, ``(n_rows, n_genes)``.
        """
        module = self.module
        # conditions of one perturbation (contexts, doses) share its residual
        unique, which = np.unique(rows, return_inverse=True)
        share, effects = measured.pooled(chosen, which)
        current = share @ measured.predicted(chosen)
        expected, unit = current if beyond else np.zeros_like(current), measured.spread
        parts = tuple(((effect - expected) / unit, noise) for effect, noise in effects.parts)
        found = shrink(Halves((effects.effect - expected) / unit, effects.noise, parts), measured.programmes)
        target, sd = expected + found.mean * unit, found.sd * unit
        at = torch.as_tensor(unique, device=module.residual.device)
        residual, level = np.zeros_like(target), share @ measured.base[chosen]
        for step in range(_STEPS):
            # shorter steps average the noise of the draws out
            here = slope(level, level + current)
            residual += np.clip((target - current) / here, -1.0, 1.0) * min(1.0, 2 / (1 + step))
            residual = np.clip(residual, -6, 6)
            module.residual[at] = torch.as_tensor(residual).to(module.residual)
            current = share @ measured.predicted(chosen)
        unit = slope(level, level + current)
        module.residual_sd[at] = torch.as_tensor(np.minimum(sd / unit, 2.0)).to(module.residual_sd)
        return unique, np.clip(target / unit, -6, 6)

    def _slope(self: PerturbationModel, measured: MeasuredEffects) -> Callable[[Matrix, Matrix], Matrix]:
        """By how much the mean on the default scale moves with the residual of a gene.

        Probed at the level of the controls. Where a gene falls to nothing, its mean moves in proportion to its level.

        Returns
        -------
        Function of the mean of the controls and of the mean now, both ``(n_effects, n_genes)``.
        """
        module = self.module
        if module.native_scale != "counts":
            return lambda level, now: np.ones_like(now)
        sign = np.random.default_rng(measured.seed).choice([-1.0, 1.0], measured.effect.shape[1])
        question = [Question(self.vocabulary.names[0], (self.vocabulary.reference_dose[0],))]
        means = []
        for direction in (1.0, -1.0):
            module.residual[0] = torch.as_tensor(direction * _PROBE * sign).to(module.residual)
            rows = measured.controls[measured.contexts[0]]
            means.append(self._mean_effects(rows, question, measured.scale, measured.seed)[0])
        module.residual[0] = 0.0
        probed = np.clip((means[0] - means[1]) * sign / (2 * _PROBE), 0.1, 1.5)

        def at(level: Matrix, now: Matrix) -> Matrix:
            ratio = -np.expm1(-np.maximum(now, 1e-3)) / -np.expm1(-np.maximum(level, 1e-3))
            return np.clip(probed * ratio, 0.1, 1.5)

        return at
