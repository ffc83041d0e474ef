"""Functions of one number that all genes share, as neural networks that are evaluated on a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
            out = self.exact(flat, members)
        else:
            out = self._interpolated(flat, members)
        return tuple(o.reshape(x.shape) for o in out.unbind(-1))

    def _interpolated(self, x: Tensor, members: slice) -> Tensor:
        if self.training:
            with torch.no_grad():
                low, high = x.aminmax()
                self.low.lerp_(low, 0.1)
                self.high.lerp_(high, 0.1)
        else:
            low, high = self.low, self.high
        step = (high - low).clamp(min=1e-6) / (self.n_grid - 1)
        grid = low + step * torch.arange(self.n_grid, device=x.device, dtype=x.dtype)
        curve = self.exact(grid.expand(len(x), -1), members)
        position = (x - low) / step
        # beyond the grid the curve goes on as a straight line
        left = position.detach().floor().clamp(0, self.n_grid - 2).nan_to_num()
        index = left.long()[..., None].expand(-1, -1, self.n_out)
        share = (position - left)[..., None]
        start, end = curve.gather(1, index), curve.gather(1, index + 1)
        return start + share * (end - start)
