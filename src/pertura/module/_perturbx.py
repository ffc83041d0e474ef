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

Several members are trained side by side, each without some of the contexts. In a context where a perturbation was not measured
its effect is

.. math::

    \mu_p + \alpha_1 R_p(\text{control profile}) + \alpha_2 B\, \psi([z, e]) - \alpha_3 (x - \bar x)

with R a ridge regression of the measured effects on the control profiles, x the control profile and :math:`\bar x` the mean of those
of the other contexts: treated cells of contexts that start apart may be alike. The shares :math:`\alpha` are those that predict
contexts which were left out, 0 where contexts tell nothing about one another. A combination that was not measured is the sum of
its members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pertura.effects import (
    Asked,
    ConditionTable,
    Transfer,
    choose_strength,
    fit_departures,
    ridge_weights,
    stack_shares,
)
from pertura.nn._selector import BagAggregation, ConcreteSelector, MemberLinear

from ._added_effects import AddedEffectModule, Distinct, MeasuredMeans, add_buffers, set_buffer
from ._base import Action, Cells, Globals

Weights = NDArray[np.float64]
_BAGS = 32  # that are encoded at a time


N_BAGS = 8  # of a minibatch for which penalties hold as they are


class ContextRegression(nn.Module):
    """What other contexts say of an effect: its mean over them, and a ridge regression on their control profiles.

    Parameters
    ----------
    n_genes
        Number of genes.
    n_components
        Components of the control profiles.
    """

    def __init__(self, n_genes: int, n_components: int) -> None:
        super().__init__()
        self.n_components = n_components
        add_buffers(self, basis=torch.zeros(n_genes, 0), strength=torch.tensor(np.inf))

    def project(self, values: Any) -> NDArray[np.float64]:
        """Coordinates in the basis of effects, ``(..., n_components)``; without a basis, values of all genes."""
        values = values.cpu() if torch.is_tensor(values) else values
        values = np.asarray(values, dtype=np.float64)
        return values @ self.basis.cpu().double().numpy() if self.basis.shape[1] else values

    def affinity(self, control: Any, means: MeasuredMeans) -> NDArray[np.float64]:
        """Inner products of control profiles with those of training, ``(n, n_contexts)``."""
        return self.products(control, means.control, means)

    def products(self, control: Any, others: Any, means: MeasuredMeans) -> NDArray[np.float64]:
        """Inner products of control profiles, both less the mean profile of training."""
        center = self.project(means.control[means.has_control].mean(0))
        return (self.project(control) - center) @ (self.project(others) - center).T

    def weights(
        self,
        means: MeasuredMeans,
        gram: NDArray[np.float64],
        asked: Asked,
        context: int,
        row: NDArray[np.float64],
        strength: float | None = None,
    ) -> Weights:
        """Weights of measured effects of a perturbation in its effect in a context, that context left out.

        Parameters
        ----------
        means
            What was measured.
        gram
            Inner products of the training profiles, ``(n_contexts, n_contexts)``.
        asked
            A perturbation; one that was not measured has no weights.
        context
            Code of the context; from the number of training contexts on, one of the query.
        row
            Inner products of its profile with those of training, ``(n_contexts,)``.
        strength
            Of the ridge; by default the one that was chosen; infinite: the mean over contexts.
        """
        conditions, n_contexts = means.conditions, means.n_contexts
        mask = conditions.label == asked.label
        if not mask.any():  # it was not measured
            return np.zeros(len(conditions))
        available = conditions.curves_per_context(mask) > 0
        # the only context where it was measured stands for all
        if context < n_contexts and available.sum() > 1:
            available[context] = False
        at = np.flatnonzero(available)
        strength = float(self.strength) if strength is None else strength
        weights = np.zeros(n_contexts)
        weights[at] = ridge_weights(gram[np.ix_(at, at)], row[at], strength, self.n_components)
        return conditions.average(asked.at_dose, mask, weights)


@dataclass
class Split:
    """Control profiles, and effects that do not share their noise: half of the controls is in either.

    Attributes
    ----------
    control
        Profiles of one half, ``(n_contexts, n_genes)``.
    effect
        Measured effects, compared with the other half, ``(n_conditions, n_genes)``.
    bag
        Cells of the first half, ``(n_contexts, n_cells, n_members, n_selected)``.
    """

    control: NDArray[np.float64]
    effect: NDArray[np.float64]
    bag: Tensor


class PerturbX(AddedEffectModule):
    r"""Generative model and guide of PerturbX, and the regression beside it.

    Parameters
    ----------
    n_genes, n_contexts, max_dose, native_scale
        See :class:`~pertura.module._added_effects.AddedEffectModule`.
    n_selected
        Rows of the selector.
    n_candidates
        Genes among which they are.
    n_latent, n_hidden
        Dimension of z, and units of the hidden layers.
    aggregation
        ``"mean"``, ``"attention"`` or ``"gated"``.
    n_members
        Members of the ensemble.
    n_folds
        Parts of the contexts; member e does not see part e modulo `n_folds`. 1: all see all.
    rank
        Number of components of B; `None` decodes into all genes.
    residual
        Whether :math:`\mu_p` and the regression are added.
    beta
        Complexity penalty of z.
    duplicate_penalty
        Penalty of rows that select the same gene, per 8 bags of cells.
    entropy_penalty
        Penalty, at the end of training, of rows that have not decided for a gene, per 8 bags.
    dropout_rate
        Dropout of the hidden layers.
    bag_size
        Cells per bag.
    n_stored
        Control cells of each training context that are kept, as their selected genes, to describe it.
    n_components
        Components of the control profiles in the regression.
    """

    no_weight_decay = {"selector.logits"}

    def __init__(
        self,
        n_genes: int,
        n_contexts: int,
        max_dose: NDArray[np.float64],
        native_scale: str,
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
        n_components: int = 30,
    ) -> None:
        super().__init__(n_genes, n_contexts, max_dose, native_scale)
        n_perturbations = len(self.means.max_dose)
        self.n_members, self.n_folds, self.n_latent, self.rank = n_members, n_folds, n_latent, rank
        self.residual, self.beta, self.duplicate_penalty = residual, beta, duplicate_penalty
        self.entropy_penalty, self.decision_weight = entropy_penalty, 0.0
        self.bag_size, self.n_stored = bag_size, n_stored
        self.lr_factors = {"selector.logits": 30.0}

        self.selector = ConcreteSelector(n_members, n_selected, n_candidates)
        self.encoder_in = MemberLinear(n_members, n_selected + n_perturbations, n_hidden)
        self.encoder_out = MemberLinear(n_members, n_hidden, n_latent)
        self.dropout = nn.Dropout(dropout_rate)
        self.aggregation = BagAggregation(n_members, n_latent, aggregation)
        self.decoder_in = MemberLinear(n_members, n_latent + n_perturbations, n_hidden)
        self.decoder_out = MemberLinear(n_members, n_hidden, n_genes if rank is None else rank, zero=residual)
        self.regression = ContextRegression(n_genes, n_components)

        self.register_buffer("candidates", torch.arange(n_candidates))
        self.register_buffer("input_mean", torch.zeros(n_genes))
        self.register_buffer("input_scale", torch.ones(n_genes))
        self.register_buffer("effect_sd", torch.ones(n_genes))
        self.register_buffer("fold", torch.full((n_contexts,), -1, dtype=torch.long))
        # what is added to the mean effect: of the regression, of the bags, of the convergence; and of what B does not span
        self.register_buffer("share", torch.tensor([0.0, 1.0, 0.0, 0.0]))
        add_buffers(
            self,
            bag=torch.zeros(n_contexts, 0, n_members, n_selected),
            has_bag=torch.zeros(n_contexts, dtype=torch.bool),
            # effects in the contexts where they were measured; without rows: as measured
            posterior=torch.zeros(0, n_genes),
            posterior_variance=torch.zeros(0, n_genes),
        )

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, x: Tensor, e: Tensor, context: Tensor, effect: Tensor, mean_effect: Tensor) -> None:
        """Effects of bags; `x` has their control cells, ``(n_bags, bag_size, n_candidates)``."""
        sees = ~self.left_out(context)
        with pyro.plate("bags", len(x)):
            M = pyro.sample("M", self.selector.distribution(len(x)))
            z = self.encode(torch.einsum("besg,bkg->bkes", M, x), e)
            predicted = mean_effect[:, None] + self.decode(self.aggregation(z), e)
            likelihood = dist.Normal(predicted, self.effect_sd).mask(sees[..., None]).to_event(2)
            pyro.sample("effect", likelihood, obs=effect[:, None].expand_as(predicted))
            if self.training:
                complexity = self.beta * z.square().sum(-1).mean(1)  # (n_bags, n_members)
                pyro.factor("complexity", -(complexity * sees).sum(-1))
        if self.training:
            share = len(x) / N_BAGS  # the objective of a cell is the same whatever the minibatch
            pyro.factor("duplicates", -share * self.duplicate_penalty * self.selector.duplicates().sum())
            # a cold choice may still be a different one each time: towards the end rows are asked to decide
            pyro.factor("decided", -share * self.decision_weight * self.selector.entropy().sum())

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

    def decode(self, z: Tensor, e: Tensor) -> Tensor:
        """Deviation from the mean effect, ``(n_bags, n_members, n_genes)``."""
        e = e[:, None].expand(-1, self.n_members, -1)
        d = self.decoder_out(self.dropout(F.elu(self.decoder_in(torch.cat([z, e], -1)))))
        return d if self.rank is None else d @ self.regression.basis.mT

    def on_step(self, progress: float) -> None:
        """Lower the temperature."""
        self.selector.anneal(progress)
        self.decision_weight = self.entropy_penalty * progress

    def _get_fn_args_from_batch(self, batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cells, n_control, size = Cells.from_tensors(batch), int(batch["n_pairs"]), self.bag_size
        x = self.normalized(cells)
        # the effect is against other control cells than those that predict it
        control, other, treated = (v.unflatten(0, (-1, size)) for v in x.tensor_split([n_control // 2, n_control]))
        first = slice(n_control, None, size)  # a cell of each bag
        action, context = cells.action[first], cells.context[first]
        effect = treated.mean(1) - other.mean(1)
        mean = self._mean_of_others(action, context) if self.residual else torch.zeros_like(effect)
        return (self.standardized(control), self.indicator(action), context, effect, mean), {}

    # -- bags -------------------------------------------------------------------------------------------------------

    def standardized(self, x: Tensor) -> Tensor:
        """Candidate genes of cells as the selector sees them."""
        return ((x - self.input_mean) / self.input_scale)[..., self.candidates]

    def indicator(self, action: Action) -> Tensor:
        """Members, each with its dose response: ``(n, n_perturbations)``."""
        strength = torch.log1p(action.dose) / np.log(2.0) * (action.codes >= 0)
        e = torch.zeros(len(action), len(self.means.max_dose), device=strength.device)
        return e.scatter_add(1, action.codes.clamp(min=0), strength)

    def chosen_genes(self) -> Tensor:
        """Gene of each row of the selectors, ``(n_members, n_selected)``."""
        return self.candidates[self.selector.chosen()]

    @torch.no_grad()
    def describe(self, cells: Cells) -> Tensor:
        """Chosen genes of cells, standardized, ``(n_cells, n_members, n_selected)``."""
        return self.standardized(self.normalized(cells))[:, self.selector.chosen()]

    @torch.no_grad()
    def predict_bags(self, action: Action, bags: Tensor) -> tuple[Tensor, Tensor]:
        """Deviation from the mean effect and z of each bag under each action, for every member.

        Parameters
        ----------
        action
            One for each bag.
        bags
            Chosen genes of the cells, ``(n, n_cells, n_members, n_selected)``.

        Returns
        -------
        ``(n, n_members, n_genes)`` and ``(n, n_members, n_latent)``.
        """
        e = self.indicator(action)
        z = [self.aggregation(self.encode(b, own)) for b, own in zip(bags.split(_BAGS), e.split(_BAGS), strict=True)]
        z = torch.cat(z) if len(bags) else self.encoder_out.weight.new_zeros(0, self.n_members, self.n_latent)
        return self.decode(z, e), z

    # -- effects ----------------------------------------------------------------------------------------------------

    def affinity(self, control: Tensor) -> NDArray[np.float64]:
        """Inner products of control profiles with those of training, ``(n, n_contexts)``."""
        return self.regression.affinity(control, self.means)

    def representable(self, codes: NDArray[np.int64]) -> bool:
        """Whether a perturbation was measured, or each of its members was alone."""
        known = self.conditions.find
        return known(np.sort(codes)) >= 0 or all(known(codes[i : i + 1]) >= 0 for i in range(len(codes)))

    def effects(self, asked: Distinct, globals_: Globals) -> tuple[Tensor, Tensor]:
        """Where a perturbation was measured, its measured effect; elsewhere mean effect, regression, bags and convergence.

        In a context of which other perturbations are known these say how effects differ from those of other contexts.
        """
        shape = (len(asked.asked), len(self.conditions))
        measured, average, linear, transferred = (np.zeros(shape) for _ in range(4))
        new: list[tuple[int, Asked, int]] = []
        for row, (whole, c) in enumerate(zip(asked.asked, asked.context, strict=True)):
            for one in self._parts(whole):
                if self.residual and (own := self.conditions.in_context(one, int(c))).any():
                    measured[row] += own
                    continue
                if self.residual and self._transfer.knows(int(c)) and one.label >= 0:
                    transferred[row] += self._transfer(one, int(c))
                    continue
                new.append((row, one, int(c)))
                average[row] += self._from_others(one, int(c), globals_["affinity"][c], np.inf)
                linear[row] += self._from_others(one, int(c), globals_["affinity"][c])
        regression, bags, convergence, rest = self.share.tolist()
        if not self.residual:
            measured[:] = average[:] = linear[:] = 0.0
        transferred = transferred + (1.0 - regression) * average + regression * linear
        if len(self.posterior):
            mean, variance = self.means.product(measured, self.posterior), self.means.sums(transferred)[1]
            variance = variance + self.means.product(measured**2, self.posterior_variance)
        else:
            mean, variance = self.means.sums(measured)[0], self.means.sums(measured + transferred)[1]
        moved = self.means.sums(transferred)[0]
        if convergence > 0:
            moved = moved - convergence * self.means.distances(average, asked.context, globals_["control"])
        mean = mean + self._spanned(moved, rest)
        if bags > 0 and new:
            rows, singles, contexts = zip(*new, strict=True)
            rows, contexts = (torch.as_tensor(v, device=mean.device) for v in (rows, contexts))
            bag, has_bag = globals_.get("bag", self.bag), globals_.get("has_bag", self.has_bag)
            each = bags * self.predict_bags(self.action_of(singles), bag[contexts])[0] * has_bag[contexts, None, None]
            mean = mean.index_add(0, rows, each.mean(1))
            if self.n_members > 1:
                variance = variance.index_add(0, rows, each.var(1))
        return mean, variance

    def _parts(self, asked: Asked) -> list[Asked]:
        """What its effect is the sum of: itself, where it was measured, else its members."""
        if asked.label >= 0 or len(asked.codes) < 2:
            return [asked] if len(asked.codes) else []
        return [self.conditions.ask(asked.codes[i : i + 1], asked.dose[i : i + 1]) for i in range(len(asked.codes))]

    def action_of(self, asked: list[Asked] | tuple[Asked, ...]) -> Action:
        """Perturbations as an action, one row each."""
        width = max(len(a.codes) for a in asked)
        codes, dose = np.full((len(asked), width), -1), np.zeros((len(asked), width), dtype=np.float32)
        for row, one in enumerate(asked):
            codes[row, : len(one.codes)] = one.codes
            dose[row, : len(one.codes)] = one.dose / self.means.unit[one.codes]
        return Action(torch.as_tensor(codes), torch.as_tensor(dose)).to(self.means.mean.device)

    @property
    def _gram(self) -> NDArray[np.float64]:
        cache = self.means.cache
        if cache.get("basis") is not self.regression.basis:
            cache["basis"], cache["gram"] = self.regression.basis, self.affinity(self.means.control)
        return cache["gram"]

    def _from_others(self, asked: Asked, context: int, row: Any, strength: float | None = None) -> Weights:
        return self.regression.weights(self.means, self._gram, asked, context, row, strength)

    @property
    def _transfer(self) -> Transfer:
        """What known effects of a context say of its others; made anew when what it stands on changes."""
        cache, basis, share = self.means.cache, self.regression.basis, float(self.share[0])
        made_of = (basis, share, float(self.regression.strength))
        if "transfer" not in cache or any(
            a is not b and a != b for a, b in zip(cache["made_of"], made_of, strict=True)
        ):
            cache["made_of"], cache["transfer"] = made_of, self.means.transfer(self._expected)
        return cache["transfer"]

    def _expected(self, asked: Asked, context: int) -> Weights:
        """Weights in what other contexts say: between their mean and the regression."""
        row, share = self._gram[context], float(self.share[0])
        average = self._from_others(asked, context, row, np.inf)
        return (1.0 - share) * average + share * self._from_others(asked, context, row) if share else average

    def _spanned(self, effect: Tensor, rest: float) -> Tensor:
        """Effects of which a share is kept of what the basis does not span."""
        basis = self.regression.basis.to(effect)
        return rest * effect + (1.0 - rest) * (effect @ basis @ basis.mT) if basis.shape[1] else effect

    def _mean_of_others(self, action: Action, context: Tensor) -> Tensor:
        """Mean effect of the other training contexts, where there are some; ``(n, n_genes)``."""
        asked = self.means.distinct(action, context)
        nothing = np.zeros(self.n_contexts)
        weights = [
            self._from_others(a, int(c), nothing, np.inf) for a, c in zip(asked.asked, asked.context, strict=True)
        ]
        return self.means.sums(np.stack(weights))[0][asked.which]

    # -- what a prediction is made of -------------------------------------------------------------------------------

    def measured_effects(self, asked: Asked) -> NDArray[np.float64]:
        """Measured effects of a perturbation in the training contexts where it was measured, ``(n, n_genes)``."""
        conditions, mask = self.conditions, self.conditions.label == asked.label
        at = np.flatnonzero(conditions.curves_per_context(mask) > 0) if asked.label >= 0 else np.zeros(0, dtype=int)
        weights = [conditions.average(asked.at_dose, mask, np.eye(self.n_contexts)[c]) for c in at]
        return self.means.sums(np.stack(weights))[0].double().cpu().numpy() if weights else np.zeros((0, self.n_genes))

    def regression_slope(self, asked: Asked, axis: NDArray[np.float64]) -> NDArray[np.float64]:
        """Slope, in the control profile of a new context, of the regression's effect along an axis, ``(n_genes,)``."""
        # weights are linear in the inner products with the training profiles: one product at a time
        rows = np.concatenate([np.zeros((1, self.n_contexts)), np.eye(self.n_contexts)])
        weights = [self._from_others(asked, self.n_contexts, row) for row in rows]
        along = self.means.sums(np.stack(weights))[0].double().cpu().numpy() @ axis
        control = self.means.control
        profiles = self._spanned(control - control[self.means.has_control].mean(0), 0.0)
        return (along[1:] - along[0]) @ profiles.cpu().double().numpy()

    # -- how much of what is believed -------------------------------------------------------------------------------

    @torch.no_grad()
    def stack(self, splits: list[Split], bases: list[NDArray[np.float64]]) -> None:
        """Strength of the regression, and shares of regression, bags and convergence, by what they say of left-out contexts.

        Each training condition is predicted from the other contexts: by the regression without it, and by the members that
        did not see its context. What predicts and what is predicted have different halves of the controls: the noise of a
        control profile is in the effect as well, with the opposite sign, and would be mistaken for a relation.

        Parameters
        ----------
        splits
            Control profiles and bags of one half of the controls, and effects against the other.
        bases
            Of each fold, a basis of cells that are not of its contexts, ``(n_genes, rank)``: what the basis of all cells does not
            span has lost what the left-out effects happened to be. Empty without a basis.
        """
        regression, conditions = self.regression, self.conditions
        grams = np.stack([regression.products(s.control, s.control, self.means) for s in splits])
        effects = np.stack([regression.project(s.effect) for s in splits])
        given = (conditions, effects, grams, regression.n_components)
        regression.strength.fill_(choose_strength(*given))
        number = [
            (conditions.curves_per_context(conditions.label == label) > 0).sum()
            for label in range(len(conditions.labels))
        ]
        rows = np.flatnonzero(np.asarray(number)[conditions.label] > 2)
        if not len(rows) or self.n_folds < 2:
            self.share.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
            return
        asked = [conditions.ask(conditions.codes[i], conditions.dose[i]) for i in rows]
        context = conditions.context[rows]
        # of the strengths the best would look better than it is on the contexts that chose it
        fold = self.fold.cpu().numpy()
        nested = [choose_strength(*given, contexts=fold != number) for number in range(self.n_folds)]
        parts: list[tuple[NDArray, ...]] = []
        for split, gram in zip(splits, grams, strict=True):
            average, linear = (
                np.stack(
                    [
                        regression.weights(self.means, gram, a, int(c), gram[c], strengths[fold[c]])
                        for a, c in zip(asked, context, strict=True)
                    ]
                )
                for strengths in ([np.inf] * self.n_folds, nested)
            )
            closer = average @ split.control[conditions.context] - average.sum(1)[:, None] * split.control[context]
            bags = self._held_out(asked, context, split.bag)
            parts.append((split.effect[rows], average @ split.effect, linear @ split.effect, bags, closer))
        measured, mean, linear, bags, closer = (np.concatenate(part) for part in zip(*parts, strict=True))
        project = regression.project
        where = np.tile(context, len(splits))
        share = stack_shares(project(measured - mean), [project(p) for p in (linear - mean, bags, closer)], where)
        left = np.stack([measured, mean + share[0] * (linear - mean) + share[2] * closer])
        for number, basis in enumerate(bases):
            at = fold[where] == number
            left[:, at] -= left[:, at] @ basis @ basis.T
        # of what the basis does not span all is kept, unless less of it predicts better
        rest = 1.0 - float(stack_shares(left[0] - left[1], [-left[1]], where)[0]) if bases else 1.0
        self.share.copy_(torch.tensor([*share, rest]))

    def _held_out(self, asked: list[Asked], context: NDArray[np.int64], bag: Tensor) -> NDArray[np.float64]:
        """Deviation from the mean effect, by the members that did not see the context, ``(n, n_genes)``."""
        at = torch.as_tensor(context, device=bag.device)
        each = self.predict_bags(self.action_of(asked), bag[at])[0]
        unseen = self.left_out(at).to(each)
        weight = unseen / unseen.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("ne,neg->ng", weight, each).cpu().double().numpy()

    @torch.no_grad()
    def fit_posterior(self, table: ConditionTable) -> None:
        """Combine measured effects with what is expected of them without the cells they were measured in."""
        conditions, transfer, convergence = self.conditions, self._transfer, float(self.share[2])
        weights, rows = np.zeros((len(conditions), len(conditions))), []
        for context in np.unique(conditions.context):
            own, found = transfer.left_out(int(context))
            weights[own] = found
            rows.append(own)
        rows = np.concatenate(rows)
        expected = self.means.sums(weights)[0]
        if convergence > 0:
            alone = np.array([not transfer.knows(int(c)) for c in conditions.context])
            average = weights * alone[:, None]
            expected = expected - convergence * self.means.distances(average, conditions.context, self.means.control)
        expected = expected.double().cpu().numpy()
        mean, variance = fit_departures(table, expected, rows)
        effect = self.means.effect.double().cpu().numpy()
        posterior, measured = effect.copy(), self.means.sums(np.eye(len(conditions)))[1].double().cpu().numpy()
        posterior[rows], measured[rows] = (expected + mean)[rows], variance[rows]
        set_buffer(self, "posterior", posterior)
        set_buffer(self, "posterior_variance", measured)

    def keep_bags(self, bag: Tensor, has_bag: Tensor) -> None:
        """Describe the training contexts by some of their control cells."""
        set_buffer(self, "bag", bag)
        set_buffer(self, "has_bag", has_bag)
