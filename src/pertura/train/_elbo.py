"""Objectives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence


class FreeBitsELBO(Trace_ELBO):
    r"""Monte-Carlo ELBO in which a latent's divergence costs nothing below its free nats (Kingma et al., 2016).

    :math:`-\log p(x \mid z) + \sum_s \max(\lambda_s, w\,\mathrm{KL}_s)`, where the divergence of site `s`,
    :math:`\log q(z_s) - \log p(z_s)`, is averaged over the cells that have it. The divergence is by Monte Carlo,
    because an autoregressive guide has no closed form.

    Parameters
    ----------
    free_nats
        :math:`\lambda_s` in nats per cell, by site name; sites that are not named have none.
    num_particles
        Draws per step.
    """

    def __init__(self, free_nats: Mapping[str, float] | None = None, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles, max_plate_nesting=1)
        self.free_nats = dict(free_nats or {})

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Tensor:
        """Loss of one minibatch, summed over its cells."""
        loss = torch.zeros(())
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            model_trace.compute_log_prob()
            guide_trace.compute_log_prob()
            particle = 0.0
            for name, site in model_trace.nodes.items():
                if site["type"] != "sample":
                    continue
                if site["is_observed"]:
                    particle = particle - site["log_prob_sum"]
                    continue
                divergence = guide_trace.nodes[name]["log_prob_sum"] - site["log_prob_sum"]
                free = self.free_nats.get(name, 0.0)
                if free > 0:
                    n_cells = site["log_prob"].numel()
                    # the scale of the site carries the weight of the divergence (warm-up)
                    divergence = divergence.clamp(min=free * n_cells * float(site["scale"]))
                particle = particle + divergence
            loss = loss.to(particle.device) + particle / self.num_particles
        return loss


class ClosedFormELBO(TraceMeanField_ELBO):
    """The ELBO with divergences in closed form, without the densities of draws, which Pyro's own also computes.

    For guides without terms of their own, where each latent's distribution is normal or another that has a closed form.
    """

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Tensor:
        """Loss of one minibatch, summed over its cells."""
        loss = 0.0
        for _ in range(self.num_particles):
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            for name, site in replayed.nodes.items():
                if site["type"] != "sample" or poutine.util.site_is_subsample(site):
                    continue
                if site["is_observed"]:
                    term = -site["fn"].log_prob(site["value"])
                else:
                    prior, site = site["fn"], drawn.nodes[name]
                    term = kl_divergence(site["fn"], prior)
                loss = loss + scale_and_mask(term, site["scale"], site["mask"]).sum()
        return loss / self.num_particles
