import numpy as np
import pytest
import torch
from scipy.stats import nbinom

from pertura.nn import CountLikelihood, GaussianLikelihood
from pertura.nn._likelihoods import NegativeBinomial, Point, RectifiedGaussian


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
    likelihood.initialize(mean, torch.ones(6))
    rate = likelihood.rate(torch.zeros(2, 3), torch.tensor([[100.0], [1000.0]]))
    torch.testing.assert_close(rate.sum(1), torch.tensor([100.0, 1000.0]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rate[0] / 100, mean / mean.sum(), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_other_genes_have_the_rest_of_the_library(beta):
    likelihood, plain = _count(beta), _count(beta)
    likelihood.add_rest()
    assert {n for n, _ in likelihood.named_parameters()} - {n for n, _ in plain.named_parameters()} == {
        "log_theta_rest"
    }
    mean = torch.tensor([5.0, 1.0, 0.5, 0.1, 3.0, 20.0])
    likelihood.initialize(mean, torch.ones(6), library=100.0)
    h, library = torch.zeros(1, 3), torch.tensor([[1000.0]])
    rate = likelihood.rate(h, library)
    torch.testing.assert_close(rate[0], mean * 10, rtol=2e-2, atol=1e-2)
    # the share of the genes follows their activations, with gradients and without, by an offset and by the state
    with torch.no_grad():
        moved = likelihood.rate(h, library, torch.full((6,), 1.0))
        likelihood.activation.bias += 1.0
        following = likelihood.rate(h, library)
    assert 650 < moved.sum() < 900
    assert 400 < following.sum() < 600
    torch.testing.assert_close(likelihood.rate(h, library), following)
    by_curve = likelihood.moved_by(likelihood.activation(h), library, 0.0).mean
    torch.testing.assert_close(by_curve, following)


def test_counts_of_other_genes_are_scored():
    likelihood = _count(3.0)
    likelihood.add_rest()
    likelihood.initialize(torch.ones(6), torch.ones(6), library=20.0)
    h, library, x = torch.randn(4, 3), torch.tensor([[20.0], [40.0], [60.0], [80.0]]), torch.ones(4, 6)
    found = likelihood(h, library, 0.5)
    rest, theta = library[:, 0] - 6, likelihood.log_theta_rest.exp()
    mean = library[:, 0] - found.mean.sum(1)
    assert (mean > 1).all()
    genes = NegativeBinomial(found.mean, likelihood.theta).log_prob(x).sum(1)
    expected = torch.distributions.NegativeBinomial(theta, logits=(mean / theta).log()).log_prob(rest)
    torch.testing.assert_close(found.log_prob(x), genes + expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.expand((3, 4)).log_prob(x), (genes + expected).expand(3, 4), rtol=1e-4, atol=1e-4)
    found.log_prob(x).sum().backward()
    assert likelihood.log_theta_rest.grad.abs() > 0
    # effects that would take more than the library leave a little
    assert likelihood(h, library, 9.0).log_prob(x).isfinite().all()


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_an_offset_moves_its_gene_alone(beta):
    likelihood, h, library = _count(beta), torch.randn(4, 3), torch.full((4, 1), 1000.0)
    offset = torch.tensor([0.0, 0.7, 0.0, 0.0, -0.4, 0.0])
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            rate, moved = (likelihood.rate(h, library, o) for o in (0.0, offset))
        ratio = moved / rate
        torch.testing.assert_close(ratio[:, offset == 0], torch.ones(4, 4))
        assert (ratio[:, 1] > 1.3).all() and (ratio[:, 4] < 0.85).all()
    likelihood.activation.weight.data.zero_()
    torch.testing.assert_close(
        likelihood(h, library, offset).base_dist.mean,
        likelihood.moved_by(likelihood.activation(h), library, offset).mean,
    )


def test_an_offset_of_a_gaussian_is_added_to_the_mean():
    torch.manual_seed(0)
    likelihood, h, library = GaussianLikelihood(3, 5), torch.randn(4, 3), torch.ones(4, 1)
    likelihood.initialize(torch.randn(5), torch.rand(5) + 0.5)
    offset = torch.randn(4, 5)
    own, moved = (likelihood(h, library, o).base_dist for o in (0.0, offset))
    torch.testing.assert_close(moved.loc - own.loc, offset)
    assert torch.equal(moved.scale, own.scale)


def test_linear_on_log1p_where_the_link_is_sharp():
    """Far above zero, a step of the activation is the same step of log1p(counts per 10,000)."""
    likelihood = CountLikelihood(1, 1, link_sharpness=8.0)
    activation = torch.tensor([1.0, 1.5, 2.0])
    per_10k = torch.expm1(torch.nn.functional.softplus(activation, beta=8.0))
    steps = torch.log1p(per_10k).diff()
    torch.testing.assert_close(steps, torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)
    assert likelihood.link_sharpness == 8.0


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


def _two_distributions(n_draws=3, n_cells=8, n_genes=5):
    torch.manual_seed(0)
    theta, means = torch.rand(n_genes) * 3 + 0.3, torch.rand(2, n_draws, n_cells, n_genes) * 4 + 0.05
    return [NegativeBinomial(mean, theta).to_event(1).base_dist for mean in means]


def test_a_cell_asked_for_its_own_distribution_gets_its_own_counts():
    own, other = _two_distributions()
    x, depth = own.sample()[0], torch.rand(8) * 500 + 100
    noise = own.abduct(x)
    assert torch.equal(own.replay(noise), x.expand(3, 8, 5))
    assert torch.equal(own.conditional_mean(noise), x.expand(3, 8, 5))
    on_log1p = own.conditional_mean(noise, "log1p", depth)
    torch.testing.assert_close(on_log1p, torch.log1p(1e4 * x / depth[:, None]).expand(3, 8, 5))
    assert not torch.equal(other.replay(noise), x.expand(3, 8, 5))


def test_replays_share_the_noise_and_average_to_the_conditional_mean():
    own, other = _two_distributions()
    x, depth = own.sample()[0], torch.rand(8, 1) * 500 + 100
    noise = own.abduct(x)
    first = other.replay(noise)
    assert torch.equal(first, other.replay(noise))
    assert noise.v.shape == (3, 8, 5)
    replays = torch.stack([other.replay(own.abduct(x)) for _ in range(4000)])
    assert not torch.equal(replays[0], replays[1])
    torch.testing.assert_close(replays.mean(0), other.conditional_mean(noise), atol=0.15, rtol=0.02)
    on_log1p = torch.log1p(1e4 * replays / depth).mean(0)
    torch.testing.assert_close(on_log1p, other.conditional_mean(noise, "log1p", depth), atol=0.12, rtol=0.02)


def test_expectation_and_draws_are_of_one_distribution():
    own, _ = _two_distributions(1, 2, 5)
    depth = torch.tensor([300.0, 900.0])
    draws = own.sample((50_000,))
    torch.testing.assert_close(own.expectation("counts"), own.mean)
    torch.testing.assert_close(draws.mean(0), own.expectation(), rtol=0.04, atol=0.02)
    on_log1p = torch.log1p(1e4 * draws / depth[:, None]).mean(0)
    torch.testing.assert_close(on_log1p, own.expectation("log1p", depth), rtol=0, atol=0.04)
    # not the mean and variance alone: the probabilities of scipy
    mean, theta = own._mean[0], own._theta
    for k in range(4):
        expected = nbinom.pmf(k, theta, theta / (theta + mean))
        np.testing.assert_allclose((draws[:, 0] == k).float().mean(0), expected, atol=0.01)


def test_expanded_distributions_keep_their_noise():
    own, _ = _two_distributions(1, 8, 5)
    x = own.sample()[0]
    expanded = own.expand(torch.Size((4, 8, 5)))
    assert torch.equal(expanded.replay(own.abduct(x)), x.expand(4, 8, 5))
    gaussian = GaussianLikelihood(3, 5)(torch.randn(8, 3), torch.ones(8, 1)).base_dist.expand((4, 8, 5))
    assert torch.equal(gaussian.expectation()[0], gaussian.expectation()[3])
    point = Point(torch.rand(8, 5), "log1p").to_event(1).expand((4, 8)).base_dist
    assert point.native_scale == "log1p"
    assert point.expectation().shape == (4, 8, 5)


def test_gaussian_distribution_keeps_the_residual():
    torch.manual_seed(0)
    likelihood = GaussianLikelihood(3, 5)
    own, other = (likelihood(torch.randn(7, 3), torch.ones(7, 1)).base_dist for _ in range(2))
    x = torch.randn(7, 5)
    noise = own.abduct(x)
    torch.testing.assert_close(own.replay(noise), x)
    torch.testing.assert_close(other.replay(noise) - other.loc, (x - own.loc) * other.scale / own.scale)
    assert torch.equal(other.conditional_mean(noise, scale="layer"), other.replay(noise))
    assert torch.equal(other.expectation(scale="layer", depth=None), other.loc)
    with pytest.raises(ValueError, match="scale='log1p'"):
        other.expectation("log1p")


def test_point_is_converted_between_scales():
    counts, depth = torch.tensor([[0.0, 2.0], [5.0, 10.0]]), torch.tensor([1e4, 2e4])
    point = Point(counts, "counts")
    on_log1p = point.expectation("log1p", depth)
    torch.testing.assert_close(on_log1p, torch.log1p(torch.tensor([[0.0, 2.0], [2.5, 5.0]])))
    back = Point(on_log1p, "log1p")
    for convert in (back.expectation, lambda scale, depth: back.replay(None, scale, depth)):
        torch.testing.assert_close(convert("counts", depth[:, None]), counts)
    torch.testing.assert_close(back.conditional_mean(point.abduct(counts), scale="counts", depth=depth), counts)
    assert torch.equal(Point(-counts, "log1p").expectation("counts", depth), torch.zeros(2, 2))
    assert torch.equal(Point(counts, "layer").expectation("log1p"), counts)
    assert torch.equal(back.expectation(), on_log1p)
    with pytest.raises(ValueError, match="depth is None"):
        back.expectation("counts")
    with pytest.raises(ValueError, match="'log1p' to 'layer'"):
        back.expectation("layer")
    with pytest.raises(ValueError, match="native_scale='tpm'"):
        Point(counts, "tpm")


def test_rectified_gaussian_reads_values_below_zero_as_zero():
    """Closed-form means are those of draws on both scales; a cell gets its own expression back, zeros included."""
    torch.manual_seed(0)
    loc, scale = torch.tensor([[-1.0, 0.2, 3.0]]), torch.tensor([[0.8, 0.5, 0.3]])
    own, depth = RectifiedGaussian(loc, scale), torch.tensor([2e4])
    draws = own.sample((400_000,))
    assert draws.min() == 0.0
    torch.testing.assert_close(draws.mean(0), own.expectation(), atol=5e-3, rtol=0)
    torch.testing.assert_close((2 * draws.expm1()).mean(0), own.expectation("counts", depth), atol=5e-3, rtol=5e-3)
    x = torch.tensor([[0.0, 0.0, 2.5]])
    noise = own.abduct(x)
    torch.testing.assert_close(own.replay(noise), x)
    torch.testing.assert_close(own.conditional_mean(noise, "counts", depth), 2 * x.expm1())
    assert RectifiedGaussian(loc - 5, scale).replay(noise)[0, 0] == 0.0
    torch.testing.assert_close(own.log_prob(x), torch.distributions.Normal(loc, scale).log_prob(x))
    assert own.expand((4, 3)).sample().shape == (4, 3)
