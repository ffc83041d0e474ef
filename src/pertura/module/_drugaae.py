r"""DrugAAE: an adversarial autoencoder of cells under drugs (after Park, Song and Jang).

.. math::

    E            &= E_0 + \textstyle\sum_l \gamma_l \hat A^l E_0                    &&\text{genes: expression, interactions of proteins} \\
    v_d          &= g \odot s_d + (1 - g) \odot t_d                                  &&\text{drug: signature, text} \\
    \delta_d(u)  &= u^{n_d} (1 + k_d^{n_d}) / (u^{n_d} + k_d^{n_d})                  &&\text{dose, in units of the highest} \\
    z_b          &\sim N(0, I)                                                        &&\text{basal state} \\
    z            &= z_b + \textstyle\sum_d \delta_d(u_d)\, (I + B_c)\, v_d            &&\text{perturbed state} \\
    x_g          &\sim p\big(x \mid \langle q(z), E_g \rangle + b_g + (V a)_g\big), \quad a = \textstyle\sum_d \delta_d(u_d)\, a_{dc}

:math:`a_{dc}` are coordinates, in a basis V of few components, of the effect of d in context c: as measured where d was trained,
from its features in closed form where it was not (:func:`pertura.effects.fit_kernels`), as far as such predictions hold in c and at that dose. The paper has no such term. The guide is
:math:`q(z_b \mid x - V a)`, one encoder tied to E. A discriminator that only the training plan changes tries to tell the
perturbation from :math:`z_b`; the guide is trained to make that impossible.

In training a perturbation is treated, half of the time, as if it had never been measured: its effect is then what the other
perturbations predict, and its signature is not made of its own cells. The lots that decide are a site that guide and model share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pertura.effects import fill_missing
from pertura.nn._descriptions import DescriptionEncoder, contrast
from pertura.nn._mlp import MLP
from pertura.nn._propagation import GeneEmbedding

from ._base import Action, Cells
from ._latent import LatentModule, beside, hill

_CLIP = 5.0  # of signatures, in units of their standard deviation
_UNMEASURED = 0.5  # share of training steps in which a perturbation is treated as if it had not been measured
_MAX_LOG_K, _MAX_LOG_N = 2.0, 1.0
_PER_10K = 1e4

Drugs = tuple[Tensor, Tensor]


class AddBias(nn.Module):
    r"""Last layer of the decoder: :math:`b_g` is added to :math:`\langle q, E_g \rangle`."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_genes))

    def forward(self, h: Tensor) -> Tensor:
        """``(..., n_genes)``."""
        return h + self.bias


class ClosedForm(nn.Module):
    """Effects of perturbations at their highest dose, as coordinates in a basis.

    Parameters
    ----------
    n_genes, n_perturbations, n_contexts, n_features
        Sizes.
    n_components
        Columns of the basis; 0: there are no effects in closed form.

    Attributes
    ----------
    basis
        ``(n_genes, n_components)``.
    measured
        Whether a perturbation was measured, ``(n_perturbations,)``.
    effects
        Measured effects, ``(n_perturbations, n_contexts, n_components)``.
    common
        Mean effect of each context and, last, over contexts, ``(n_contexts + 1, n_components)``.
    weight, intercept
        What a perturbation differs by from the mean effect, as its features say: ``intercept + features @ weight``.
    feature_center, feature_block
        What stands for features that are missing; see :func:`~pertura.effects.fill_missing`.
    left_out
        The same of trained perturbations, each predicted from all others, ``(n_perturbations, n_components)``.
    amplitude
        What such predictions are multiplied with in each context and, last, elsewhere, ``(n_contexts + 1, 2)``: first with the dose
        response s, then with 4 s (1 - s).
    """

    def __init__(self, n_genes: int, n_perturbations: int, n_contexts: int, n_features: int, n_components: int) -> None:
        super().__init__()
        self.n_components, self.n_contexts = n_components, n_contexts
        self.register_buffer("basis", torch.zeros(n_genes, n_components))
        self.register_buffer("measured", torch.zeros(n_perturbations, dtype=torch.bool))
        self.register_buffer("effects", torch.zeros(n_perturbations, n_contexts, n_components))
        self.register_buffer("common", torch.zeros(n_contexts + 1, n_components))
        self.register_buffer("weight", torch.zeros(n_features, n_components))
        self.register_buffer("intercept", torch.zeros(n_components))
        self.register_buffer("feature_center", torch.zeros(n_features))
        self.register_buffer("feature_block", torch.zeros(n_features, dtype=torch.long))
        self.register_buffer("left_out", torch.zeros(n_perturbations, n_components))
        self.register_buffer("amplitude", torch.tensor([1.0, 0.0]).repeat(n_contexts + 1, 1))

    def forward(
        self, code: Tensor, features: Tensor, context: Tensor, known: Tensor, as_measured: Tensor, strength: Tensor
    ) -> Tensor:
        """Coordinates of the effect of each member, ``(n_cells, order, n_components)``.

        Parameters
        ----------
        code, features, known
            Code, features and whether it is in the vocabulary, of each member; one row may stand for all cells.
        context
            Code of the context of each cell, ``(n_cells,)``.
        as_measured
            Whether its measured effect is used, of the shape of `code`.
        strength
            Dose response of each member, ``(n_cells, order)``.
        """
        place = context.clamp(max=self.n_contexts)[:, None]
        inner = place.clamp(max=self.n_contexts - 1)
        measured = self.effects[code, inner]
        if bool((context >= self.n_contexts).any()):
            inside = (place < self.n_contexts)[..., None]
            measured = torch.where(inside, measured, self.effects[code].mean(-2))
        # what a trained perturbation taught must not come back as a prediction of it
        trained = (known & self.measured[code])[..., None]
        features = fill_missing(features, self.feature_center, self.feature_block)
        predicted = torch.where(trained, self.left_out[code], features @ self.weight + self.intercept)
        full, middle = self.amplitude[place].unbind(-1)
        there = (full * strength + middle * (4.0 * strength * (1.0 - strength)).clamp(min=0.0)).clamp(min=0.0)
        predicted = there[..., None] * predicted + strength[..., None] * self.common[place]
        return torch.where(as_measured[..., None], strength[..., None] * measured, predicted)


class DrugAAE(LatentModule):
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
        Columns of V; 0: no effect in closed form.
    encoder_hidden, decoder_hidden, discriminator_hidden
        Widths of the layers.
    interaction_rank
        Rank of :math:`B_c`.
    likelihood, link_sharpness
        ``"nb"`` or ``"normal"``; see :class:`~pertura.nn.CountLikelihood`.
    has_ppi
        Whether E is propagated over interactions of proteins.
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
        has_ppi: bool = False,
        free_encoder: bool = True,
        adversary_weight: float = 5.0,
        contrast_weight: float = 0.1,
        counterfactual_weight: float = 1.0,
        modality_dropout: float = 0.3,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__(n_genes, n_batch)
        self.n_contexts, self.n_text, self.n_state = n_contexts, n_text, n_state
        self.n_latent = n_state + n_effect_components
        self.adversary_weight, self.contrast_weight = adversary_weight, contrast_weight
        self.counterfactual_weight, self.modality_dropout = counterfactual_weight, modality_dropout
        self.adversary_share = 0.0  # of the full weight; the training plan raises it
        self.signature_genes = [torch.as_tensor(list(g), dtype=torch.long) for g in signatures]
        n_features = n_text + sum(map(len, signatures))

        self.genes = GeneEmbedding(n_genes, n_gene_embedding, network=has_ppi)
        width = encoder_hidden[0] if encoder_hidden else n_state
        self.encoder_tied = nn.Linear(n_gene_embedding, width, bias=False)
        self.encoder_free = nn.Parameter(0.1 * torch.randn(n_genes, width)) if free_encoder else None
        self.encoder_norm = nn.LayerNorm(width)
        self.encoder = MLP(width + self.n_covariates, encoder_hidden, dropout_rate=dropout_rate)
        self.encoder_out = nn.Linear(self.encoder.n_out, 2 * n_state)
        self.decoder = MLP(n_state + self.n_covariates, decoder_hidden)
        self.decoder_out = nn.Linear(self.decoder.n_out, n_gene_embedding, bias=False)
        self.make_likelihood(likelihood, n_genes, link_sharpness, layer=AddBias(n_genes))

        self.drugs = DescriptionEncoder(n_gene_embedding, n_text, n_state)
        self.dose_head = nn.Linear(n_state, 2)  # log k and log n
        nn.init.zeros_(self.dose_head.weight)
        nn.init.zeros_(self.dose_head.bias)
        self.interaction_rank = rank = interaction_rank if n_contexts > 1 else 0
        if rank:
            self.interaction_in = nn.Parameter(torch.randn(n_state, rank) / n_state**0.5)
            self.interaction_out = nn.Parameter(torch.randn(rank, n_state) / rank**0.5)
            self.interaction_context = nn.Parameter(torch.zeros(n_contexts, rank))
        self.discriminator = nn.Sequential(
            MLP(n_state, discriminator_hidden, dropout_rate=dropout_rate),
            nn.Linear(discriminator_hidden[-1] if discriminator_hidden else n_state, n_perturbations + 1),
        )

        self.closed_form = ClosedForm(n_genes, n_perturbations, n_contexts, n_features, n_effect_components)
        self.register_buffer("features", torch.zeros(n_perturbations, n_features))
        # signatures made of the training cells, for data without registered ones
        self.register_buffer("own_signature", torch.zeros(n_perturbations, n_genes))
        self.register_buffer("signature_scale", torch.ones(n_genes))
        # part of v that perturbations get which were not measured, and those that are kept for choosing it
        self.register_buffer("vector_share", torch.ones(()))
        self.register_buffer("held_out", torch.zeros(n_perturbations, dtype=torch.bool))
        self.register_buffer("class_share", torch.ones(n_perturbations + 1))

    # -- generative model and guide ---------------------------------------------------------------------------------

    def model(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """Joint density of a minibatch, and in training the terms of adversary, contrast and predicted effects."""
        lots, embedding = self.draw_lots(), self.genes()
        shift, effect = drugs = self.describe(cells.action, cells.context, embedding, lots)
        with pyro.plate("cells", len(cells)):
            with pyro.poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(cells.x.new_zeros(self.n_state), 1.0).to_event(1))
            pyro.deterministic("basal", beside(z, torch.zeros_like(effect)), event_dim=1)
            pyro.deterministic("state", beside(z + shift, effect), event_dim=1)
            pyro.sample("x", self.expression(z, drugs, cells.batch, cells.library, embedding), obs=cells.x)
        if not self.training:
            return
        if self.contrast_weight > 0 and self.n_text:
            pyro.factor("contrast", -self.contrast_weight * len(cells) * self._agreement(cells.action, embedding))
        if self.counterfactual_weight > 0:
            pyro.factor("counterfactual", -self.counterfactual_weight * self._effect_error(z, drugs, cells, embedding))
        weight = self.adversary_weight * self.adversary_share
        if weight > 0:
            pyro.factor("adversary", -weight * self._recognized(self.encode(cells, effect, embedding).loc).sum())

    def guide(self, cells: Cells, kl_weight: float = 1.0) -> None:
        """q(z_b | x), the closed-form part of the cell's own effect taken away from x."""
        lots, embedding = self.draw_lots(), self.genes()
        _, effect = self.describe(cells.action, cells.context, embedding, lots)
        with pyro.plate("cells", len(cells)), pyro.poutine.scale(scale=kl_weight):
            pyro.sample("z", self.encode(cells, effect, embedding).to_event(1))

    def draw_lots(self) -> Tensor | None:
        """Site of uniform numbers, ``(n_perturbations, 2)``: guide and model see a perturbation in the same way.

        The first decides whether it is treated as if it had not been measured, the second whether its signature or its
        text is taken away. `None` outside of training, and where perturbations without cells can not be predicted.
        """
        if not self.training or not self.features.shape[1]:
            return None
        low = self.features.new_zeros(len(self.features), 2)
        return pyro.sample("lots", dist.Uniform(low, 1.0, validate_args=False).to_event(2))

    def encode(self, cells: Cells, effect: Tensor, embedding: Tensor) -> dist.Normal:
        """Posterior of the basal state, ``(n_cells, n_state)``, given coordinates of the cells' own effects."""
        x = self.standardized(cells.x, cells.library) - self.on_genes(effect) / self.input_scale
        weights = self.encoder_tied(embedding)
        if self.encoder_free is not None:
            weights = weights + self.encoder_free
        h = self.encoder_norm(x @ weights / self.n_genes**0.5)
        loc, log_scale = self.encoder_out(self.encoder(self.with_batch(h, cells.batch))).chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(-6.0, 2.0).exp())

    def expression(
        self, z: Tensor, drugs: Drugs, batch: Tensor, library: Tensor, embedding: Tensor
    ) -> TorchDistribution:
        """Distribution of expression of basal states under perturbations, one event dimension."""
        shift, effect = drugs
        h = self.decode(z + shift, batch, embedding)
        return self.likelihood(h, library, self.on_genes(effect))

    def decode(self, state: Tensor, batch: Tensor, embedding: Tensor) -> Tensor:
        r""":math:`\langle q(z), E_g \rangle`, ``(..., n_cells, n_genes)``."""
        return self.decoder_out(self.decoder(self.with_batch(state, batch))) @ embedding.mT

    def on_genes(self, effect: Tensor) -> Tensor | float:
        """Effect of the genes from its coordinates, ``(..., n_genes)``."""
        return effect @ self.closed_form.basis.mT if self.closed_form.n_components else 0.0

    # -- perturbations ----------------------------------------------------------------------------------------------

    def describe(
        self,
        action: Action,
        context: Tensor,
        embedding: Tensor,
        lots: Tensor | None = None,
        *,
        unmeasured: Tensor | None = None,
        vector_share: float | None = None,
    ) -> Drugs:
        """Sum over members: shift of the state ``(n, n_state)`` and coordinates of the effect ``(n, n_components)``.

        Parameters
        ----------
        action, context
            What is done to each cell, and the code of its context.
        embedding
            Of genes.
        lots
            Of :meth:`draw_lots`; `None`: what is known of perturbations is used.
        unmeasured
            Perturbations to treat as if they had not been measured, ``(n_perturbations,)``; by default those drawn.
        vector_share
            Part of the vector v that such perturbations get; by default all in training, then :attr:`vector_share`.
        """
        if lots is not None and unmeasured is None:
            unmeasured = lots[:, 0] < _UNMEASURED
        action, n = action.one, len(context)
        code, known = action.codes.clamp(min=0), action.codes >= 0
        own = known & self.closed_form.measured[code]
        if unmeasured is not None:
            own = own & ~unmeasured[code]
        features = self.features[code] * known[..., None]
        if action.features is not None:
            features = torch.where(known[..., None], features, action.features)
        # a signature from the perturbation's own cells is no description of one that was not measured
        v = self.vector(
            features, self.own_signature[code] * own[..., None], embedding, None if lots is None else lots[code, 1]
        )
        if vector_share is None:
            vector_share = 1.0 if self.training else self.vector_share
        v = torch.where(own[..., None], v, vector_share * v)
        if self.training:
            v = torch.where((own | ~self.held_out[code])[..., None], v, torch.zeros_like(v))
        strength = self.dose_response(v, action.dose) * (action.codes != -1)
        moved = v
        if self.interaction_rank:
            inside = (context < self.n_contexts)[:, None]
            c = self.interaction_context[context.clamp(max=self.n_contexts - 1)] * inside
            moved = v + ((v @ self.interaction_in) * c[:, None]) @ self.interaction_out
        effect = self.closed_form(code, features, context, known, own, strength).sum(-2)
        return (strength[..., None] * moved).sum(-2).expand(n, -1), effect.expand(n, -1)

    def dose_response(self, v: Tensor, dose: Tensor) -> Tensor:
        """Hill curve of each perturbation, whose shape follows from its vector."""
        log_k, log_n = self.dose_head(v).tanh().unbind(-1)
        return hill(dose, _MAX_LOG_K * log_k, _MAX_LOG_N * log_n)

    def start_dose_response(self, log_k: float, log_n: float) -> None:
        """Let the Hill curves of all perturbations start at one shape."""
        start = torch.tensor([log_k / _MAX_LOG_K, log_n / _MAX_LOG_N])
        with torch.no_grad():
            self.dose_head.bias.copy_((0.999 * start).atanh())

    def vector(self, features: Tensor, own_signature: Tensor, embedding: Tensor, lot: Tensor | None = None) -> Tensor:
        """Vectors v of perturbations, ``(..., n_state)``.

        Parameters
        ----------
        features
            Registered features, ``(..., n_features)``.
        own_signature
            Signatures from the training cells, which are used where none were registered, ``(..., n_genes)``.
        embedding
            Of genes.
        lot
            See :class:`~pertura.nn.DescriptionEncoder`.
        """
        text = features[..., : self.n_text] if self.n_text else None
        drop = (self.modality_dropout, self.modality_dropout)
        return self.drugs(self._signature(features, own_signature), text, embedding, lot, drop)[0]

    def _signature(self, features: Tensor, own_signature: Tensor) -> Tensor:
        """Registered signatures, averaged, or those of the training cells; standardized and clipped."""
        if not self.signature_genes:
            return own_signature
        total = features.new_zeros(*features.shape[:-1], self.n_genes)
        start = self.n_text
        for genes in self.signature_genes:
            columns, genes = features[..., start : start + len(genes)], genes.to(features.device)
            inside = genes >= 0
            total = total.index_add(-1, genes[inside], columns[..., inside] / len(self.signature_genes))
            start += len(genes)
        return (total / self.signature_scale).clamp(-_CLIP, _CLIP)

    # -- adversary --------------------------------------------------------------------------------------------------

    def discriminator_input(self, cells: Cells) -> Tensor:
        """Basal state as the discriminator is given it, ``(n_cells, n_state)``."""
        embedding = self.genes()
        _, effect = self.describe(cells.action, cells.context, embedding, self.draw_lots())
        return self._shown(self.encode(cells, effect, embedding).loc)

    def discriminator_loss(self, given: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the perturbation, and weights that make rare perturbations count as much, both ``(n_cells,)``."""
        target = self.labels(cells.action)
        entropy = -(target * self.discriminator(given).log_softmax(-1)).sum(-1)
        return entropy, target @ (1.0 / self.class_share.clamp(min=1e-6))

    def labels(self, action: Action) -> Tensor:
        """What the discriminator is to tell, ``(n, n_perturbations + 1)``: shares of the members; the last is control."""
        present = (action.codes >= 0) & (action.dose > 0)
        target = F.one_hot(action.codes.clamp(min=0), len(self.class_share)) * present[..., None]
        target = target.sum(1).clamp(max=1).to(action.dose)
        target[:, -1] = (~present.any(1)).to(target)
        return target / target.sum(1, keepdim=True)

    def _shown(self, loc: Tensor) -> Tensor:
        """What the discriminator sees: locations of the guide, standardized over the minibatch.

        Not draws: what a guide hides in its noise, or in coordinates that it makes small, an average over draws would show.
        """
        centered = loc - loc.mean(0)
        return centered / (centered.square().mean(0) + 1e-6).sqrt()

    def _recognized(self, loc: Tensor) -> Tensor:
        """Divergence of what the discriminator says from no preference, ``(n,)``: 0 where it knows nothing."""
        share = (self.class_share > 0).to(loc)
        share = share / share.sum()
        return (share * (share.clamp(min=1e-9).log() - self.discriminator(self._shown(loc)).log_softmax(-1))).sum(-1)

    # -- further terms of training ----------------------------------------------------------------------------------

    def _agreement(self, action: Action, embedding: Tensor) -> Tensor:
        """Contrast of both branches over the perturbations of a minibatch."""
        codes = action.codes[action.codes >= 0].unique()
        features = self.features[codes]
        signature, text = self._signature(features, self.own_signature[codes]), features[:, : self.n_text]
        both = (signature != 0).any(-1) & (text != 0).any(-1)
        _, s, t = self.drugs(signature[both], text[both], embedding)
        return contrast(s, t)

    def _effect_error(self, z: Tensor, drugs: Drugs, cells: Cells, embedding: Tensor) -> Tensor:
        """Squared error, in standard errors, of group means that are predicted from control cells of the context.

        The path on which predictions are made: basal state of a control cell, another perturbation, decoder.
        """
        control = ~cells.action.present.any(1)
        partner = (cells.context[:, None] == cells.context) & (cells.batch[:, None] == cells.batch) & control
        use = ~control & partner.any(1)
        if not use.any():
            return z.sum() * 0.0
        lot = torch.rand(partner.shape, device=z.device).masked_fill(~partner, -1.0)
        keys = torch.cat([cells.action.codes, cells.action.dose, cells.context[:, None]], 1)[use]
        _, group = keys.unique(dim=0, return_inverse=True)
        n = torch.bincount(group).to(z)[:, None]
        is_counts = self.native_scale == "counts"
        depth = z.new_tensor(_PER_10K)
        shift, effect = drugs
        own = self.expression(z[lot[use].argmax(1)], (shift[use], effect[use]), cells.batch[use], depth, embedding)
        found = cells.x[use] * depth / cells.library[use] if is_counts else cells.x[use]
        predicted, measured = (z.new_zeros(len(n), self.n_genes).index_add(0, group, v) / n for v in (own.mean, found))
        if is_counts:
            measured, predicted = measured.log1p(), predicted.log1p()
        return 0.5 * (0.5 * n * ((predicted - measured) / self.input_scale).square()).sum()
