"""Functions of one number that all genes share, as neural networks that are evaluated on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScalarMLP(nn.Module):
    r"""An ensemble of multilayer perceptrons :math:`\mathbb{R} \to \mathbb{R}^k`, each applied to every gene of every cell.

    A function of one number is a curve. For more than `n_grid` inputs it is evaluated on an equidistant grid over their range
    and interpolated linearly: cost then hardly grows with cells and genes, where it grew with cells x genes x units². The
    error is that of the interpolation, :math:`\Delta^2 |f''| / 8` with grid spacing :math:`\Delta`; gradients flow to inputs
    and parameters.

    Parameters
    ----------
    n_members
        Members of the ensemble.
    hidden
        Widths of the hidden layers (tanh).
    n_out
        Outputs.
    n_grid
        Points of the grid; 0 evaluates every input exactly.
    """

    def __init__(self, n_members: int, hidden: Sequence[int], n_out: int, n_grid: int = 512) -> None:
        super().__init__()
        self.n_out, self.n_grid = n_out, n_grid
        widths = [1, *hidden, n_out]
        weights = [torch.empty(n_members, i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        for weight in weights:
            for member in weight:
                nn.init.xavier_normal_(member)
        self.weights = nn.ParameterList(nn.Parameter(w) for w in weights)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n_members, 1, o)) for o in widths[1:])
        # range of the inputs in training, over which the grid is laid afterwards
        self.register_buffer("low", torch.tensor(-5.0))
        self.register_buffer("high", torch.tensor(5.0))

    def exact(self, x: Tensor, members: slice = slice(None)) -> Tensor:
        """Outputs without interpolation, ``(n_members, n, n_out)`` for ``(n_members, n)``."""
        h = x[..., None]
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias[members], h, weight[members])
            h = h if i == last else torch.tanh(h)
        return h

    def forward(self, x: Tensor, members: slice = slice(None)) -> tuple[Tensor, ...]:
        """Outputs for inputs ``(n_members, ...)``, each of the same shape.

        Parameters
        ----------
        x
            Inputs; the first dimension is the member.
        members
            Members that are asked.
        """
        flat = x.reshape(len(x), -1)
        if self.n_grid == 0 or (self.training and flat.shape[1] <= 2 * self.n_grid):
            out = self.exact(flat, members).unbind(-1)
        else:
            out = self._interpolated(flat, members)
        return tuple(o.reshape(x.shape) for o in out)

    def _interpolated(self, x: Tensor, members: slice) -> tuple[Tensor, ...]:
        if self.training:
            with torch.no_grad():
                low, high = x.aminmax()
                self.low.lerp_(low, 0.1)
                self.high.lerp_(high, 0.1)
        else:
            low, high = self.low, self.high
        step = (high - low).clamp(min=1e-6) / (self.n_grid - 1)
        grid = low + step * torch.arange(self.n_grid, device=x.device, dtype=x.dtype)
        return _Interpolated.apply(x, self.exact(grid.expand(len(x), -1), members), low, step)


class _Interpolated(torch.autograd.Function):
    """Values of curves at `x`, ``(n_members, n)`` each, linear between the points of a grid and beyond them.

    Written out with its gradient, as this is most of what encoder and decoder cost: each pass over cells and genes counts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Tensor, low: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """`curve` has the points of the grid, ``(n_members, n_grid, n_out)``."""
        n_grid = curve.shape[1]
        share = (x - low).div_(step)
        left = share.floor().clamp_(0, n_grid - 2).nan_to_num_()
        share -= left
        index = left.long()
        index += n_grid * torch.arange(len(x), device=x.device)[:, None]
        starts, slopes = (c.flatten(0, 1).unbind(-1) for c in (curve, F.pad(curve.diff(dim=1), (0, 0, 0, 1))))
        slopes = [slope.take(index) for slope in slopes]
        ctx.shape = curve.shape
        ctx.save_for_backward(index, share, step, *slopes)
        return tuple(torch.addcmul(start.take(index), share, s) for start, s in zip(starts, slopes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the inputs and of the points of the grid."""
        index, share, step, *slopes = ctx.saved_tensors
        of_x, points = None, []
        for gradient, slope in zip(gradients, slopes, strict=True):
            of_x = gradient * slope if of_x is None else of_x.addcmul_(gradient, slope)
            both, right = (
                gradient.new_zeros(ctx.shape[0] * ctx.shape[1]).scatter_add_(0, index.flatten(), g.flatten())
                for g in (gradient, gradient * share)
            )
            points.append(both - right + right.roll(1))
        return of_x.div_(step), torch.stack(points, -1).view(ctx.shape), None, None
