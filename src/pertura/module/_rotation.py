r"""Shifts turned to where they are sparse.

With a normal prior of the basal state, :math:`z R` and shifts :math:`S R` under a decoder that turns them back are the same model for
every orthogonal R, up to the prior of the mask. Training does not find the R under which few entries of the shifts are needed: each
mask alone gains next to nothing. So the shifts are rotated once, by :func:`~pertura.nn.quartimax`, and training goes on from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pertura.nn._rotation import quartimax

if TYPE_CHECKING:
    from ._samsvae import SAMSVAE

_AT, _THRESHOLD, _LOGIT = 1 / 3, 0.4, 2.0


class RotatedShiftsMixin:
    """Rotates the shifts of :class:`SAMSVAE` once, after a third of the first training.

    Attributes
    ----------
    rotate_shifts
        Whether to; only sparse effects with a mean-field guide and without pairwise terms are.
    rotated
        Whether it was done, 0 or 1.
    """

    def _prepare_rotation(self, wanted: bool) -> None:
        self.rotate_shifts, self._progress = wanted, 0.0
        self.register_buffer("rotated", torch.zeros(()))

    def _can_rotate(self: SAMSVAE) -> bool:
        plain = self.effect == "sparse" and self.effect_network is None and self.effect_interaction is None
        return self.rotate_shifts and plain and not bool(self.rotated)

    def on_step(self: SAMSVAE, progress: float) -> None:
        """Rotate when a third of the training is done."""
        before, self._progress = self._progress, progress
        if before < _AT <= progress and self._can_rotate():
            self.rotate()

    @torch.no_grad()
    def rotate(self: SAMSVAE) -> Tensor:
        """Rotate shifts, decoder and encoder, start masks at what is large then.

        Returns
        -------
        R, ``(n_latent, n_latent)``.
        """
        prior = self.effect_prior_mean()
        shifts = self.mask_logits.sigmoid() * (self.effect_loc + prior)
        r = torch.as_tensor(quartimax(shifts.cpu().numpy())).to(shifts)
        shifts = shifts @ r
        if self.effect_features is not None:
            self.effect_features.weight.copy_(r.T @ self.effect_features.weight)
        self.effect_loc.copy_(shifts - prior @ r)
        self.effect_log_sd.copy_(0.5 * torch.log((2 * self.effect_log_sd).exp() @ r.square()))
        if self.effect_log_prior_sd.requires_grad:
            self.effect_log_prior_sd.copy_(0.5 * torch.log((2 * self.effect_log_prior_sd).exp() @ r.square()))
        large = shifts.abs() / (_THRESHOLD * shifts.abs().amax(1, keepdim=True)).clamp(min=1e-8)
        self.mask_logits.copy_((2 * _LOGIT * (large - 1.0)).clamp(-_LOGIT, _LOGIT))
        for layer, columns in self._shift_inputs():
            layer.weight[:, columns] = layer.weight[:, columns] @ r
        self._rotate_basal(r)
        self.rotated.fill_(1.0)
        return r

    def _shift_inputs(self: SAMSVAE) -> list[tuple[nn.Linear, slice]]:
        """Layers that see the shift, and where."""
        decoder = self.likelihood.linear if self.decoder is None else self.decoder.first[0]
        layers = [(decoder, self._shift_columns())]
        if isinstance(self.encoder.first[2], nn.Linear):
            layers.append((self.encoder.first[2], slice(0, self.n_shift)))
        return layers

    def _shift_columns(self: SAMSVAE) -> slice:
        """Where the decoder sees the shift."""
        return slice(0, self.n_shift)

    def _rotate_basal(self: SAMSVAE, r: Tensor) -> None:
        """The basal state shares its coordinates with the shift; its posterior stays diagonal."""
        self.basal_loc.weight.copy_(r.T @ self.basal_loc.weight)
        self.basal_loc.bias.copy_(r.T @ self.basal_loc.bias)
        head, share = self.basal_log_variance, r.square().T
        head.weight.copy_(share @ head.weight)
        head.bias.copy_(share @ head.bias)
