"""The objective, against a model whose evidence is known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pertura.train import FreeBitsELBO
from pertura.train._elbo import ClosedFormELBO

X = torch.tensor([[0.5], [2.0], [-1.0]])


def model(x, kl_weight=1.0):
    with pyro.plate("cells", len(x)):
        with pyro.poutine.scale(scale=kl_weight):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x, kl_weight=1.0, width=0.5):
    with pyro.plate("cells", len(x)), pyro.poutine.scale(scale=kl_weight):
        pyro.sample("z", dist.Normal(x / 2, width).to_event(1))


def divergence(width=0.5):
    q, p = dist.Normal(X / 2, width), dist.Normal(0.0, 1.0)
    return float(torch.distributions.kl_divergence(q, p).sum())


def loss(elbo, n=500, **arguments):
    torch.manual_seed(0)
    return float(torch.stack([elbo.differentiable_loss(model, guide, X, **arguments) for _ in range(n)]).mean())


def expected_reconstruction(width=0.5):
    """-E log N(x; z, 1) under q(z) = N(x / 2, width)."""
    return float((0.5 * ((X / 2) ** 2 + width**2) + 0.5 * torch.log(torch.tensor(2 * torch.pi))).sum())


def test_without_free_nats_it_is_the_elbo():
    torch.manual_seed(0)
    own = FreeBitsELBO().differentiable_loss(model, guide, X)
    torch.manual_seed(0)
    torch.testing.assert_close(own, Trace_ELBO().differentiable_loss(model, guide, X))


def test_exact_posterior_gives_the_evidence():
    """With q = p(z | x) every draw has the evidence: no Monte-Carlo error."""
    width = 0.5**0.5
    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(X).sum()

    def exact(x):
        guide(x, width=width)

    torch.testing.assert_close(FreeBitsELBO().differentiable_loss(model, exact, X), -evidence)


def test_mean_of_the_loss():
    assert abs(loss(FreeBitsELBO()) - (expected_reconstruction() + divergence())) < 0.2


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_divergences_below_the_free_nats_cost_as_much_as_these(weight):
    """Many nats are free: the divergence costs them, at its weight, and passes no gradient."""
    elbo = FreeBitsELBO({"z": 50.0})
    expected = expected_reconstruction() + weight * 50.0 * len(X)
    assert abs(loss(elbo, kl_weight=weight) - expected) < 0.2


def test_gradient_of_a_free_divergence():
    width = torch.tensor(0.5, requires_grad=True)
    for free, moves in ((50.0, False), (0.0, True)):
        elbo = FreeBitsELBO({"z": free})
        torch.manual_seed(0)

        def only_prior(x):
            with pyro.plate("cells", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

        value = elbo.differentiable_loss(only_prior, lambda x: guide(x, width=width), X)
        (gradient,) = torch.autograd.grad(value, width, allow_unused=True)
        assert (gradient is not None and gradient != 0) == moves


def test_sites_that_are_not_named_have_no_free_nats():
    torch.manual_seed(0)
    own = FreeBitsELBO({"other": 50.0}).differentiable_loss(model, guide, X)
    torch.manual_seed(0)
    torch.testing.assert_close(own, Trace_ELBO().differentiable_loss(model, guide, X))


def test_particles_are_averaged():
    torch.manual_seed(0)
    many = FreeBitsELBO(num_particles=800).differentiable_loss(model, guide, X)
    assert abs(float(many) - (expected_reconstruction() + divergence())) < 0.2


def test_closed_forms_are_those_of_pyro():
    for arguments in ({}, {"kl_weight": 0.3}):
        torch.manual_seed(0)
        own = ClosedFormELBO().differentiable_loss(model, guide, X, **arguments)
        torch.manual_seed(0)
        torch.testing.assert_close(own, TraceMeanField_ELBO().differentiable_loss(model, guide, X, **arguments))
    # a divergence without noise
    nothing = [float(ClosedFormELBO().differentiable_loss(*_unobserved(), X)) for _ in range(2)]
    assert nothing == pytest.approx([divergence()] * 2)


def _unobserved():
    def prior(x):
        with pyro.plate("cells", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    return prior, guide
