import numpy as np
import pytest
import torch
from scipy.stats import poisson

from pertura.nn import CountLikelihood, GaussianLikelihood
from pertura.nn._likelihoods import NegativeBinomial, poisson_quantile


def _count(beta=1.0, n_genes=6):
    torch.manual_seed(0)
    likelihood = CountLikelihood(3, n_genes, link_sharpness=beta)
    torch.nn.init.normal_(likelihood.log_theta, std=0.5)
    return likelihood


def test_sharpness_one_is_the_softmax():
    likelihood = _count()
    h = torch.randn(4, 3)
    sharp = CountLikelihood(3, 6, link_sharpness=1.0 + 1e-9)
    sharp.load_state_dict(likelihood.state_dict())
    sharp.link_sharpness = 1.0000001
    torch.testing.assert_close(
        sharp.rate(h, torch.ones(4, 1)), likelihood.rate(h, torch.ones(4, 1)), atol=1e-3, rtol=1e-2
    )


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_rates_add_up_to_the_library_and_start_at_the_mean(beta):
    likelihood = _count(beta)
    mean = torch.tensor([5.0, 1.0, 0.5, 0.1, 3.0, 20.0])
    likelihood.initialise(mean, torch.ones(6))
    rate = likelihood.rate(torch.zeros(2, 3), torch.tensor([[100.0], [1000.0]]))
    torch.testing.assert_close(rate.sum(1), torch.tensor([100.0, 1000.0]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rate[0] / 100, mean / mean.sum(), rtol=2e-2, atol=1e-4)


def test_linear_on_log1p_where_the_link_is_sharp():
    """Far above zero, a step of the activation is the same step of log1p(counts per 10,000)."""
    likelihood = CountLikelihood(1, 1, link_sharpness=8.0)
    activation = torch.tensor([1.0, 1.5, 2.0])
    per_10k = torch.expm1(torch.nn.functional.softplus(activation, beta=8.0))
    steps = torch.log1p(per_10k).diff()
    torch.testing.assert_close(steps, torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)
    assert likelihood.link_sharpness == 8.0


def test_gamma_poisson_is_the_negative_binomial():
    likelihood = _count()
    h, library = torch.randn(1, 3), torch.tensor([[500.0]])
    distribution = likelihood(h, library)
    torch.manual_seed(0)
    noise = torch.distributions.Gamma(likelihood.theta, likelihood.theta).sample((40_000, 1))
    draws = likelihood.predict(h, library, noise)
    mean = likelihood.rate(h, library)[0]
    variance = mean + mean**2 / likelihood.theta
    torch.testing.assert_close(draws.mean((0, 1)), mean, rtol=0.03, atol=0.05)
    torch.testing.assert_close(draws.var(0)[0], variance, rtol=0.1, atol=0.1)
    # the density agrees with the draws: E[log p] of zeros
    zero = (draws == 0).float().mean((0, 1))
    expected = torch.distributions.NegativeBinomial(
        likelihood.theta, logits=mean.log() - likelihood.theta.log()
    ).log_prob(torch.zeros(6))
    torch.testing.assert_close(zero, expected.exp(), atol=0.02, rtol=0)
    assert torch.isfinite(distribution.log_prob(torch.full((1, 6), 3.0))).all()


def test_abducted_noise_is_the_conjugate_posterior():
    """epsilon | x ~ Gamma(theta + x, theta + rate): its mean, by draws."""
    likelihood = _count()
    h, library = torch.randn(1, 3), torch.tensor([[50.0]])
    x = torch.tensor([[0.0, 3.0, 10.0, 1.0, 7.0, 2.0]])
    rate = likelihood.rate(h, library)
    torch.manual_seed(0)
    draws = likelihood.abduct(h.expand(20_000, 3), library, x)
    expected = (likelihood.theta + x) / (likelihood.theta + rate)
    torch.testing.assert_close(draws.mean(0, keepdim=True), expected, rtol=0.03, atol=0.01)


def test_gaussian_counterfactual_keeps_the_residual_exactly():
    torch.manual_seed(0)
    likelihood = GaussianLikelihood(3, 5)
    likelihood.initialise(torch.randn(5), torch.rand(5) + 0.5)
    h, x = torch.randn(7, 3), torch.randn(7, 5)
    noise = likelihood.abduct(h, torch.ones(7, 1), x)
    torch.testing.assert_close(likelihood.predict(h, torch.ones(7, 1), noise), x)
    torch.testing.assert_close(
        likelihood(h, torch.ones(7, 1)).log_prob(x),
        torch.distributions.Normal(*likelihood._parameters_of(h)).log_prob(x).sum(-1),
    )


def test_quick_negative_binomial_is_the_negative_binomial():
    torch.manual_seed(0)
    mean, theta = torch.rand(3, 4, 6) * 20 + 0.1, torch.rand(6) * 3 + 0.2
    x = torch.poisson(torch.rand(4, 6) * 3)
    mean.requires_grad_(), theta.requires_grad_()
    expected = torch.distributions.NegativeBinomial(theta, logits=mean.log() - theta.log()).log_prob(x)
    found = NegativeBinomial(mean, theta).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(
        torch.autograd.grad(found.sum(), [mean, theta]),
        torch.autograd.grad(expected.sum(), [mean, theta]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.7, 11.9, 12.0, 60.0, 2000.0])
def test_poisson_quantiles_are_those_of_scipy(rate):
    torch.manual_seed(0)
    u = torch.rand(4000)
    count = poisson_quantile(torch.full_like(u, rate), u).numpy()
    expected = poisson.ppf(u.double().numpy(), rate)
    assert np.abs(count - expected).max() <= (rate >= 12)
    assert (count != expected).mean() < 0.02


def test_the_same_noise_serves_two_rates():
    """The difference of two predictions is the change of the rate: its variance is that of the added counts, not of both."""
    likelihood = _count(n_genes=40)
    h, library, noise = torch.randn(1, 3), torch.full((1, 1), 400.0), torch.ones(1, 40)
    means = []
    for offset in (0.0, torch.full((40,), 0.1) * (torch.arange(40) % 2)):
        torch.manual_seed(1)
        draws = [likelihood.predict(h, library, noise, offset) for _ in range(300)]
        means.append(torch.cat(draws))
    difference = means[1] - means[0]
    change = (means[1].mean(0) - means[0].mean(0)).abs()
    assert (difference.var(0) < 3 * change + 0.1).all()
    assert difference.var(0).mean() < 0.3 * (means[0].var(0) + means[1].var(0)).mean()
