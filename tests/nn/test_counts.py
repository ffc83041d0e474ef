"""Counts under another mean, against scipy's negative binomial."""

import numpy as np
import pytest
import torch
from scipy.special import gammaln, xlogy
from scipy.stats import gamma as gamma_distribution
from scipy.stats import nbinom, poisson

from pertura.nn import _counts
from pertura.nn._counts import conditional_mean, expected, replay


def _nbinom(mean, theta):
    return nbinom(theta, theta / (theta + mean))


def _one(value):
    return torch.tensor([[float(value)]])


def _g(k, depth):
    return np.asarray(k, dtype=float) if depth is None else np.log1p(1e4 * np.asarray(k) / depth)


def _brute_force_mean(x, mean, mean2, theta, depth):
    """Overlap of the intervals of scipy's cumulative probabilities."""
    before, after = _nbinom(mean, theta), _nbinom(mean2, theta)
    low, high = before.cdf(x - 1), before.cdf(x)
    k = np.arange(int(after.ppf(high)) + 3)
    edges = np.clip(after.cdf(np.append(-1, k)), low, high)
    edges[-1] = high
    return (np.diff(edges) * _g(k, depth)).sum() / (high - low)


EXTREMES = [
    (50, 0.01),
    (0, 1000.0),
    (20_000, 1e4),
    (20_000, 0.3),
    (1, 1e-8),
    (0, 1e-8),
    (300, 290.0),
    (257, 1e5),
    (7, 3.0),
]


@pytest.mark.parametrize("theta", [np.exp(-5), 0.3, 2.0, 100.0, np.exp(8)])
@pytest.mark.parametrize(("x", "mean"), EXTREMES)
def test_the_same_mean_gives_the_counts_back(x, mean, theta):
    theta = torch.tensor([theta], dtype=torch.float32)
    depth = torch.tensor([731.0])
    for v in (0.0, 1e-7, 0.3, 0.999, 1.0 - 2**-24):
        assert replay(_one(x), _one(mean), _one(mean), theta, _one(v)).item() == x
    assert conditional_mean(_one(x), _one(mean), _one(mean), theta).item() == x
    found = conditional_mean(_one(x), _one(mean), _one(mean), theta, "log1p", depth)
    assert found.item() == np.float32(np.log1p(1e4 * x / 731.0))
    # the rounding of a decoder is no other mean
    rounded = _one(mean) * (1.0 + 3e-7)
    assert replay(_one(x), _one(mean), rounded, theta, _one(1.0 - 2**-24)).item() == x


@pytest.mark.parametrize("theta", [np.exp(-5), 0.3, 2.0, 100.0, np.exp(8)])
@pytest.mark.parametrize("mean", [0.02, 0.7, 6.0, 40.0, 200.0])
def test_a_mean_close_by_gives_nearly_the_counts_back(mean, theta):
    """Without the short cut of equal means: what is summed loses no precision that matters, in either tail."""
    x = torch.arange(400.0)[None]
    means, thetas = torch.full_like(x, mean), torch.full((400,), float(theta))
    for factor in (1.0 - 2e-5, 1.0 + 2e-5):
        found = conditional_mean(x, means, means * factor, thetas)
        torch.testing.assert_close(found, x, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("depth", [None, 900.0])
@pytest.mark.parametrize("theta", [0.05, 0.5, 3.0, 60.0])
def test_conditional_mean_is_the_overlap_of_the_intervals(theta, depth):
    cases = [
        (x, mean, mean * fold)
        for mean in (0.05, 0.6, 4.0, 14.0, 30.0)
        for x in (0, 1, 2, 3, 4, 5, 11, 40)
        for fold in (0.01, 0.4, 0.9, 1.1, 1.8, 3.0, 12.0)
        if _nbinom(mean, theta).sf(x - 1) > 1e-4 and _nbinom(mean, theta).cdf(x) > 1e-12
    ]
    x, mean, mean2 = (torch.tensor(values, dtype=torch.float64)[:, None] for values in zip(*cases, strict=True))
    expected_ = [_brute_force_mean(*case, theta, depth) for case in cases]
    scale = {} if depth is None else {"scale": "log1p", "depth": torch.full((len(cases),), depth)}
    found = conditional_mean(x, mean, mean2, torch.tensor([theta]), **scale)
    np.testing.assert_allclose(found[:, 0], expected_, rtol=2e-4, atol=2e-4)


def test_replay_is_the_quantile():
    rng = np.random.default_rng(0)
    mean, fold = rng.lognormal(0.0, 1.5, 3000), rng.lognormal(0.0, 1.0, 3000)
    theta, v = np.exp(rng.uniform(-3, 5, 3000)), rng.uniform(0.01, 0.99, 3000)
    x = _nbinom(mean, theta).rvs(random_state=rng)
    low, high = _nbinom(mean, theta).cdf(x - 1), _nbinom(mean, theta).cdf(x)
    wanted = _nbinom(mean * fold, theta).ppf(low + v * (high - low))
    rows = [torch.tensor(one, dtype=torch.float64)[None] for one in (x, mean, mean * fold)]
    found = replay(*rows, torch.tensor(theta), torch.tensor(v)[None])[0].numpy()
    assert (np.abs(found - wanted) <= 1e-3 * wanted + (found != wanted)).all()
    assert (found != wanted).mean() < 5e-3
    assert (found == np.floor(found)).all()


GRID = np.exp(np.linspace(np.log(1e-4), np.log(1e5), 1200))


@pytest.mark.parametrize("theta", [np.exp(-5), 0.3, 2.0, 100.0, np.exp(8)])
@pytest.mark.parametrize(("x", "mean"), [*EXTREMES, (256, 100.0), (0, 0.5), (3, 300.0), (40, 30.0)])
def test_more_expected_is_never_less_counted(x, mean, theta):
    """Across all regimes: a knock-out, a large mean, a count far in the tail."""
    mean2 = torch.tensor(np.sort(np.append(GRID, mean)), dtype=torch.float32)[None]
    theta = torch.full((mean2.shape[1],), float(theta))
    start, counts = torch.full_like(mean2, mean), torch.full_like(mean2, float(x))
    for v in (0.01, 0.5, 0.97):
        found = replay(counts, start, mean2, theta, torch.full_like(mean2, v))
        assert (found.diff() >= 0).all()
    for scale in ("counts", "log1p"):
        found = conditional_mean(counts, start, mean2, theta, scale, torch.tensor([800.0]))
        assert torch.isfinite(found).all()
        assert (found.diff() >= -1e-5 * (1.0 + found[:, 1:])).all()


@pytest.mark.parametrize(
    ("mean", "theta", "scale"),
    [
        (0.5, 2.0, "counts"),
        (20.0, 0.4, "log1p"),
        (200.0, 5.0, "counts"),
        (900.0, 2000.0, "counts"),
        (2000.0, 1.0, "log1p"),
    ],
)
@pytest.mark.parametrize("fold", [0.002, 0.3, 1.6, 9.0])
def test_conditional_mean_is_the_mean_of_replays(mean, theta, scale, fold):
    rng = np.random.default_rng(1)
    x = torch.tensor(_nbinom(mean, theta).rvs(40, random_state=rng), dtype=torch.float32)[None]
    v = (torch.arange(4000.0) + 0.5)[:, None, None] / 4000.0
    means, theta = torch.full((1, 1, 40), mean), torch.full((40,), theta)
    depth = torch.tensor([2500.0])
    draws = replay(x, means, means * fold, theta, v).double()
    if scale == "log1p":
        draws = torch.log1p(draws * 4.0)
    found = conditional_mean(x, means, means * fold, theta, scale, depth)[0]
    torch.testing.assert_close(found.double(), draws.mean(0), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("theta", [np.exp(-5), 0.3, 5.0, 100.0, np.exp(8)])
@pytest.mark.parametrize("mean", [0.05, 2.0, 30.0, 240.0, 2000.0])
@pytest.mark.parametrize("fold", [0.001, 0.5, 2.0, 30.0])
def test_counts_of_one_mean_become_counts_of_the_other(mean, theta, fold):
    """Drawn under one mean and replayed under another: mean, variance and zeros are those of the other."""
    n = 20_000
    rng = np.random.default_rng(2)
    u = (rng.permutation(n) + rng.uniform(size=n)) / n
    before, after = _nbinom(mean, theta), _nbinom(mean * fold, theta)
    x = torch.tensor(before.ppf(u), dtype=torch.float32)[None]
    means, thetas = torch.full((1, n), mean), torch.full((n,), theta)
    found = replay(x, means, means * fold, thetas, torch.tensor(rng.uniform(size=n))[None]).double()[0].numpy()
    error = np.sqrt(after.var() / n)
    assert abs(found.mean() - after.mean()) < 4 * error + 0.01 * after.mean()
    assert abs((found == 0).mean() - after.pmf(0)) < 0.015
    # quantiles, as tails are heavy
    levels = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    low, high = after.ppf(levels - 0.015), after.ppf(levels + 0.015)
    quantiles = np.quantile(found, levels, method="inverted_cdf")
    assert ((quantiles >= low * 0.98 - 1) & (quantiles <= high * 1.02 + 1)).all()
    if max(mean, mean * fold) <= 250:
        edges = np.unique(after.ppf(np.linspace(0.05, 0.95, 12)))
        observed = np.bincount(np.searchsorted(edges, found), minlength=len(edges) + 1)
        probability = np.diff(np.concatenate([[0], after.cdf(edges), [1]]))
        kept = probability > 1e-3
        # x itself is stratified, so that chi-square is below, not at, its degrees of freedom
        statistic = ((observed - n * probability) ** 2 / (n * probability))[kept].sum()
        assert statistic < 3 * kept.sum() + 10


def _brute_force_expected(mean, theta, depth):
    """Sum over all counts where that is possible, else a fine quadrature over the gamma of a Poisson's log."""
    # the tail falls as exp(-k theta / mean)
    top = int(mean + 12 * np.sqrt(mean + mean**2 / theta) + 30 * mean / theta + 60)
    if top < 3e6:
        k = np.arange(top + 1)
        log_p = gammaln(k + theta) - gammaln(theta) - gammaln(k + 1.0)
        log_p += xlogy(k, mean / (mean + theta)) - theta * np.log1p(mean / theta)
        return (np.exp(log_p) * _g(k, depth)).sum()
    # quantiles of the gamma, and exact Poisson sums or the delta method
    small = 200.0
    u, weight = np.polynomial.legendre.leggauss(64)
    edges = np.log(gamma_distribution.ppf([1e-12, 1 - 1e-13], theta, scale=mean / theta).clip(1e-12))
    cuts = np.linspace(*edges, 60)
    total = 0.0
    k = np.arange(500)
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        rate = np.exp(0.5 * (b - a) * u + 0.5 * (a + b))
        density = gamma_distribution.pdf(rate, theta, scale=mean / theta) * rate
        value = np.where(
            rate < small,
            (poisson.pmf(k, np.minimum(rate, small)[:, None]) * _g(k, depth)).sum(1),
            _g(rate, depth) - 0.5 * rate * (1e4 / depth) ** 2 / (1.0 + rate * 1e4 / depth) ** 2,
        )
        total += 0.5 * (b - a) * (weight * density * value).sum()
    return total


@pytest.mark.parametrize("depth", [100.0, 3000.0, 1e6])
@pytest.mark.parametrize("theta", [np.exp(-5), np.exp(-2), 1.0, np.exp(3), np.exp(8)])
def test_expectations_without_draws(theta, depth):
    means = np.array([0.0, 1e-8, 1e-3, 0.03, 0.4, 2.0, 5.9, 6.1, 30.0, 256.0, 3000.0, 1e5])
    brute_force = [_brute_force_expected(mean, theta, depth) if mean else 0.0 for mean in means]
    found = expected(torch.tensor(means)[None], torch.full((12,), theta), "log1p", torch.tensor([depth]))[0]
    np.testing.assert_allclose(found, brute_force, atol=1e-3, rtol=0)


def test_expected_counts_are_the_mean():
    mean = torch.rand(3, 4, 5)
    assert torch.equal(expected(mean, torch.ones(5), "counts"), mean)


def test_shapes_broadcast_over_draws_and_threads_agree(monkeypatch):
    torch.manual_seed(0)
    mean, mean2 = torch.rand(6, 9, 4) * 3 + 0.1, torch.rand(6, 9, 4) * 3 + 0.1
    x, theta, depth, v = torch.poisson(mean[0]), torch.rand(4) + 0.5, torch.rand(9) * 1e3 + 500, torch.rand(6, 9, 4)
    found = conditional_mean(x, mean, mean2, theta, "log1p", depth)
    assert found.shape == (6, 9, 4)
    for draw in range(6):
        one = conditional_mean(x, mean[draw], mean2[draw], theta, "log1p", depth[:, None])
        assert torch.equal(found[draw], one)
        assert torch.equal(replay(x, mean, mean2, theta, v)[draw], replay(x, mean[draw], mean2[draw], theta, v[draw]))
        assert torch.equal(expected(mean, theta, "log1p", depth)[draw], expected(mean[draw], theta, "log1p", depth))
    # one draw of the first mean serves all of the second, in any number of leading dimensions
    assert torch.equal(
        conditional_mean(x, mean[0], mean2.view(2, 3, 9, 4), theta).view(6, 9, 4),
        conditional_mean(x, mean[:1].expand(6, 9, 4), mean2, theta),
    )
    # a depth of each draw
    depths = torch.rand(6, 9, 1) * 1e3 + 500
    assert torch.equal(expected(mean, theta, "log1p", depths)[5], expected(mean[5], theta, "log1p", depths[5]))
    # a single cell without a leading dimension
    assert torch.equal(
        conditional_mean(x[2], mean[0, 2], mean2[0, 2], theta), conditional_mean(x, mean[0], mean2[0], theta)[2]
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    repeated = mean.repeat(1, 100, 20), mean2.repeat(1, 100, 20)
    many = conditional_mean(x.repeat(100, 20), *repeated, theta.repeat(20), "log1p", depth.repeat(100))
    assert torch.equal(many, found.repeat(1, 100, 20))


def test_cells_are_split_over_the_threads_of_torch(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen = []
    _counts._by_cells(lambda a, b: seen.append((int(a), int(b))), 10, 10**6)
    assert sorted(seen) == [(0, 3), (3, 6), (6, 10)]


def test_dtype_gradient_and_what_is_not_a_number():
    mean = torch.tensor([[1.0, float("nan"), float("inf"), 2.0]], dtype=torch.float64, requires_grad=True)
    x, theta = torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.ones(4)
    for found in (
        conditional_mean(x, torch.ones(1, 4), mean, theta),
        replay(x, torch.ones(1, 4), mean, theta, torch.full((1, 4), 0.5)),
        expected(mean, theta, "log1p", torch.tensor([1e3])),
    ):
        assert found.dtype == torch.float64
        assert not found.requires_grad
        assert torch.isfinite(found).tolist() == [[True, False, False, True]]


def test_errors_say_what_to_pass():
    mean = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"depth is None"):
        expected(mean, torch.ones(3), "log1p")
    with pytest.raises(ValueError, match=r"scale='layer'"):
        conditional_mean(mean, mean, mean, torch.ones(3), "layer")
    with pytest.raises(ValueError, match=r"theta has shape \(2,\)"):
        expected(mean, torch.ones(2), "log1p", torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device():
    mean, x = torch.rand(2, 3, 4, device="cuda") + 0.5, torch.ones(3, 4, device="cuda")
    theta = torch.ones(4, device="cuda")
    found = conditional_mean(x, mean, mean * 2, theta)
    assert found.device == mean.device
    torch.testing.assert_close(found.cpu(), conditional_mean(x.cpu(), mean.cpu(), mean.cpu() * 2, theta.cpu()))
