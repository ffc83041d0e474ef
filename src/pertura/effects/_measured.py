"""Measured effects of perturbations and of measured combinations, with what is not known of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pertura.data._constants import CONTROL_ONLY, UNKNOWN

from ._kernels import fill_missing, fit_kernels
from ._shrink import Halves, shrink
from ._table import ConditionTable

Matrix = NDArray[np.float64]


class MeasuredEffect(nn.Module):
    r"""Normal posterior of the effects of perturbations, on the scale on which they were measured.

    Rows are the single perturbations, then the measured combinations. With :math:`m, s` the mean and sd of a row and :math:`d`
    the dose response of the members,

    * a measured combination at doses of response 1 has its own row; in between, :math:`t = \min_i \min(d_i, 1)` of its own row
      and :math:`d_i - t` of its members';
    * any other combination is the sum of its members, :math:`\sum_i d_i (m_i + s_i \epsilon_i)`, and in proportion to
      :math:`t`, what measured combinations differ from such sums, :math:`\tau \epsilon`;
    * a perturbation outside the vocabulary (code -2) has the effect of its features, with an error of its own.

    Each row has noise :math:`\epsilon` of its own.

    Parameters
    ----------
    n_perturbations, n_genes
        Sizes.
    combinations
        Codes of the members of measured combinations, ascending; the lengths may differ.
    n_features
        Width of the features of perturbations; 0: none.

    Attributes
    ----------
    mean, sd
        ``(n_perturbations + n_combinations, n_genes)``.
    measured
        Whether anything was measured of a row; the sd of the others is that of perturbations at large, their mean 0.
    combinations
        Members of the measured combinations, padded with -1, ``(n_combinations, order)``.
    tau
        Sd of what combinations differ from the sum of their members, ``(n_genes,)``; 0 where no combination was measured.
    intercept, feature_weight, unseen_sd
        Effect of an unseen perturbation with features f: ``intercept + f @ feature_weight``, and the sd of its error.
    feature_center, feature_block
        What stands for features that are missing; see :func:`~pertura.effects.fill_missing`.
    """

    def __init__(
        self, n_perturbations: int, n_genes: int, combinations: Sequence[Sequence[int]] = (), n_features: int = 0
    ) -> None:
        super().__init__()
        n_rows, order = n_perturbations + len(combinations), max([1, *map(len, combinations)])
        padded = [[*sorted(c), *[CONTROL_ONLY] * (order - len(c))] for c in combinations]
        self.n_perturbations = n_perturbations
        self.register_buffer("mean", torch.zeros(n_rows, n_genes))
        self.register_buffer("sd", torch.zeros(n_rows, n_genes))
        self.register_buffer("measured", torch.zeros(n_rows, dtype=torch.bool))
        self.register_buffer("combinations", torch.tensor(padded, dtype=torch.long).reshape(len(padded), order))
        self.register_buffer("tau", torch.zeros(n_genes))
        self.register_buffer("intercept", torch.zeros(n_genes))
        self.register_buffer("feature_weight", torch.zeros(n_features, n_genes))
        self.register_buffer("feature_center", torch.zeros(n_features))
        self.register_buffer("feature_block", torch.zeros(n_features, dtype=torch.long))
        self.register_buffer("unseen_sd", torch.zeros(n_genes))

    def offset(
        self,
        codes: Tensor,
        dose_strength: Tensor,
        noise: Callable[[Tensor], Tensor] | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Effect on each cell.

        Parameters
        ----------
        codes
            Component codes, ``(n_cells, order)``: -1 for empty slots, -2 for perturbations outside the vocabulary.
        dose_strength
            Dose response of the members, 1 at the dose at which rows hold, of the shape of `codes`.
        noise
            Function that gives standard normal noise ``(..., n, n_genes)`` of the rows with the numbers ``(n,)``; the two
            rows after those of :attr:`mean` are unmeasured combinations and unseen perturbations. `None`: the mean.
        features
            Features of the members, ``(n_cells, order, n_features)``; only those of code -2 are read.

        Returns
        -------
        ``(..., n_cells, n_genes)``.
        """
        cell, row, weight = self._entries(codes, dose_strength)
        # cells have few of many perturbations
        used, which = torch.unique(row, return_inverse=True)
        table = self._rows(used, noise).index_select(-2, which)  # several times as fast as brackets
        if not bool((weight == 1.0).all()):
            table = weight[:, None] * table
        result = table.new_zeros(*table.shape[:-2], len(codes), table.shape[-1]).index_add_(-2, cell, table)
        if bool((codes == UNKNOWN).any()):
            strength = dose_strength * (codes == UNKNOWN)
            result = result + strength.sum(-1, keepdim=True) * self.intercept
            if features is not None and self.feature_weight.shape[0]:
                features = fill_missing(features, self.feature_center, self.feature_block)
                result = result + (strength[..., None] * features).sum(-2) @ self.feature_weight
        return result

    def _rows(self, rows: Tensor, noise: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Effects of some rows, ``(..., n, n_genes)``; `rows` increase, and the last may be those after the rows of :attr:`mean`."""
        n_rows = len(self.mean)
        own = rows if not len(rows) or rows[-1] < n_rows else rows[rows < n_rows]
        mean, more = self.mean.index_select(0, own), rows[len(own) :] - n_rows
        if len(more):
            mean = torch.cat([mean, mean.new_zeros(len(more), mean.shape[1])])
        if noise is None or not len(rows):
            return mean
        sd = self.sd.index_select(0, own)
        if len(more):
            sd = torch.cat([sd, torch.stack([self.tau, self.unseen_sd])[more]])
        return torch.addcmul(mean, sd, noise(rows))

    def variance(self, codes: Tensor, dose_strength: Tensor) -> Tensor:
        """Variance of the effect on each cell, ``(n_cells, n_genes)``."""
        weight, unmeasured, unseen = self.weights(codes, dose_strength)
        result = weight.square() @ self.sd.square() + (unmeasured[:, None] * self.tau).square()
        return result + (unseen[:, None] * self.unseen_sd).square()

    def weights(self, codes: Tensor, dose_strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How much of each row, of `tau` and of `unseen_sd` the effect on each cell has.

        Returns
        -------
        ``(n_cells, n_rows)`` and twice ``(n_cells,)``.
        """
        cell, row, weight = self._entries(codes, dose_strength)
        every = self.mean.new_zeros(len(codes), len(self.mean) + 2).index_put((cell, row), weight)
        return every[:, :-2], every[:, -2], every[:, -1]

    def _entries(self, codes: Tensor, dose_strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights that are not 0: cell, row and weight; `tau` and `unseen_sd` are the rows after those of :attr:`mean`."""
        strength = (dose_strength * (codes != CONTROL_ONLY)).to(self.mean)
        if codes.shape[1] == 1:  # there are no combinations
            cell = torch.where(strength[:, 0] != 0)[0]
            row, weight = codes[cell, 0], strength[cell, 0]
            unseen = row == UNKNOWN
            return cell, torch.where(unseen, len(self.mean) + 1, row), torch.where(unseen, weight.abs(), weight)
        present = (codes != CONTROL_ONLY) & (strength > 0)
        own = strength.masked_fill(~present, torch.inf).amin(-1).clamp(max=1.0)
        own = torch.where(present.sum(-1) > 1, own, 0.0)
        # cells have few distinct combinations
        kinds, which = torch.unique(torch.where(present, codes, CONTROL_ONLY), dim=0, return_inverse=True)
        rows_of_kinds = [self._row(kind) for kind in kinds.tolist()]
        combined = torch.tensor(rows_of_kinds, dtype=torch.long, device=codes.device)[which]
        at, n_rows = torch.where(combined >= 0)[0], len(self.mean)
        members = self.combinations[combined[at] - self.n_perturbations]
        unseen = torch.linalg.vector_norm(strength * (codes == UNKNOWN), dim=-1)
        special = own.new_tensor([n_rows, n_rows + 1], dtype=torch.long).expand(len(codes), -1)
        every = torch.arange(len(codes), device=codes.device)[:, None]
        parts = [
            (every.expand_as(codes), codes, strength * (codes >= 0)),
            (at[:, None].expand_as(members), members, -own[at, None] * (members >= 0)),
            (at, combined[at], own[at]),
            (every.expand_as(special), special, torch.stack([torch.where(combined < 0, own, 0.0), unseen], 1)),
        ]
        cell, row, weight = (torch.cat([values.reshape(-1) for values in part]) for part in zip(*parts, strict=True))
        key, place = torch.unique(cell * (n_rows + 2) + row.clamp(min=0), return_inverse=True)
        weight = weight.new_zeros(len(key)).index_add(0, place, weight)
        there = weight != 0
        return key[there] // (n_rows + 2), key[there] % (n_rows + 2), weight[there]

    def _row(self, codes: Sequence[int]) -> int:
        """Row of a measured combination, -1 where it is none."""
        return self._lookup().get(tuple(sorted(c for c in codes if c != CONTROL_ONLY)), -1)

    def _lookup(self) -> dict[tuple[int, ...], int]:
        if getattr(self, "_rows_of", None) is None or len(self._rows_of) != len(self.combinations):
            lines = self.combinations.tolist()
            self._rows_of = {tuple(c for c in c_ if c >= 0): self.n_perturbations + i for i, c_ in enumerate(lines)}
        return self._rows_of

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # the number of measured combinations and features is that of the saved ones
        for name, value in self._buffers.items():
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=value.device))
        self._rows_of = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def fit_departures(
    table: ConditionTable, expected: Matrix, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Posterior of what effects differ from those that are expected without them, by what was measured.

    How far expected effects are off, by gene and along the programs of the cells, is learned from the conditions that were measured
    well (:func:`~pertura.effects.shrink`): the fewer cells, the nearer a posterior is to 0.

    Parameters
    ----------
    table
        What was measured.
    expected
        Effects of the treated conditions that have controls, in the order of the table, ``(n_conditions, n_genes)``.
    rows
        Conditions whose effects are expected to be anything; the posterior of the others is 0, with variance 0.

    Returns
    -------
    Mean and variance, ``(n_conditions, n_genes)`` each.
    """
    kept = np.flatnonzero(table.has_control[table.context[table.treated]])
    mean, variance = np.zeros(expected.shape), np.zeros(expected.shape)
    if not len(rows):
        return mean, variance
    own, *parts = (table.effects(half=half) for half in (None, 0, 1))
    halves = Halves(own.effect[kept], own.noise[kept], [(part.effect[kept], part.noise[kept]) for part in parts])
    halves = halves.standardized(rows, expected[rows], table.spread)
    found = shrink(halves, table.programs())
    mean[rows] = found.mean * table.spread
    # genes vary more in some conditions than at large: by that the measured part of the posterior is wider
    noise = halves.noise[:, None]
    wider = (own.se[kept][rows] / table.spread) ** 2 / noise - 1.0
    gain = np.minimum(found.sd**2 / noise, 1.0)
    variance[rows] = (found.sd * table.spread) ** 2 * (1.0 + gain * wider)
    # conditions of a context share their controls: the noise of these may be in what is expected, too, and pass for an effect
    of_controls = own.noise[kept][rows] - 1.0 / table.n[table.treated[kept][rows]].sum(1)
    variance[rows] += (1.0 - gain) * np.maximum(of_controls, 0.0)[:, None] * table.spread**2
    return mean, variance


def fit_measured(
    table: ConditionTable,
    n_perturbations: int,
    *,
    combinations: Sequence[Sequence[int]] | None = None,
    strength: Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray] | None = None,
    features: NDArray | None = None,
    feature_blocks: Sequence[slice] | None = None,
    left_out: Sequence[int] = (),
) -> MeasuredEffect:
    """Effects of all perturbations and measured combinations, shrunk by :func:`~pertura.effects.shrink`.

    Conditions of one perturbation in several contexts and doses are averaged by precision. The effects of a combination have as
    prior the sum of its members' posteriors, widened by what combinations differ from such sums; the measured effect then says
    what it can. So a measured combination is never less certain than the measurement, nor than the sum.

    Parameters
    ----------
    table
        What was measured.
    n_perturbations
        Number of single perturbations.
    combinations
        Codes of the members of the combinations to have rows; by default those that were measured.
    strength
        Dose response: a function of codes and registered doses, both ``(n, order)``, that gives ``(n, order)``; 1 at the dose at
        which the rows hold. By default 1 at any dose.
    features
        Features of the perturbations, ``(n_perturbations, n_features)``, from which unseen ones are predicted; `None`: unseen
        ones have the mean effect.
    feature_blocks
        Columns of the features that belong together; see :func:`~pertura.effects.fit_kernels`.
    left_out
        Contexts that count as not measured.
    """
    members = table.members
    if combinations is None:
        combinations = sorted({m for m in members if len(m) > 1})
    combinations = [tuple(sorted(c)) for c in combinations]
    result = MeasuredEffect(
        n_perturbations, table.n_genes, combinations, 0 if features is None else np.shape(features)[1]
    )
    codes, dose = table.codes[table.treated], table.dose[table.treated]
    response = np.ones(codes.shape) if strength is None else np.asarray(strength(codes, dose), dtype=np.float64)
    # a combination has its own row as far as its weakest member goes
    response = np.where(codes >= 0, response, np.inf).min(1, initial=np.inf)
    response = np.where(np.isfinite(response), response, 1.0)
    lookup = {(code,): code for code in range(n_perturbations)}
    lookup |= {c: n_perturbations + i for i, c in enumerate(combinations)}
    which = np.array([lookup.get(m, -1) for m in members], dtype=np.int64)
    which[np.isin(table.context[table.treated], left_out)] = -1
    effects = table.pooled(which, len(result.mean), strength=response)
    if len(left_out):  # the priors are not chosen anew for what is used once
        effects = replace(effects, parts=())
    rows = np.flatnonzero(np.isfinite(effects.noise))
    unit, loadings = table.spread, table.programs()
    mean, variance = np.zeros(effects.effect.shape), np.zeros(effects.effect.shape)

    single = rows[rows < n_perturbations]
    if len(single):
        found = shrink(effects.standardized(single, 0.0, unit), loadings)
        prior_sd = found.prior_sd * unit
        variance[:n_perturbations] = prior_sd**2
        mean[single], variance[single] = found.mean * unit, (found.sd * unit) ** 2
    sums = np.zeros((len(combinations), n_perturbations))
    for i, combination in enumerate(combinations):
        sums[i, list(combination)] = 1.0
    expected, known = sums @ mean[:n_perturbations], sums @ variance[:n_perturbations]
    tau = np.zeros(table.n_genes)
    paired = rows[rows >= n_perturbations]
    if len(paired):
        at = paired - n_perturbations
        found = shrink(effects.standardized(paired, expected[at], unit), loadings, known[at] / unit**2)
        tau = found.prior_sd * unit
    mean[n_perturbations:], variance[n_perturbations:] = expected, known + tau**2
    if len(paired):
        mean[paired] = expected[at] + found.mean * unit
        variance[paired] = np.minimum((found.sd * unit) ** 2, known[at] + tau**2)
    if len(single):
        described = np.zeros((len(single), 0)) if features is None else np.asarray(features)[single]
        unseen = fit_kernels(described, effects.effect[single], feature_blocks, noise=effects.noise[single], unit=unit)
        result.intercept.copy_(torch.as_tensor(unseen.intercept))
        result.feature_weight.copy_(torch.as_tensor(unseen.weight))
        result.feature_center.copy_(torch.as_tensor(unseen.center))
        result.feature_block.copy_(torch.as_tensor(unseen.block))
        # one perturbation does not say how much others differ from it
        result.unseen_sd.copy_(torch.as_tensor(unseen.sd if len(single) > 1 else prior_sd))
    result.mean.copy_(torch.as_tensor(mean))
    result.sd.copy_(torch.as_tensor(np.sqrt(variance)))
    result.measured[torch.as_tensor(rows)] = True
    result.tau.copy_(torch.as_tensor(tau))
    return result
