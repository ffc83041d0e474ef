"""Knock-outs in a structural-equation model, and cells that it makes up: the counterfactual steps of InfoSEM.

A cell keeps the noise of its genes but for the one that is knocked out, whose noise moves until its state is that of no expression. This
solves the equations of all other genes, and is what cutting the edges into the gene gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pertura.nn._sem import total_effect

from ._base import Action, Basal, Cells

if TYPE_CHECKING:
    from ._infosem import InfoSEM

_MAX_NETWORKS = 8  # drawn of a variational posterior for one prediction


class KnockOutMixin:
    """The steps of a counterfactual of :class:`pertura.module.InfoSEM`, draws taking the networks of the ensemble in turn."""

    def draw_globals(self: InfoSEM, n_samples: int) -> dict[str, Tensor]:
        """Networks, and which of them each draw has: those of the members in turn."""
        member = torch.arange(self.n_ensemble)
        if self.network_log_sd is not None:
            member = member.repeat(max(1, min(n_samples, _MAX_NETWORKS) // self.n_ensemble))
        weight = self.network_weight[member]
        if self.network_log_sd is not None:
            weight = weight + self.network_log_sd[member].exp() * torch.randn_like(weight)
        weight = self.network(weight, self.edge_logit[member] if hasattr(self, "edge_logit") else None)
        return {"member": member, "weight": weight, "total": total_effect(weight, self.regulators)}

    def abduct(self: InfoSEM, cells: Cells, n_samples: int, globals_: dict[str, Tensor]) -> Basal:
        """Noise z of a cell from q(z | x), that of a gene which was knocked out at its prior mean, and what f leaves over."""
        x = self.standardised(cells)
        z = torch.randn(n_samples, *x.shape, device=x.device)
        noise = torch.empty_like(z)
        for draws, network, member in self._networks(n_samples, globals_):
            weight = globals_["weight"][network]
            loc, sd = self.noise_posterior(x.clamp(-self.clip, self.clip)[None], weight, member)
            z[draws] = loc + sd * z[draws]
            found, scale = self._measured(self._state(z[draws], globals_["total"][network]), member)
            noise[draws] = (x - found) / scale
            z[draws] *= self.sign(member)
        position, present = self.targets(cells.action)
        if bool(present.any()):
            row, slot = present.nonzero(as_tuple=True)
            z[:, row, position[row, slot]] = 0.0
        return Basal(z, noise, cells.context, cells.batch, cells.library)

    def act(self: InfoSEM, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """Noise under do(g): that of the knocked-out genes moves until their state is that of no expression."""
        position, present = self.targets(action)
        if not bool(present.any()):
            return basal.z
        strength = (action.dose.clamp(max=1.0) * present).to(basal.z)
        batch = self._batch(basal.batch)
        rows = torch.arange(len(position), device=position.device)[:, None]
        zero = -(self.input_mean[batch] / self.input_scale)[rows, position].clamp(-self.clip, self.clip)
        z = basal.z.clone()
        for draws, network, member in self._networks(len(z), globals_):
            sign, total = self.sign(member), globals_["total"][network]
            level, _ = self.encoder(zero[None], member)
            state = self._state(z[draws] * sign, total)[:, rows, position]
            wanted = (strength * (level - state))[..., None]  # (n_draws, n_cells, order, 1)
            # a unit of z_g moves the state of g itself, and through others that of all genes
            response = self._response(position, present, total)
            shift = torch.linalg.solve(response.mT, wanted)[..., 0] * present
            z[draws] = z[draws].scatter_add(-1, position.expand_as(shift), sign * shift)
        return z

    def _response(self: InfoSEM, position: Tensor, present: Tensor, total: Tensor) -> Tensor:
        """Effects of the noise of knocked-out genes on their states, ``(n_cells, order, order)``, source first."""
        lookup = torch.full((self.n_genes,), -1, device=total.device)
        lookup[self.regulators] = torch.arange(len(self.regulators), device=total.device)
        row = lookup[position]
        effect = total[row.clamp(min=0)[:, :, None], position[:, None, :]] * (row >= 0)[:, :, None]
        both = present[:, :, None] & present[:, None, :]
        return effect * both + torch.eye(position.shape[1], device=total.device)

    def decode(self: InfoSEM, z: Tensor, basal: Basal) -> Tensor:
        """Expression, what f left over of the cell's own measurement added."""
        return self._decode(z, basal, self.draw_globals(len(z)))

    def express(self: InfoSEM, z: Tensor, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """As :meth:`decode`, with the networks of the draws."""
        return self._decode(z, basal, globals_)

    def _decode(self: InfoSEM, z: Tensor, basal: Basal, globals_: dict[str, Tensor]) -> Tensor:
        x = torch.empty_like(z)
        for draws, network, member in self._networks(len(z), globals_):
            state = self._state(z[draws] * self.sign(member), globals_["total"][network])
            loc, scale = self._measured(state, member)
            x[draws] = loc + scale * basal.noise[draws]
        return self._native(x, self.input_mean[self._batch(basal.batch)])

    def _native(self: InfoSEM, x: Tensor, mean: Tensor) -> Tensor:
        x = x * self.input_scale + mean
        return x.clamp(min=0.0) if self.native_scale == "log1p" else x

    def fresh_noise(self: InfoSEM, z: Tensor, basal: Basal) -> Tensor:
        """Noise of cells that were never measured."""
        return torch.randn_like(z)

    @torch.no_grad()
    def generate(self: InfoSEM, n_cells: int) -> Tensor:
        """Cells that were never measured, batch by batch alike, on the native scale, ``(n_cells, n_genes)``."""
        globals_ = self.draw_globals(n_cells)
        x = torch.randn(n_cells, 1, self.n_genes, device=self.input_mean.device)
        for draws, network, member in self._networks(n_cells, globals_):
            weight = globals_["weight"][network][None]
            if self.noise_mean is not None:
                loc = self.unregulated(self.noise_mean[member][:, None], weight)
                log_var = self.unregulated(self.noise_log_var[member][:, None], weight)
                x[draws] = loc + standard_deviation(log_var) * x[draws]
            loc, scale = self._measured(self._state(x[draws], globals_["total"][network]), member)
            x[draws] = loc + scale * torch.randn_like(loc)
        return self._native(x[:, 0], self.input_mean.mean(0))

    def targets(self: InfoSEM, action: Action) -> tuple[Tensor, Tensor]:
        """Positions of the genes that an action knocks out, and whether it is one, ``(n_cells, order)`` each."""
        position = self.knocked_out[action.codes.clamp(min=0)] if len(self.knocked_out) else action.codes * 0 - 1
        if action.features is not None:
            # genes outside the vocabulary are described by their position, counted from 1
            position = torch.where(action.codes < -1, action.features[..., 0].round().long() - 1, position)
        present = action.present & (position >= 0)
        return position.clamp(min=0), present

    def sign(self: InfoSEM, members: slice = slice(None)) -> Tensor:
        """1 where the state rises with expression, -1 where it falls, ``(n_members, 1, 1)``: the data can not tell."""
        ends = torch.tensor([[-1.0, 1.0]], device=self.input_mean.device).expand(len(self.residual_sd[members]), -1)
        mean, _ = self.encoder(ends, members)
        return torch.where(mean[:, 1] >= mean[:, 0], 1.0, -1.0)[:, None, None]

    def _networks(self: InfoSEM, n_draws: int, globals_: dict[str, Tensor]) -> list[tuple[Tensor, int, slice]]:
        """Draws of each network, its number, and the member it belongs to."""
        member = globals_["member"]
        draws = torch.arange(n_draws) % len(member)
        found = [((draws == i).nonzero()[:, 0], i, int(m)) for i, m in enumerate(member.tolist())]
        return [(d, i, slice(m, m + 1)) for d, i, m in found if len(d)]

    def _state(self: InfoSEM, z: Tensor, total: Tensor) -> Tensor:
        return z + z[..., self.regulators] @ total

    def _measured(self: InfoSEM, state: Tensor, member: slice) -> tuple[Tensor, Tensor]:
        """Mean and sd of expression given the state of draws of one member."""
        loc, sd = self.expression(state.reshape(1, -1), member)
        loc = loc.reshape(state.shape)
        return loc, sd.reshape(state.shape) if self.heteroscedastic else self.residual_sd[member][:, None]


def standard_deviation(log_var: Tensor) -> Tensor:
    """Of a log variance, within what float32 can hold."""
    return (0.5 * log_var.clamp(-10.0, 6.0)).exp()
