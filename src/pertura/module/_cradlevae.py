r"""CRADLE-VAE: SAMS-VAE with a latent for technical artifacts and counterfactual reasoning (Baek et al. 2024).

With :math:`c_i` 1 for cells that failed quality control,

.. math::

    E_{tj} &\sim N(0, \sigma_j^2), \quad M_{tj} \sim \mathrm{Bernoulli}(\alpha), \quad A \sim N(0, I) \\
    z^b_i &\sim N(0, I), \quad z^p_i = \sum_t s_t(d_{it})\,(E_t \circ M_t) \\
    x_i &\sim p_\theta(x \mid \mathrm{dec}([z^b_i;\; z^p_i;\; c_i A]))

and a counterfactual loss, see :mod:`pertura.module._artifact`.

With ``effects="measured"`` perturbations act on genes as in :mod:`pertura.module._samsvae`, and :math:`z^p` explains these
effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pertura.data._constants import UNKNOWN

from ._artifact import Artifact, failed, infer_basal
from ._base import Action, Basal, Cells
from ._gene_effects import GeneEffects, explain_effects
from ._latent import Decoder, LatentModule, NormalEncoder, beside
from ._shifts import RotateOnce, SparseShifts, share_of_data


class CRADLEVAE(LatentModule):
    """Generative model and guide of CRADLE-VAE.

    Parameters
    ----------
    n_genes, n_perturbations, n_batch
        Sizes of the data.
    n_latent
        Dimension of the basal state, of the shifts and of the artifact.
    n_layers, n_encoder_layers, n_hidden
        Layers of decoder and encoder, and their width.
    likelihood, link_sharpness, normalize_input, rotate_shifts, effects, combinations
        As in :class:`SAMSVAE`; only the coordinates of the shifts are rotated, the basal state has its own.
    effect_lr_factor, artifact_lr_factor
        Learning rate of shifts and artifact in units of that of the neural networks.
    counterfactual_weight, class_balance, match_quality
        Of the artifact; see :class:`~pertura.module._artifact.Artifact`.
    **shift_options
        Of the shifts; see :class:`SparseShifts`.
    """

    no_weight_decay = {"shifts.", "artifact.", "likelihood.log_theta"}

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_batch: int = 1,
        *,
        n_latent: int = 30,
        n_layers: int = 0,
        n_encoder_layers: int = 1,
        n_hidden: int = 128,
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        normalize_input: bool = True,
        rotate_shifts: bool = True,
        effect_lr_factor: float = 5.0,
        artifact_lr_factor: float = 5.0,
        effects: Literal["measured", "latent"] = "latent",
        combinations: Sequence[Sequence[int]] = (),
        counterfactual_weight: float = 10.0,
        class_balance: bool = False,
        match_quality: bool = True,
        **shift_options: Any,
    ) -> None:
        super().__init__(n_genes, n_batch, normalize_input)
        self.n_latent = n_latent
        self.lr_factors = {"shifts.": effect_lr_factor, "artifact.": artifact_lr_factor}
        self.shifts = SparseShifts(n_perturbations, n_latent, n_hidden=n_hidden, **shift_options)
        self.artifact = Artifact(
            n_perturbations,
            n_genes,
            n_latent,
            combinations,
            counterfactual_weight=counterfactual_weight,
            class_balance=class_balance,
            match_quality=match_quality,
        )
        self.gene_effects: GeneEffects | None = None
        if effects == "measured":
            n_features = self.shifts.features.shape[1]
            self.gene_effects = GeneEffects(n_perturbations, n_genes, n_features, combinations)
        n_seen = [n_latent * (self.gene_effects is None), self.artifact.n_seen]
        self.encoder = NormalEncoder([n_genes, self.n_covariates, *n_seen], n_latent, n_hidden, n_encoder_layers)
        self.decoder = Decoder([3 * n_latent, self.n_covariates], n_hidden, n_layers)
        self.make_likelihood(likelihood, self.decoder.n_out, link_sharpness)
        self.rotation = RotateOnce(self.shifts, rotate_shifts)

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, its share of the global terms included."""
        with share_of_data(self, len(cells), kl_weight):
            artifact, table = self.artifact.prior(), self.shifts.prior()
        shift, offset = self.shifts(table, cells.action), 0.0
        if self.gene_effects is not None:
            noise = self.gene_effects.sample_noise()
            offset = self.gene_effects(cells.action.one, self.strength(cells.action.one), noise, cells.context)
            if self.training:
                with share_of_data(self, len(cells), 1.0):
                    explain_effects(self, table)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(cells.x.new_zeros(self.n_latent), 1.0).to_event(1))
            at_fault = failed(cells) * artifact
            pyro.deterministic("state", beside(z, shift, at_fault), event_dim=1)
            pyro.deterministic("basal", beside(z, torch.zeros_like(shift), at_fault), event_dim=1)
            moved = shift if self.gene_effects is None else torch.zeros_like(z)
            h = self.decoder(beside(z, moved, at_fault), self.one_hot_batch(cells.batch))
            with pyro.poutine.scale(scale=self.artifact.class_weight(cells)):
                pyro.sample("x", self.likelihood(h, cells.library, offset), obs=cells.x)

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(A) q(M) q(E | M) q(z | x, shift, artifact), and in training the counterfactual loss."""
        with share_of_data(self, len(cells), kl_weight):
            artifact, table = self.artifact.guide(), self.shifts.guide()
        shift, effect = self.shifts(table, cells.action) if self.gene_effects is None else None, 0.0
        if self.gene_effects is not None:
            self.gene_effects.sample_noise()
            effect = (
                self.gene_effects.delta(cells.action, self.strength(cells.action), cells.context) / self.input_scale
            )
        infer_basal(self, cells, artifact, shift, effect, kl_weight)

    def strength(self, action: Action) -> Tensor:
        """Dose response of each member; of those outside the vocabulary, their dose."""
        return self.shifts.strength(action) + action.dose * (action.codes == UNKNOWN)

    def on_genes(self, shift: Tensor) -> Tensor:
        """What a latent shift adds to the activation of each gene, ``(..., n_genes)``."""
        zero = torch.zeros_like(shift)
        one_hot = self.one_hot_batch(torch.zeros(1, dtype=torch.long, device=shift.device))
        moved, start = (self.decoder(beside(zero, s, zero), one_hot) for s in (shift, zero[..., :1, :]))
        return self.likelihood.linear(moved) - self.likelihood.linear(start)

    def activation(self, basal: Basal) -> Tensor:
        """Activations of genes without any perturbation or artifact, ``(n_draws, n_cells, n_genes)``."""
        z = basal.state[..., : self.n_latent]
        h = self.decoder(beside(z, torch.zeros_like(z), torch.zeros_like(z)), self.one_hot_batch(basal.cells.batch))
        return self.likelihood.linear(h)

    def on_step(self, progress: float) -> None:
        """Rotate the shifts once, a third of the first training being done."""
        r = self.rotation.due(progress)
        if r is None:
            return
        self.shifts.rotate(r)
        k = self.n_latent
        self.rotation.turn(self.decoder.input_layer(self.likelihood), slice(k, 2 * k), r)
        if self.gene_effects is None:
            self.rotation.turn(self.encoder.hidden.first[2], slice(0, k), r)
