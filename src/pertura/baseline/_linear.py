"""The linear model of perturbation effects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from pertura.data._constants import CONTROL_ONLY
from pertura.data._vocabulary import Vocabulary
from pertura.effects import Asked, ConditionTable, choose_strength, ridge_weights
from pertura.effects._features import label_features, linear_slope, member_features
from pertura.model.base import Options, option
from pertura.module._added_effects import add_buffers, set_buffer, split_controls

from ._base import Baseline
from ._module import BaselineModule


class LinearModule(BaselineModule):
    """Y = G W P^T + b over perturbations, ridge regression of effects on control profiles over contexts.

    Parameters
    ----------
    n_components
        Number of gene components, and of components of the control profiles.
    ridge
        Penalty of W on either side.
    features
        P of each perturbation, ``(n_perturbations, n_features)``; `None` to use rows of G or, without those,
        indicators.
    gene
        Position of the gene that bears the name of each perturbation, -1 for none.
    **kwargs
        Of :class:`BaselineModule`.
    """

    def __init__(
        self,
        *,
        n_components: int = 10,
        ridge: float = 0.1,
        features: NDArray[np.float32] | None = None,
        gene: NDArray[np.int64],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_components, self.ridge = n_components, ridge
        self.given, self.gene = features, gene
        add_buffers(
            self,
            features=torch.zeros(len(gene), 0),
            loading=torch.zeros(self.n_genes, 0),
            inverse=torch.zeros(0, 0),
            slope=torch.zeros(0, 0),
            strength=torch.tensor(np.inf),
        )

    # -- fit --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, table: ConditionTable) -> None:
        """Components of genes, features of perturbations, and the regressions."""
        super().fit(table)
        n, mean = len(self.means.context), self.means.mean.cpu().numpy()
        profiles = np.concatenate([mean[:n], mean[n:][self.means.has_control.cpu().numpy()]])
        n_components = min(self.n_components, *profiles.shape)
        # genes are the samples: a gene's scores say how it differs from the average gene, condition by condition
        loading = PCA(n_components, random_state=0).fit_transform(profiles.T.astype(np.float64))
        gram = loading.T @ loading + self.ridge * np.eye(n_components)
        set_buffer(self, "loading", loading)
        set_buffer(self, "inverse", np.linalg.inv(gram))
        set_buffer(self, "features", self._describe(loading))
        p, described = self._condition_features()
        set_buffer(self, "slope", linear_slope(p, described, self.conditions.context, self.ridge))
        profiles, effects = (np.stack(part) for part in zip(*split_controls(self.means, table), strict=True))
        gram = profiles @ profiles.transpose(0, 2, 1)
        set_buffer(self, "strength", np.asarray(choose_strength(self.conditions, effects, gram, self.n_components)))

    def _describe(self, loading: NDArray) -> NDArray:
        if self.given is not None:
            return self.given
        if self.uses_loadings:
            return np.where((self.gene >= 0)[:, None], loading[self.gene], 0.0)
        trained = [self.conditions.has_member(code) for code in range(len(self.gene))]
        return np.diag(np.asarray(trained, dtype=float))

    @property
    def uses_loadings(self) -> bool:
        """Whether perturbations are described by the genes whose names they bear."""
        return self.given is None and bool((self.gene >= 0).any())

    def _condition_features(self) -> tuple[NDArray, NDArray[np.bool_]]:
        """P of every condition, and whether it has one."""
        cache = self.means.cache
        if "features" not in cache:
            conditions = self.conditions
            amount = self._amount(conditions.codes, conditions.dose)
            cache["features"] = label_features(conditions.codes, self._known(), amount)
        return cache["features"]

    def _amount(self, codes: NDArray[np.int64], dose: NDArray[np.float64]) -> NDArray[np.float64]:
        """Dose response: 0 at 0, logarithmic from the lowest measured dose to 1 at the highest registered one."""
        conditions, unit = self.conditions, self.means.unit
        relative = (conditions.dose / unit[conditions.codes])[conditions.codes != CONTROL_ONLY]
        curvature = 1.0 / min(1.0, float(np.min(relative, initial=1.0)))
        return np.log1p(curvature * dose / unit[codes]) / np.log1p(curvature)

    def _known(self) -> NDArray[np.float64]:
        return self.features.cpu().numpy().astype(np.float64)

    # -- estimator --------------------------------------------------------------------------------------------------

    def representable(self, asked: Asked) -> bool:
        """Whether it was measured, or all members are described."""
        if asked.label >= 0:
            return True
        own = member_features(asked, self._known())
        return own is not None and bool(self._condition_features()[1].any())

    def combine(self, asked: Asked, context: int, affinity: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights of effects as measured and, behind them, of effects projected on the gene components."""
        conditions = self.conditions
        if asked.label >= 0:
            mask = conditions.label == asked.label
            by_context = self._contexts(conditions.curves_per_context(mask) > 0, context, affinity)
            return np.concatenate([conditions.average(asked.at_dose, mask, by_context), np.zeros(len(conditions))])
        _, described = self._condition_features()
        number = np.bincount(conditions.context[described], minlength=self.n_contexts)
        by_context = self._contexts(number > 0, context, affinity)
        share = described / np.maximum(number, 1)[conditions.context]
        own = member_features(asked, self._known())
        score = self.slope.cpu().numpy() @ (self._amount(asked.codes, asked.dose) @ own)
        # the scores act on effects without their mean b
        total = np.bincount(conditions.context, score, minlength=self.n_contexts)[conditions.context]
        weight = by_context[conditions.context]
        return np.concatenate([weight * share, weight * (score - total * share)])

    def _contexts(
        self, available: NDArray[np.bool_], context: int, affinity: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        if context < self.n_contexts and available[context]:
            return (np.arange(self.n_contexts) == context).astype(float)
        weights = np.zeros(self.n_contexts)
        at = np.flatnonzero(available)
        weights[at] = self._transfer(at, affinity[at], float(self.strength))
        return weights

    def _transfer(
        self, contexts: NDArray[np.int64], affinity: NDArray[np.float64], strength: float
    ) -> NDArray[np.float64]:
        """Weights of contexts in a ridge regression on principal components of their control profiles."""
        gram = self._gram[np.ix_(contexts, contexts)]
        return ridge_weights(gram, affinity, strength, self.n_components)

    def affinity(self, control: Tensor) -> NDArray[np.float64]:
        """Inner products of control profiles with those of training, ``(n, n_contexts)``."""
        control, own = (v.cpu().numpy().astype(np.float64) for v in (control, self.means.control))
        return (control - own.mean(0)) @ (own - own.mean(0)).T

    @property
    def _gram(self) -> NDArray[np.float64]:
        cache = self.means.cache
        if "gram" not in cache:
            cache["gram"] = self.affinity(self.means.control)
        return cache["gram"]

    def _no_effect(self) -> NDArray[np.float64]:
        return np.zeros(2 * len(self.conditions))

    def weighted(self, weights: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Effects of given weights, plain and projected, and their sampling variances, ``(n, n_genes)``."""
        means = self.means
        plain, projected = (means.of_means(w) for w in np.split(weights, 2, axis=1))
        if not projected.any():
            return means.product(plain, means.mean), means.product(plain**2, means.variance)
        scaled = self.loading @ self.inverse  # the projection is scaled @ loading^T
        mean = means.product(plain, means.mean) + means.product(projected, means.mean) @ self.loading @ scaled.mT
        # errors of genes are independent: squares of the entries of (plain + projected * projection)
        own = (scaled * self.loading).sum(1)
        variance = means.product(plain**2, means.variance)
        variance = variance + 2 * own * means.product(plain * projected, means.variance)
        spread = torch.einsum("qg,gk,gl->qkl", means.product(projected**2, means.variance), self.loading, self.loading)
        variance = variance + torch.einsum("gk,qkl,gl->qg", scaled, spread, scaled)
        return mean, variance


@dataclass(frozen=True)
class LinearOptions(Options):
    """Options of :class:`Linear`, which has their documentation."""

    n_components: int = option(10, whole=1)
    ridge: float = option(0.1, above=0)


class Linear(Baseline):
    r"""Effects are linear in features of genes and of perturbations (Ahlmann-Eltze et al. 2025).

    Training effects Y (genes x perturbations) of a context are fitted by :math:`Y \approx G W P^\top + b`. Rows of G
    are the scores of the genes on the first principal components of all training pseudobulks, b is the mean effect, and
    :math:`W = (G^\top G + \lambda)^{-1} G^\top (Y - b) P (P^\top P + \lambda)^{-1}`. P describes perturbations:
    registered features, else the row of G of the gene whose name the perturbation bears, else indicators. The row of a
    combination is the sum of its members', each times its dose response: that is 0 at dose 0, 1 at the highest dose,
    and logarithmic from the lowest measured dose on.

    * A perturbation that was measured has its measured effect in a context where it was measured (doses as in
      :class:`~pertura.baseline.MeanEffect`).
    * In another context its effect is predicted from the control profile: ridge regression, over the contexts where it
      was measured, of effects on the first principal components of the controls, with the strength of the ridge that
      predicts the training contexts best when each is left out, profiles and effects having different halves of the
      controls.
    * A perturbation that was not measured has the effect that its features give in the context, or, for a context
      without measured perturbations, this over contexts by the same regression.

    Parameters
    ----------
    adata, registry
        As in :class:`~pertura.baseline.MeanEffect`.
    n_components
        Number of components of genes, and of control profiles.
    ridge
        :math:`\lambda`.
    """

    _module_cls = LinearModule
    _options_cls = LinearOptions
    _can_predict_features = True

    def _module_options(self) -> dict[str, Any]:
        gene = self.gene_names.get_indexer(list(self.registered.vocabulary.names))
        return {"features": self._features(), "gene": gene}

    @property
    def vocabulary(self) -> Vocabulary:
        """The perturbations that the model knows; genes describe them where no features were registered."""
        registered = self.registered.vocabulary
        module = self.__dict__.get("module")
        if module is None or not (self.is_trained_ and module.uses_loadings):
            return registered
        loading, described = self.__dict__.get("_described", (None, registered))
        if loading is not module.loading:
            features = pd.DataFrame(module.loading.cpu().numpy(), index=self.gene_names)
            described = replace(registered, features=features)
            self._described = (module.loading, described)
        return described
