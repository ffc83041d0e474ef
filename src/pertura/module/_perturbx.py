r"""PerturbX: the mean effect in a context, from a bag of its unperturbed cells (Keinan et al. 2023).

For bag b of :math:`K` control cells :math:`x_i` of a context under a perturbation with indicator vector e (the members'
dose responses):

.. math::

    M        &\sim \mathrm{Concrete}(T), \quad u_i = M x_i                  &&\text{few genes are selected} \\
    z_i      &= \phi([u_i, e]) \sim N(0, \tfrac{1}{2 \beta} I)               &&\text{cells} \\
    z        &= \textstyle\sum_i a_i z_i, \quad a = \mathrm{softmax}_i\, w^\top \tanh(V z_i)  &&\text{bag} \\
    \bar d   &\sim N\big(\mu_p + B\, \psi([z, e]),\; \mathrm{diag}(s^2 / w)\big)        &&\text{effect}

with :math:`\mu_p` the mean training effect, B a basis of few components, s the standard errors of a bag's effect and w weights
of genes. The guide :math:`q(M)` is concrete with free logits at a temperature that training lowers.

Several members are trained side by side, each without some of the contexts. What they and a ridge regression on the control
profiles (:class:`pertura.baseline.Linear`) say about the contexts that they did not see decides how much of either is added to
:math:`\mu_p`: nothing, where contexts tell nothing about one another.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import ttest_1samp
from torch import Tensor, nn

from pertura.baseline._conditions import Asked
from pertura.baseline._linear import LinearModule
from pertura.baseline._module import BaselineModule
from pertura.nn._selector import BagAggregation, ConcreteSelector, MemberLinear

from ._base import Action, Cells

_BAGS = 32  # that are encoded at a time
# of the regression on control profiles, in units of the mean variance of a component; training contexts choose
_STRENGTHS = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
_CHANCE = 0.1  # p value of a gain in training contexts, above which it is none


class PerturbX(LinearModule):
    r"""Generative model, guide and closed-form part of PerturbX.

    Parameters
    ----------
    n_selected
        Rows of the selector.
    n_candidates
        Genes among which they are.
    n_latent, n_hidden
        Dimension of z, and units of the hidden layers.
    aggregation
        ``"mean"``, ``"attention"`` or ``"gated"``.
    n_members
        Networks of the ensemble.
    n_folds
        Parts of the contexts; member e does not see part e modulo `n_folds`. 1: all see all.
    rank
        Number of components of B; `None` decodes into all genes.
    residual
        Whether :math:`\mu_p`, and the closed-form part, are added.
    beta
        Complexity penalty of z.
    duplicate_penalty
        Penalty of rows that select the same gene.
    entropy_penalty
        Penalty, at the end of training, of rows that have not decided for a gene.
    bag_size
        Cells per bag.
    n_stored
        Control cells of each training context that are kept, as their selected genes, to describe it.
    **kwargs
        Of :class:`~pertura.baseline._linear.LinearModule`.
    """

    _fitted = (*LinearModule._fitted, "basis", "bag", "has_bag")
    no_weight_decay = {"selector.logits"}

    def __init__(
        self,
        *,
        n_selected: int = 64,
        n_candidates: int = 512,
        n_latent: int = 8,
        n_hidden: int = 32,
        aggregation: Literal["mean", "attention", "gated"] = "attention",
        n_members: int = 5,
        n_folds: int = 1,
        rank: int | None = 30,
        residual: bool = True,
        beta: float = 1e-3,
        duplicate_penalty: float = 1.0,
        entropy_penalty: float = 50.0,
        dropout_rate: float = 0.1,
        bag_size: int = 32,
        n_stored: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        n_perturbations = len(self.max_dose)
        self.n_members, self.n_folds, self.n_latent = n_members, n_folds, n_latent
        self.residual, self.beta, self.duplicate_penalty = residual, beta, duplicate_penalty
        self.entropy_penalty, self.decision_weight = entropy_penalty, 0.0
        self.bag_size, self.n_stored = bag_size, n_stored
        self.lr_factors = {"selector.logits": 30.0}

        self.selector = ConcreteSelector(n_members, n_selected, n_candidates)
        self.register_buffer("candidates", torch.arange(n_candidates))
        self.encoder_in = MemberLinear(n_members, n_selected + n_perturbations, n_hidden)
        self.encoder_out = MemberLinear(n_members, n_hidden, n_latent)
        self.dropout = nn.Dropout(dropout_rate)
        self.aggregation = BagAggregation(n_members, n_latent, aggregation)
        self.decoder_in = MemberLinear(n_members, n_latent + n_perturbations, n_hidden)
        self.decoder_out = MemberLinear(n_members, n_hidden, self.n_genes if rank is None else rank, zero=residual)

        self.rank = rank
        self.register_buffer("basis", torch.zeros(self.n_genes, 0))
        self.register_buffer("input_mean", torch.zeros(self.n_genes))
        self.register_buffer("input_scale", torch.ones(self.n_genes))
        self.register_buffer("effect_sd", torch.ones(self.n_genes))
        self.register_buffer("fold", torch.full((self.n_contexts,), -1, dtype=torch.long))
        self.register_buffer("bag", torch.zeros(self.n_contexts, 0, n_members, n_selected))
        self.register_buffer("has_bag", torch.zeros(self.n_contexts, dtype=torch.bool))
        self.register_buffer("regression_strength", torch.tensor(0.1))
        # what is added to the mean effect: of the regression, of the networks; and of what B does not span
        self.register_buffer("share", torch.tensor([0.0, 1.0, 0.0]))

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, x: Tensor, e: Tensor, context: Tensor, effect: Tensor, mean_effect: Tensor) -> None:
        """Effects of bags; `x` has their control cells, ``(n_bags, bag_size, n_candidates)``."""
        n_bags = len(x)
        sees = ~self.left_out(context)
        with pyro.plate("bags", n_bags):
            M = pyro.sample("M", self.selector.distribution(n_bags))
            z = self.encode(torch.einsum("besg,bkg->bkes", M, x), e)
            complexity = self.beta * z.square().sum(-1).mean(1)  # (n_bags, n_members)
            pyro.factor("complexity", -(complexity * sees).sum(-1))
            predicted = mean_effect[:, None] + self.decode_effect(self.aggregation(z), e)
            likelihood = dist.Normal(predicted, self.effect_sd).mask(sees[..., None]).to_event(2)
            pyro.sample("effect", likelihood, obs=effect[:, None].expand_as(predicted))
        pyro.factor("duplicates", -self.duplicate_penalty * self.selector.duplicates().sum())
        # a cold choice may still be a different one each time: towards the end rows are asked to make up their minds
        pyro.factor("decided", -self.decision_weight * self.selector.entropy().sum())

    def guide(self, x: Tensor, e: Tensor, context: Tensor, effect: Tensor, mean_effect: Tensor) -> None:
        """One choice for all cells of a bag."""
        with pyro.plate("bags", len(x)):
            pyro.sample("M", self.selector.distribution(len(x)))

    def left_out(self, context: Tensor) -> Tensor:
        """Whether a member does not see a context, ``(n, n_members)``."""
        return self.fold[context][:, None] == torch.arange(self.n_members, device=context.device) % self.n_folds

    def encode(self, u: Tensor, e: Tensor) -> Tensor:
        """Z of cells, ``(n_bags, n_cells, n_members, n_latent)``, from selected genes and perturbation of the bag."""
        e = e[:, None, None].expand(*u.shape[:3], -1)
        h = F.elu(self.encoder_in(torch.cat([u, e], -1)))
        return self.encoder_out(self.dropout(h))

    def decode_effect(self, z: Tensor, e: Tensor) -> Tensor:
        """Deviation from the mean effect, ``(n_bags, n_members, n_genes)``."""
        e = e[:, None].expand(-1, self.n_members, -1)
        d = self.decoder_out(self.dropout(F.elu(self.decoder_in(torch.cat([z, e], -1)))))
        return d if self.rank is None else d @ self.basis.mT

    def standardised(self, x: Tensor) -> Tensor:
        """Candidate genes of cells as the selector sees them."""
        return ((x - self.input_mean) / self.input_scale)[..., self.candidates]

    def normalised(self, cells: Cells) -> Tensor:
        """Counts as log1p of counts per 10,000; other values as they are."""
        return cells.x if self.native_scale != "log1p" else torch.log1p(cells.x * (1e4 / cells.library))

    def indicator(self, action: Action) -> Tensor:
        """Members, each with its dose response: ``(n, n_perturbations)``."""
        strength = torch.log1p(action.dose) / np.log(2.0) * (action.codes >= 0)
        e = torch.zeros(len(action.codes), len(self.max_dose), device=strength.device)
        return e.scatter_add(1, action.codes.clamp(min=0), strength)

    def on_step(self, progress: float) -> None:
        """Lower the temperature."""
        self.selector.anneal(progress)
        self.decision_weight = self.entropy_penalty * progress

    def _get_fn_args_from_batch(self, batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cells, size = Cells.from_tensors(batch), self.bag_size
        x = self.normalised(cells)
        control, treated = x.split([int(batch["n_pairs"]), len(x) - int(batch["n_pairs"])])
        control, treated = (v.unflatten(0, (-1, size)) for v in (control, treated))
        first = slice(int(batch["n_pairs"]), None, size)  # a cell of each bag
        action = Action(cells.action.codes[first], cells.action.dose[first])
        context = cells.context[first]
        effect = treated.mean(1) - control.mean(1)
        mean = self._mean_effects(action, context) if self.residual else torch.zeros_like(effect)
        return (self.standardised(control), self.indicator(action), context, effect, mean), {}

    def _mean_effects(self, action: Action, context: Tensor) -> Tensor:
        """Mean effect of the other training contexts, where there are some."""
        asked, contexts, which = self._distinct(action, context)
        mean = self._sums(np.stack([self._from_others(a, int(c))[0] for a, c in zip(asked, contexts, strict=True)]))[0]
        return mean[torch.as_tensor(which, device=mean.device)]

    # -- contexts ---------------------------------------------------------------------------------------------------

    def affinity(self, control: Tensor) -> Tensor:
        """Inner products of control profiles in the basis, ``(n, n_contexts)``, on CPU."""
        if not self.basis.shape[1]:
            return super().affinity(control)
        own, basis = self.control.cpu().double(), self.basis.cpu().double()
        centre = own[self.has_control.cpu()].mean(0)
        return ((control.cpu().double() - centre) @ basis) @ ((own - centre) @ basis).mT

    def _from_others(
        self,
        asked: Asked,
        context: int,
        row: NDArray[np.float64] | None = None,
        strength: float | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights of measured effects in the mean over other contexts, and in the regression on their profiles.

        `strength` of the regression's penalty; `None`: the one that training contexts chose.
        """
        nothing = np.zeros(len(self.conditions))
        if asked.label < 0:
            return nothing, nothing
        mask = self.conditions.label == asked.label
        available = self.conditions.curves_per_context(mask) > 0
        alone = available.sum() == 1 and context < self.n_contexts and available[context]
        if context < self.n_contexts and not alone:
            available[context] = False
        at = np.flatnonzero(available)
        result = []
        own = float(self.regression_strength) if strength is None else strength
        for penalty in (np.inf, own) if row is not None else (np.inf,):
            weights = np.zeros(self.n_contexts)
            weights[at] = self._transfer(at, np.zeros(len(at)) if row is None else row[at], penalty)
            result.append(self.conditions.average(asked.at_dose, mask, weights))
        return result[0], result[-1]

    def chosen_genes(self) -> Tensor:
        """Gene of each row of the selectors, ``(n_members, n_selected)``."""
        return self.candidates[self.selector.chosen()]

    @torch.no_grad()
    def describe(self, x: Tensor) -> Tensor:
        """Chosen genes of standardised cells, ``(n_cells, n_members, n_selected)``."""
        return x[:, self.selector.chosen()]

    @torch.no_grad()
    def network(self, action: Action, bags: Tensor) -> tuple[Tensor, Tensor]:
        """Deviation from the mean effect and z of each bag under each action, for every member.

        Parameters
        ----------
        bags
            Chosen genes of the cells, ``(n, n_cells, n_members, n_selected)``.

        Returns
        -------
        ``(n, n_members, n_genes)`` and ``(n, n_members, n_latent)``.
        """
        e = self.indicator(action)
        z = [self.aggregation(self.encode(b, own)) for b, own in zip(bags.split(_BAGS), e.split(_BAGS), strict=True)]
        z = torch.cat(z) if z else self.encoder_out.weight.new_zeros(0, self.n_members, self.n_latent)
        return self.decode_effect(z, e), z

    # -- effects ----------------------------------------------------------------------------------------------------

    def effects(self, action: Action, context: Tensor, affinity: Tensor, bags: Tensor | None = None, has_bag=None):
        """As of every closed-form module; in contexts without the measured effect, what other contexts tell."""
        mean, sd, contexts, which = super().effects(action, context, affinity)
        asked, _, _ = self._distinct(action, context)
        first = np.unique(which, return_index=True)[1]
        new = [
            i
            for i, (a, c) in enumerate(zip(asked, contexts, strict=True))
            if len(a.codes) and a.label >= 0 and not (self.residual and self._measured(a, int(c)))
        ]
        if not new:
            return mean, sd, contexts, which
        table = affinity.numpy()
        weights = [self._from_others(asked[i], int(contexts[i]), table[contexts[i]]) for i in new]
        bags, has_bag = (self.bag, self.has_bag) if bags is None else (bags, has_bag)
        at = torch.as_tensor(contexts[new], device=mean.device)
        described = self._take(action, torch.as_tensor(first[new], device=mean.device))
        predicted, variance = self._combine(weights, described, bags[at], has_bag[at])
        rows = torch.as_tensor(new, device=mean.device)
        return (
            mean.index_copy(0, rows, predicted),
            sd.index_copy(0, rows, variance.clamp(min=0).sqrt()),
            contexts,
            which,
        )

    def _combine(self, weights: list, action: Action, bags: Tensor, has_bag: Tensor) -> tuple[Tensor, Tensor]:
        """Mean effect, regression and networks in their shares; and the variance of the sum."""
        average, linear = (np.stack(w) for w in zip(*weights, strict=True))
        regression, network, rest = (float(s) for s in self.share)
        network_mean = network_variance = torch.zeros(())
        if network > 0 and bags.shape[1]:
            each = network * self.network(action, bags)[0] * has_bag[:, None, None]
            network_mean = each.mean(1)
            network_variance = each.var(1) if self.n_members > 1 else torch.zeros_like(network_mean)
        if not self.residual:
            return network_mean, network_variance
        closed, variance = self._sums((1.0 - regression) * average + regression * linear)
        if self.basis.shape[1]:
            spanned = closed @ self.basis @ self.basis.mT
            closed = rest * closed + (1.0 - rest) * spanned
        return closed + network_mean, variance + network_variance

    def _sums(self, weights: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        return BaselineModule._weighted(self, weights)

    def _measured(self, asked: Asked, context: int) -> bool:
        mask = self.conditions.label == asked.label
        return context < self.n_contexts and bool(self.conditions.curves_per_context(mask)[context])

    @staticmethod
    def _take(action: Action, rows: Tensor) -> Action:
        return Action(action.codes[rows], action.dose[rows])

    def _drawn(self, action: Action, context: Tensor, globals_: dict[str, Tensor]):
        mean, sd, contexts, which = self.effects(
            action, context, globals_["affinity"], globals_.get("bag"), globals_.get("has_bag")
        )
        effect = mean + sd * globals_["deviate"][:, None, :]
        return effect, globals_["control"][contexts], torch.as_tensor(which, device=mean.device)

    # -- what a prediction is made of -------------------------------------------------------------------------------

    def measured_effects(self, action: Action) -> Tensor:
        """Measured effects of an action in the training contexts where it was measured, ``(n, n_genes)``, on CPU."""
        asked, _, _ = self._distinct(action, torch.zeros(1, dtype=torch.long, device=action.codes.device))
        conditions, mask = self.conditions, self.conditions.label == asked[0].label
        at = np.flatnonzero(conditions.curves_per_context(mask) > 0) if asked[0].label >= 0 else []
        one = np.eye(self.n_contexts)
        weights = [conditions.average(asked[0].at_dose, mask, one[c]) for c in at]
        return self._sums(np.stack(weights))[0].double().cpu() if weights else torch.zeros(0, self.n_genes)

    def regression_slope(self, action: Action, axis: NDArray[np.float64]) -> NDArray[np.float64]:
        """Slope, in the control profile of a new context, of the regression's effect along an axis, ``(n_genes,)``."""
        asked, _, _ = self._distinct(action, torch.zeros(1, dtype=torch.long, device=action.codes.device))
        # weights are linear in the inner products with the training profiles: one product at a time
        rows = np.concatenate([np.zeros((1, self.n_contexts)), np.eye(self.n_contexts)])
        weights = [self._from_others(asked[0], self.n_contexts, row)[1] for row in rows]
        along = self._sums(np.stack(weights))[0].double().cpu().numpy() @ axis
        own = self.control.cpu().double()
        if self.basis.shape[1]:
            basis = self.basis.cpu().double()
            profiles = (own - own[self.has_control.cpu()].mean(0)) @ basis @ basis.mT
        else:
            profiles = own - own.mean(0)
        return (along[1:] - along[0]) @ profiles.numpy()

    # -- how much of what is believed -------------------------------------------------------------------------------

    @torch.no_grad()
    def stack(self) -> None:
        """Shares of regression and networks by which they predict the contexts that they did not see.

        Each training condition is predicted from the other contexts: by the regression without it, at the strength that
        predicts best, and by the members that did not see its context. Non-negative least squares on the deviations from
        the mean effect, in the basis; at most 1 together, and 0 where a t test over the contexts does not find a gain.
        """
        if not self.residual or self.n_folds < 2:
            return
        conditions, table = self.conditions, self.affinity(self.control).numpy()
        number = [
            (conditions.curves_per_context(conditions.label == label) > 0).sum()
            for label in range(len(conditions.labels))
        ]
        rows = np.flatnonzero(np.asarray(number)[conditions.label] > 2)
        if not len(rows):
            self.share.copy_(torch.tensor([0.0, 0.0, 1.0]))
            return
        asked = [conditions.ask(conditions.codes[i], conditions.dose[i]) for i in rows]
        measured = self._sums(np.eye(len(conditions))[rows])[0]
        network = self._held_out(rows)
        span = self.basis if self.basis.shape[1] else torch.eye(self.n_genes, device=self.basis.device)

        def from_others(strength: float) -> tuple[Tensor, Tensor, float]:
            """Mean and regression of the other contexts, and the squared error of the regression at its best share."""
            weights = [
                self._from_others(a, int(conditions.context[i]), table[conditions.context[i]], strength)
                for a, i in zip(asked, rows, strict=True)
            ]
            mean, fitted = (self._sums(np.stack(w))[0] for w in zip(*weights, strict=True))
            target, told = (measured - mean) @ span, (fitted - mean) @ span
            share = ((target * told).sum() / told.square().sum().clamp(min=1e-12)).clamp(0.0, 1.0)
            return mean, fitted, float((target - share * told).square().sum())

        errors = [from_others(strength)[2] for strength in _STRENGTHS]
        self.regression_strength.fill_(_STRENGTHS[int(np.argmin(errors))])
        average, linear, _ = from_others(float(self.regression_strength))
        target, *inputs = (
            ((v) @ span).double().cpu().numpy().ravel() for v in (measured - average, linear - average, network)
        )
        share, _ = nnls(np.stack(inputs, axis=1), target)
        share = share / max(1.0, share.sum())
        left = target - np.stack(inputs, axis=1) @ share
        gain = pd.Series((target**2 - left**2).reshape(len(rows), -1).sum(1)).groupby(conditions.context[rows]).mean()
        # contexts are what is new, and the perturbations of one go up and down together
        if not ttest_1samp(gain, 0.0, alternative="greater").pvalue < _CHANCE:
            share[:] = 0.0  # no more than chance would give: the mean effect
        closed = average + share[0] * (linear - average)
        off = closed - closed @ span @ span.mT
        rest = float(((measured - measured @ span @ span.mT) * off).sum() / off.square().sum().clamp(min=1e-12))
        self.share.copy_(torch.tensor([*share, min(max(rest, 0.0), 1.0)]))

    def _held_out(self, rows: NDArray[np.int64]) -> Tensor:
        """Networks' deviation from the mean effect in training conditions, by the members that did not see the context."""
        conditions = self.conditions
        context = torch.as_tensor(conditions.context[rows], device=self.bag.device)
        codes = torch.as_tensor(conditions.codes[rows], device=context.device)
        unit = torch.as_tensor(np.append(self.max_dose.cpu().numpy(), 1.0)[conditions.codes[rows]])
        action = Action(codes, (torch.as_tensor(conditions.dose[rows]) / unit).float().to(context.device))
        each = self.network(action, self.bag[context])[0]
        unseen = self.left_out(context).float()
        weight = unseen / unseen.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("ne,neg->ng", weight, each)
