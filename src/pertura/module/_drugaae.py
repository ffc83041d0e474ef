r"""DrugAAE: an adversarial autoencoder of cells under drugs (after Park, Song and Jang).

.. math::

    E            &= E_0 + \textstyle\sum_l \gamma_l \hat A^l E_0                    &&\text{genes: control expression, network} \\
    v_d          &= g \odot s_d + (1 - g) \odot t_d                                  &&\text{drug: signature, text} \\
    \delta_d(u)  &= u^{n_d} (1 + k_d^{n_d}) / (u^{n_d} + k_d^{n_d})                  &&\text{dose, in units of the highest} \\
    z_b          &\sim N(0, I)                                                        &&\text{basal state} \\
    z            &= z_b + \textstyle\sum_d \delta_d(u_d)\, (I + B_c)\, v_d            &&\text{perturbed state} \\
    x_g          &\sim p\big(x \mid \langle q(z), E_g \rangle + b_g + (V a)_g\big), \quad a = \textstyle\sum_d \delta_d(u_d)\, a_{dc}

:math:`a_{dc}` are coordinates, in a basis V of few components, of the effect of d in context c: as measured where d was trained,
from its description in closed form (:class:`pertura.nn.DescriptionRidge`) where it was not. The paper has no such term. The
guide is :math:`q(z_b \mid x - V a)`, one network tied to E. A discriminator that only the training plan moves tries to tell the
perturbation from :math:`z_b`; the guide is trained to make that impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertura.nn._descriptions import DescriptionEncoder, contrast
from pertura.nn._likelihoods import CountLikelihood, GaussianLikelihood
from pertura.nn._mlp import MLP
from pertura.nn._propagation import GeneEmbedding

from ._base import Action, Basal, Cells, PerturbationModule

_CLIP = 5.0  # of signatures, in units of their standard deviation


class GeneDecoder(nn.Module):
    r"""Last layer of the decoder, :math:`\langle q, E_g \rangle + b_g` plus what is added to genes."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_genes))

    def forward(self, h: Tensor) -> Tensor:
        """`h` is what stands before the bias."""
        return h + self.bias


class DrugAAE(PerturbationModule):
    r"""Generative model, guide and discriminator of DrugAAE.

    Parameters
    ----------
    n_genes, n_perturbations, n_contexts, n_batch
        Sizes of the data.
    n_text
        Number of text features of a perturbation.
    signatures
        For each signature among the features, the gene of each of its columns (-1: none of the model's).
    n_state
        Dimension of :math:`z_b` and :math:`v_d`.
    n_gene_embedding
        Width of E.
    n_effect_components
        Columns of V; 0: no closed-form term.
    encoder_hidden, decoder_hidden, discriminator_hidden
        Widths of the layers.
    interaction_rank
        Rank of :math:`B_c`.
    likelihood, link_sharpness
        As in :class:`~pertura.module.PertVAE`.
    network
        Whether E is propagated over a network.
    free_encoder
        Whether the first layer has weights beside those tied to E.
    adversary_weight, contrast_weight, counterfactual_weight
        Weights of the adversary, of the agreement of both branches, and of the effects that controls are predicted to have.
    modality_dropout
        Probability with which the signature, or the text, of a perturbation is taken away in training.
    dropout_rate
        In encoder and discriminator.
    """

    no_weight_decay = {"likelihood.log_theta", "genes.step_logits"}
    discriminator_parameters = ("discriminator.",)

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_contexts: int = 1,
        n_batch: int = 1,
        *,
        n_text: int = 0,
        signatures: Sequence[Sequence[int]] = (),
        n_state: int = 24,
        n_gene_embedding: int = 32,
        n_effect_components: int = 100,
        encoder_hidden: Sequence[int] = (128,),
        decoder_hidden: Sequence[int] = (),
        discriminator_hidden: Sequence[int] = (64, 64),
        interaction_rank: int = 4,
        likelihood: Literal["nb", "normal"] = "nb",
        link_sharpness: float = 3.0,
        network: bool = False,
        free_encoder: bool = True,
        adversary_weight: float = 5.0,
        contrast_weight: float = 0.1,
        counterfactual_weight: float = 1.0,
        modality_dropout: float = 0.3,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_genes, self.n_batch, self.n_contexts, self.n_text = n_genes, n_batch, n_contexts, n_text
        self.n_state, self.n_effect = n_state, n_effect_components
        self.n_latent = n_state + n_effect_components
        self.adversary_weight, self.contrast_weight = adversary_weight, contrast_weight
        self.counterfactual_weight, self.modality_dropout = counterfactual_weight, modality_dropout
        self.honest = False  # whether trained perturbations are predicted as if they had been left out
        self.adversary_share = 0.0  # of the full weight; the training plan raises it
        self.signature_genes = [torch.as_tensor(list(g), dtype=torch.long) for g in signatures]
        n_features = n_text + sum(map(len, signatures))

        self.genes = GeneEmbedding(n_genes, n_gene_embedding, network=network)
        n_covariates = n_batch if n_batch > 1 else 0
        self.encoder_tied = nn.Linear(n_gene_embedding, encoder_hidden[0] if encoder_hidden else n_state, bias=False)
        width = self.encoder_tied.out_features
        self.encoder_free = nn.Parameter(0.1 * torch.randn(n_genes, width)) if free_encoder else None
        self.encoder_norm = nn.LayerNorm(width)
        self.encoder = MLP(width + n_covariates, encoder_hidden, dropout_rate=dropout_rate)
        self.encoder_out = nn.Linear(self.encoder.n_out, 2 * n_state)
        self.decoder = MLP(n_state + n_covariates, decoder_hidden)
        self.decoder_out = nn.Linear(self.decoder.n_out, n_gene_embedding, bias=False)
        if likelihood == "nb":
            self.likelihood = CountLikelihood(1, n_genes, link_sharpness)
            self.likelihood.activation = GeneDecoder(n_genes)
        else:
            self.likelihood = GaussianLikelihood(1, n_genes)
            self.likelihood.loc = GeneDecoder(n_genes)
        self.native_scale = self.likelihood.native_scale

        self.drugs = DescriptionEncoder(n_gene_embedding, n_text, n_state)
        self.dose_head = nn.Linear(n_state, 2)  # log k and log n
        nn.init.zeros_(self.dose_head.weight)
        nn.init.zeros_(self.dose_head.bias)
        rank = interaction_rank if n_contexts > 1 else 0
        if rank:
            self.interaction_in = nn.Parameter(torch.randn(n_state, rank) / n_state**0.5)
            self.interaction_out = nn.Parameter(torch.randn(rank, n_state) / rank**0.5)
            self.interaction_context = nn.Parameter(torch.zeros(n_contexts, rank))
        self.interaction_rank = rank
        self.discriminator = nn.Sequential(
            MLP(n_state, discriminator_hidden, dropout_rate=dropout_rate),
            nn.Linear(discriminator_hidden[-1] if discriminator_hidden else n_state, n_perturbations + 1),
        )

        self.register_buffer("features", torch.zeros(n_perturbations, n_features))
        self.register_buffer("observed", torch.zeros(n_perturbations, dtype=torch.bool))
        self.register_buffer("own_signature", torch.zeros(n_perturbations, n_genes))
        self.register_buffer("basis", torch.zeros(n_genes, n_effect_components))
        self.register_buffer("effects", torch.zeros(n_perturbations, n_contexts, n_effect_components))
        self.register_buffer("left_out", torch.zeros(n_perturbations, n_effect_components))
        self.register_buffer("common", torch.zeros(n_contexts + 1, n_effect_components))
        self.register_buffer("from_features", torch.zeros(n_features, n_effect_components))
        self.register_buffer("from_nothing", torch.zeros(n_effect_components))
        self.register_buffer("network_share", torch.ones(2))  # of v, for perturbations that were not trained and were
        self.register_buffer("class_share", torch.ones(n_perturbations + 1))
        self.register_buffer("hidden_from", torch.zeros(n_perturbations, dtype=torch.bool))
        self.register_buffer("input_mean", torch.zeros(n_genes))
        self.register_buffer("input_scale", torch.ones(n_genes))
        self.register_buffer("effect_sd", torch.ones(n_genes))
        self.register_buffer("signature_scale", torch.ones(n_genes))

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch."""
        embedding, drugs = self.genes(), self.describe(cells.action, cells.context)
        n = len(cells)
        with pyro.plate("cells", n), pyro.poutine.scale(scale=kl_weight):
            basal = pyro.sample("z", dist.Normal(cells.x.new_zeros(self.n_state), 1.0).to_event(1))
        with pyro.plate("expression", n):
            h = self._to_genes(self.perturb(basal, drugs), cells.batch, embedding)
            pyro.sample("x", self.likelihood(h, cells.library), obs=cells.x)
        if not self.training:
            return
        if self.contrast_weight > 0 and self.n_text:
            pyro.factor("contrast", -self.contrast_weight * n * self._agreement(cells.action, embedding))
        if self.counterfactual_weight > 0:
            pyro.factor(
                "counterfactual", -self.counterfactual_weight * self._effect_error(basal, drugs, cells, embedding)
            )
        if self.adversary_weight * self.adversary_share > 0:
            weight = self.adversary_weight * self.adversary_share
            pyro.factor("adversary", -weight * self.recognised(self.encode(cells, drugs[1])[0]).sum())

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(z_b | x), the closed-form part of the cell's own effect taken away from x."""
        loc, scale = self.encode(cells, self.describe(cells.action, cells.context)[1])
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def encode(self, cells: Cells, effect: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of the guide, ``(n_cells, n_state)``."""
        x = (self.normalised(cells.x) - effect @ self.basis.mT - self.input_mean) / self.input_scale
        weights = self.encoder_tied(self.genes())
        if self.encoder_free is not None:
            weights = weights + self.encoder_free
        h = self.encoder_norm(x @ weights / self.n_genes**0.5)
        loc, log_scale = self.encoder_out(self.encoder(self._with_batch(h, cells.batch))).chunk(2, -1)
        return loc, log_scale.clamp(-6.0, 2.0).exp()

    def normalised(self, x: Tensor) -> Tensor:
        """Counts as log1p of counts per 10,000; other values as they are."""
        if self.native_scale != "counts":
            return x
        return torch.log1p(1e4 * x / x.sum(-1, keepdim=True).clamp(min=1.0))

    # -- perturbations ----------------------------------------------------------------------------------------------

    def describe(self, action: Action, context: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over components: shift of the state ``(n, n_state)`` and coordinates of the effect ``(n, n_effect)``."""
        embedding = self.genes()
        code, known = action.codes.clamp(min=0), action.codes >= 0
        own = known & self.observed[code]
        if self.training and self.features.shape[1]:
            # half of the time a perturbation is treated as if it had never been measured
            lot = torch.rand(len(self.observed), device=code.device) < 0.5
            own = own & ~lot[code]
        features = self.features[code] * known[..., None]
        if action.features is not None:
            features = torch.where(known[..., None], features, action.features)
        v = self.vector(features, self._own_signature(code, known), embedding)
        v = v * torch.where(own, self.network_share[1], self.network_share[0])[..., None]
        if self.training:
            v = torch.where((own | ~self.hidden_from[code])[..., None], v, torch.zeros_like(v))
        log_k, log_n = (0.5 * self.dose_head(v).tanh() * 4).unbind(-1)
        strength = hill(action.dose, log_k, log_n * 0.5) * (action.codes != -1)
        moved = v
        if self.interaction_rank:
            inside = (context < self.n_contexts)[:, None]
            c = self.interaction_context[context.clamp(max=self.n_contexts - 1)] * inside
            moved = v + ((v @ self.interaction_in) * c[:, None]) @ self.interaction_out
        shift = (strength[..., None] * moved).sum(-2)
        place = context.clamp(max=self.n_contexts)[:, None].expand_as(code)
        inner = place.clamp(max=self.n_contexts - 1)
        measured = (
            torch.where((place < self.n_contexts)[..., None], self.effects[code, inner], self.effects[code].mean(2))
            if self.n_effect
            else features.new_zeros(*code.shape, 0)
        )
        told = features @ self.from_features + self.from_nothing
        if self.training or self.honest:
            told = torch.where(self.observed[code][..., None], self.left_out[code], told)
        effect = torch.where(own[..., None], measured, told + self.common[place])
        return shift, (strength[..., None] * effect).sum(-2)

    def vector(self, features: Tensor, own_signature: Tensor | None, embedding: Tensor) -> Tensor:
        """Vectors v of perturbations with the given features, ``(..., n_state)``."""
        signature, text = self._signature(features, own_signature), features[..., : self.n_text]
        shape = features.shape[:-1]
        p = self.modality_dropout
        v, _, _ = self.drugs(
            signature.reshape(-1, self.n_genes),
            text.reshape(-1, self.n_text) if self.n_text else None,
            embedding,
            (p, p),
        )
        return v.reshape(*shape, self.n_state)

    def _own_signature(self, code: Tensor, known: Tensor) -> Tensor | None:
        """Signatures from the training cells, where none were registered."""
        if self.signature_genes:
            return None
        return self.own_signature[code] * known[..., None]

    def _signature(self, features: Tensor, own_signature: Tensor | None) -> Tensor:
        """Registered signatures, averaged, or those of the training cells; standardised and clipped."""
        if own_signature is not None:
            return own_signature
        total = features.new_zeros(*features.shape[:-1], self.n_genes)
        start = self.n_text
        for genes in self.signature_genes:
            columns = features[..., start : start + len(genes)]
            genes = genes.to(features.device)
            inside = genes >= 0
            total = total.index_add(-1, genes[inside], columns[..., inside] / len(self.signature_genes))
            start += len(genes)
        return (total / self.signature_scale).clamp(-_CLIP, _CLIP)

    def perturb(self, basal: Tensor, drugs: tuple[Tensor, Tensor]) -> Tensor:
        """Perturbed state: shifted basal state, and coordinates of the effect beside it."""
        shift, effect = drugs
        z = basal + shift
        return torch.cat([z, effect.expand(*z.shape[:-1], -1)], -1)

    # -- training terms ---------------------------------------------------------------------------------------------

    def labels(self, action: Action) -> Tensor:
        """What the discriminator is to tell, ``(n, n_perturbations + 1)``: shares of the members; the last is control."""
        n_classes = len(self.class_share)
        present = (action.codes >= 0) & (action.dose > 0)
        target = F.one_hot(action.codes.clamp(min=0), n_classes) * present[..., None]
        target = target.sum(1).clamp(max=1).to(action.dose)
        target[:, -1] = (~present.any(1)).to(target)
        return target / target.sum(1, keepdim=True)

    def discriminator_input(self, cells: Cells) -> Tensor:
        """Basal state as the discriminator is given it, ``(n_cells, n_state)``."""
        return self.shown(self.encode(cells, self.describe(cells.action, cells.context)[1])[0])

    def discriminator_loss(self, given: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the perturbation, and weights that make rare perturbations count as much, both ``(n_cells,)``."""
        target = self.labels(cells.action)
        entropy = -(target * self.discriminator(given).log_softmax(-1)).sum(-1)
        return entropy, target @ (1.0 / self.class_share.clamp(min=1e-6))

    def shown(self, loc: Tensor) -> Tensor:
        """What the discriminator sees: locations of the guide, standardised over the minibatch.

        Not draws: what a guide hides in its noise, or in coordinates that it makes small, an average over draws would show.
        """
        centred = loc - loc.mean(0)
        return centred / (centred.square().mean(0) + 1e-6).sqrt()

    def recognised(self, loc: Tensor) -> Tensor:
        """Divergence of what the discriminator says from no preference, ``(n,)``: 0 where it knows nothing."""
        share = (self.class_share > 0).to(loc)
        share = share / share.sum()
        return (share * (share.clamp(min=1e-9).log() - self.discriminator(self.shown(loc)).log_softmax(-1))).sum(-1)

    def _agreement(self, action: Action, embedding: Tensor) -> Tensor:
        """Contrast of both branches over the perturbations of a minibatch."""
        codes = action.codes[action.codes >= 0].unique()
        features = self.features[codes]
        signature = self._signature(features, self._own_signature(codes, torch.ones_like(codes, dtype=torch.bool)))
        text = features[:, : self.n_text]
        both = (signature != 0).any(-1) & (text != 0).any(-1)
        _, s, t = self.drugs(signature[both], text[both], embedding)
        return contrast(s, t)

    def _effect_error(self, basal: Tensor, drugs: tuple[Tensor, Tensor], cells: Cells, embedding: Tensor) -> Tensor:
        """Squared error, in standard errors, of group means that are predicted from control cells of the context.

        The path on which predictions are made: basal state of a control cell, another perturbation, decoder.
        """
        control = ~cells.action.present.any(1)
        partner = (cells.context[:, None] == cells.context) & (cells.batch[:, None] == cells.batch) & control
        use = ~control & partner.any(1)
        if not use.any():
            return basal.sum() * 0.0
        lot = torch.rand(partner.shape, device=basal.device).masked_fill(~partner, -1.0)
        chosen = lot[use].argmax(1)
        shift, effect = (d[use] for d in drugs)
        h = self._to_genes(self.perturb(basal[chosen], (shift, effect)), cells.batch[use], embedding)
        keys = torch.cat([cells.action.codes, cells.action.dose, cells.context[:, None]], 1)[use]
        _, group = keys.unique(dim=0, return_inverse=True)
        n = torch.bincount(group).to(h)[:, None]
        measured, predicted = (
            torch.zeros(len(n), self.n_genes, device=h.device).index_add(0, group, v) / n
            for v in self._comparable(h, cells, use)
        )
        if self.native_scale == "counts":
            measured, predicted = measured.log1p(), predicted.log1p()
        return 0.5 * (0.5 * n * ((predicted - measured) / self.effect_sd).square()).sum()

    def _comparable(self, h: Tensor, cells: Cells, use: Tensor) -> tuple[Tensor, Tensor]:
        """Measured and expected expression: counts per 10,000, or the registered values."""
        if self.native_scale == "counts":
            one = torch.ones(1, device=h.device)
            return 1e4 * cells.x[use] / cells.library[use], 1e4 * self.likelihood.rate(h, one)
        return cells.x[use], self.likelihood._parameters_of(h)[0]

    # -- counterfactuals --------------------------------------------------------------------------------------------

    def draw_globals(self, n_samples: int) -> dict[str, Tensor]:
        """Effects are point estimates: nothing to draw."""
        return {}

    def abduct(self, cells: Cells, n_samples: int, globals_: dict[str, Tensor]) -> Basal:
        """z_b of a cell from the guide, and the noise of its own measurement under its own perturbation."""
        drugs = self.describe(cells.action, cells.context)
        z = dist.Normal(*self.encode(cells, drugs[1])).sample((n_samples,))
        h = self._to_genes(self.perturb(z, drugs), cells.batch, self.genes())
        noise = self.likelihood.abduct(h, cells.library, cells.x)
        z = torch.cat([z, z.new_zeros(*z.shape[:-1], self.n_effect)], -1)
        return Basal(z, noise, cells.context, cells.batch, cells.library)

    def act(self, basal: Basal, action: Action, globals_: dict[str, Tensor]) -> Tensor:
        """Basal state, shifted, and the coordinates of the effect."""
        return self.perturb(basal.z[..., : self.n_state], self.describe(action, basal.context))

    def decode(self, z: Tensor, basal: Basal) -> Tensor:
        """Expression, the cell's own measurement noise replayed."""
        return self.likelihood.predict(self._decoded(z, basal.batch), basal.library, basal.noise)

    def _decoded(self, z: Tensor, batch: Tensor) -> Tensor:
        return self._to_genes(z, batch, self.genes())

    def _to_genes(self, z: Tensor, batch: Tensor, embedding: Tensor) -> Tensor:
        state, effect = z.split([self.n_state, self.n_effect], -1)
        q = self.decoder_out(self.decoder(self._with_batch(state, batch)))
        added = effect @ self.basis.mT
        if self.native_scale != "counts":
            added = added / self.likelihood.unit
        return q @ embedding.mT + added

    def _with_batch(self, values: Tensor, batch: Tensor) -> Tensor:
        if self.n_batch < 2:
            return values
        one_hot = F.one_hot(batch.clamp(max=self.n_batch - 1), self.n_batch).to(values)
        return torch.cat([values, one_hot.expand(*values.shape[:-1], -1)], dim=-1)

    @staticmethod
    def _get_fn_args_from_batch(batch: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (Cells.from_tensors(batch),), {}


def hill(dose: Tensor, log_k: Tensor, log_n: Tensor) -> Tensor:
    """Hill curve that is 0 at dose 0 and 1 at dose 1."""
    n, k = log_n.exp(), log_k.exp()
    power = torch.where(dose > 0, dose.clamp(min=1e-12), torch.ones_like(dose)).pow(n) * (dose > 0)
    return power * (1.0 + k.pow(n)) / (power + k.pow(n))
