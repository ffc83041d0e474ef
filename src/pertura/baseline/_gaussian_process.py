"""Perturbations that were not measured in a context, by a Gaussian process over those that were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pertura.data._perturbation import Perturbation
from pertura.effects import Asked, ConditionTable, KernelFit, feature_blocks, fit_kernels
from pertura.effects._discrepancy import Discrepancy, Spread
from pertura.effects._features import member_features
from pertura.module._added_effects import Distinct, add_buffers, set_buffer
from pertura.module._base import Globals

from ._empirical_bayes import EmpiricalBayes, EmpiricalBayesModule

Matrix = NDArray[np.float64]

_MIN_MEASURED = 5  # conditions of a context, to learn from
_STEPS = 3


class GaussianProcessModule(EmpiricalBayesModule):
    """A Gaussian process over the perturbations of each context, of features and of effects transferred from other contexts.

    Parameters
    ----------
    blocks
        Columns of the features that belong together.
    **kwargs
        Of :class:`~pertura.baseline._linear.LinearModule`.
    """

    def __init__(self, *, blocks: Sequence[NDArray] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blocks = blocks
        add_buffers(self, noise=torch.zeros(0, dtype=torch.float64), unit=torch.zeros(0, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, table: ConditionTable) -> None:
        """The Gaussian processes, beside what empirical Bayes takes."""
        super().fit(table)
        kept = self.means.has_control.cpu().numpy()[table.context[table.treated]]
        set_buffer(self, "noise", table.effects().noise[kept])
        set_buffer(self, "unit", table.spread)

    def process(self, context: int) -> KernelFit | None:
        """Fit to the conditions of a training context; `None` where they are few. Made when it is needed: it is not saved."""
        if ("process", context) not in self.means.cache:
            conditions, found = self.conditions, None
            rows = np.flatnonzero(conditions.context == context)
            if len(rows) >= _MIN_MEASURED:
                asked = [conditions.ask(conditions.codes[i], conditions.dose[i]) for i in rows]
                features, blocks = self._described[rows], self.blocks or [np.arange(self.features.shape[1])]
                found = fit_kernels(
                    np.concatenate([features, self._elsewhere(asked, context, self._gram[context])], 1),
                    self._effect[rows],
                    [*blocks, slice(features.shape[1], features.shape[1] + self.n_genes)],
                    own=[*[np.full(len(b), -1) for b in blocks], np.arange(self.n_genes)],
                    noise=self.noise.cpu().numpy()[rows],
                    unit=self.unit.cpu().numpy(),
                )
            self.means.cache["process", context] = found
        return self.means.cache["process", context]

    @property
    def common(self) -> tuple[KernelFit, Matrix, Matrix, Matrix]:
        """Fit to what perturbations differ from the mean effect over contexts, and of each context mean, amplitude and further sd."""
        if "common" not in self.means.cache:
            conditions, noise = self.conditions, self.noise.cpu().numpy()
            effect, unit, context = self._effect, self.unit.cpu().numpy(), conditions.context
            keys = np.concatenate([conditions.codes, conditions.dose], axis=1)
            _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
            which = which.ravel()
            mean = np.zeros((self.n_contexts, self.n_genes))
            deviation = np.zeros((len(first), self.n_genes))
            number = np.bincount(which)[:, None]
            for _ in range(_STEPS):  # contexts that lack strong perturbations have no smaller mean effect for it
                for c in np.unique(context):
                    rows = context == c
                    mean[c] = np.average(
                        effect[rows] - deviation[which[rows]], axis=0, weights=1.0 / (noise[rows] + 1e-3)
                    )
                deviation[:] = 0.0
                np.add.at(deviation, which, (effect - mean[context]) / number[which])
            noise_of_mean = np.bincount(which, noise) / number[:, 0] ** 2
            blocks = self.blocks or [np.arange(self.features.shape[1])]
            fit = fit_kernels(self._described[first], deviation, blocks, noise=noise_of_mean, unit=unit)
            amplitude, further = np.ones(self.n_contexts), np.zeros(mean.shape)
            for c in np.unique(context):
                rows = np.flatnonzero(context == c)
                own, common = effect[rows] - mean[c], deviation[which[rows]]
                amplitude[c] = (own * common).sum() / max((common**2).sum(), 1e-12)
                # a share of what the context has alone is in the mean over contexts
                shared = np.maximum(1.0 - 1.0 / number[which[rows]], 0.5)
                left = ((own - amplitude[c] * common) ** 2 / shared).mean(0) - noise[rows].mean() * unit**2
                further[c] = np.sqrt(np.maximum(left, 0.0))
            self.means.cache["common"] = fit, mean, amplitude, further
        return self.means.cache["common"]

    @property
    def _effect(self) -> Matrix:
        return self.means.effect.double().cpu().numpy()

    @property
    def _described(self) -> Matrix:
        """Features of conditions; 0 where there are none."""
        features, described = self._condition_features()
        return features * described[:, None]

    def _elsewhere(self, asked: Sequence[Asked], context: int, row: Matrix) -> Matrix:
        """Effects transferred from other contexts, ``(n, n_genes)``; 0 where there are none."""
        weights = np.stack([self._from_others(a, context, row, self._gram) for a in asked])
        weights[:, self.conditions.context == context] = 0.0
        return self.means.sums(weights)[0].double().cpu().numpy()

    def asks(self, label: int, context: int) -> bool:
        """Whether what is predicted comes from a process: the context is known, and the perturbation was not measured there."""
        if context >= self.n_contexts or self.process(context) is None:
            return False
        return label < 0 or not self.conditions.curves_per_context(self.conditions.label == label)[context]

    def combine(self, asked: Asked, context: int, affinity: Matrix) -> Matrix:
        """Nothing of what the processes predict."""
        return self._no_effect() if self.asks(asked.label, context) else super().combine(asked, context, affinity)

    def effects(self, asked: Distinct, globals_: Globals) -> tuple[Tensor, Tensor]:
        """Of empirical Bayes where it was measured; else of the processes: of the context, or common to contexts."""
        mean, variance = (v.clone() for v in super().effects(asked, globals_))
        for row, (one, context) in enumerate(zip(asked.asked, asked.context.tolist(), strict=True)):
            if not len(one.codes) or not self.asks(one.label, context):
                continue
            own = member_features(one, self._known())
            features = np.zeros(self.features.shape[1]) if own is None else self._amount(one.codes, one.dose) @ own
            if one.label >= 0:
                elsewhere = self._elsewhere([one], context, globals_["affinity"][context])
                found, sd = self.process(context).predict(np.concatenate([features[None], elsewhere], 1))
            else:
                fit, center, amplitude, further = self.common
                found, sd = fit.predict(features[None])
                found = center[context] + amplitude[context] * found
                sd = np.hypot(amplitude[context] * sd, further[context])
            mean[row], variance[row] = (torch.as_tensor(v[0]).to(mean) for v in (found, sd**2))
        return mean, variance


class _OwnSd(Discrepancy):
    """The sd of a Gaussian process is its error for perturbations that were left out: nothing is added to it."""

    predicted: Callable[[str, str], bool]

    def spread(self, perturbation: Perturbation, context: str, level: float = 0.9) -> Spread:
        """None for what a process predicts."""
        return Spread() if self.predicted(perturbation.label, context) else super().spread(perturbation, context, level)


class GaussianProcess(EmpiricalBayes):
    r"""Effects of perturbations that a context lacks, by a Gaussian process over those that it has.

    For screens: hundreds of perturbations, some of which were not measured in some or in any context. The effects of a context, less
    their mean, have the covariance :math:`\sum_k w_k K_k` over perturbations; see :func:`pertura.effects.fit_kernels`. There is one
    kernel for each source of registered features (columns ``"source:name"``; columns without colon are one source), and one for
    effects of the same perturbation in other contexts, which also have an amplitude. A source that predicts nothing has
    weight 0, and the prediction is the mean effect where all of them have; :attr:`sources` says how much each explains.

    * A perturbation that was measured in the asked context: as in :class:`~pertura.baseline.EmpiricalBayes`.
    * One that was measured in other contexts, of a context of which at least five conditions were measured: by the Gaussian process of
      the context.
    * One that no context has: its features predict what it differs by from the mean effect, averaged over contexts; each context adds
      its own mean effect and amplitude. Combinations have the sums of their members' features.
    * In other contexts: as in :class:`~pertura.baseline.EmpiricalBayes`.

    Parameters
    ----------
    adata, registry, n_components, ridge
        As in :class:`~pertura.baseline.Linear`.
    """

    _module_cls = GaussianProcessModule

    def _module_options(self) -> dict[str, Any]:
        features = self.registered.vocabulary.features
        blocks = [] if features is None else feature_blocks(list(features.columns))
        return {**super()._module_options(), "blocks": blocks}

    def _make_discrepancy(self) -> Discrepancy:
        found = _OwnSd(self.calibration_, self.vocabulary, self.contexts)
        found.predicted = self._is_predicted
        return found

    def _is_predicted(self, label: str, context: str) -> bool:
        members = self.vocabulary.parse(label)
        if not members or context not in self.contexts:
            return False
        codes = np.sort(self.vocabulary.code(members))
        return self.module.asks(self.module.conditions.find(codes), list(self.contexts).index(context))

    @property
    def sources(self) -> pd.DataFrame:
        """What each source explains of the effects of a context beyond their mean, contexts x sources; NaN where there is no process.

        The last column, ``"elsewhere"``, is that of effects of the same perturbation in other contexts.
        """
        self._check_if_trained(warn=False, message="The model is not trained. Call `train()` first.")
        features, module = self.registered.vocabulary.features, self.module
        names = [] if features is None else [str(features.columns[b[0]]).split(":")[0] for b in module.blocks]
        if module.uses_loadings:
            names = ["gene"]
        names = names or ["features"]
        found = [module.process(context) for context in range(module.n_contexts)]
        missing = np.full(len(names) + 1, np.nan)
        rows = [missing if fit is None else fit.kernel_weights for fit in found]
        return pd.DataFrame(np.stack(rows), index=list(self.contexts), columns=[*names, "elsewhere"])
