"""Probabilistic scores against integrals, normal closed forms and simulated calibration."""

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import norm

from pertura import metrics as mt


def crps_normal(y, mu=0.0, sd=1.0):
    z = (y - mu) / sd
    return sd * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))


def test_crps_is_the_integral_of_the_squared_cdf_difference():
    rng = np.random.default_rng(0)
    draws, y = rng.normal(size=7), 0.3
    grid = np.linspace(-8, 8, 400_001)
    cdf = (draws[:, None] <= grid).mean(0)
    expected = trapezoid((cdf - (grid >= y)) ** 2, grid)
    assert mt.crps(draws, y, fair=False) == pytest.approx(expected, abs=1e-4)


def test_fair_crps_has_no_bias_at_few_draws():
    rng = np.random.default_rng(0)
    draws, y = rng.normal(size=(4, 200_000)), np.full(200_000, 0.7)
    assert mt.crps(draws, y) == pytest.approx(crps_normal(0.7), abs=0.005)
    assert mt.crps(draws, y, fair=False) > crps_normal(0.7) + 0.1


def test_crps_shapes_and_one_draw():
    rng = np.random.default_rng(0)
    draws, y = rng.normal(size=(11, 3, 4)), rng.normal(size=(3, 4))
    each = mt.crps(draws, y, reduce=False)
    assert each.shape == (3, 4)
    assert each[1, 2] == pytest.approx(mt.crps(draws[:, 1, 2], y[1, 2]))
    assert mt.crps(draws, y) == pytest.approx(each.mean())
    assert mt.crps(draws[:1], y, fair=False) == pytest.approx(np.abs(draws[0] - y).mean())
    assert mt.crps(np.broadcast_to(y, (5, 3, 4)), y) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="`draws`"):
        mt.crps(draws[:1], y)
    with pytest.raises(ValueError, match="`draws`"):
        mt.crps(draws, y[:2])


def test_interval_scores_by_hand():
    low, high, y = np.zeros(4), np.full(4, 2.0), np.array([1.0, 2.0, 3.0, -1.5])
    assert mt.interval_coverage(low, high, y) == 0.5
    assert mt.interval_width(low, high) == 2.0
    assert mt.interval_score(low, high, y, level=0.9) == pytest.approx(2 + (2 / 0.1) * (1 + 1.5) / 4)


def test_interval_score_is_best_at_the_true_quantiles():
    y = np.random.default_rng(0).normal(size=8_000)
    half = norm.ppf(0.95)
    score = [mt.interval_score(np.full_like(y, -h), np.full_like(y, h), y) for h in (0.8 * half, half, 1.2 * half)]
    assert score[1] < min(score[0], score[2])


def test_coverage_allows_for_the_sampling_error_of_the_measured_truth():
    rng = np.random.default_rng(0)
    n, level = 40_000, 0.9
    z = norm.ppf(0.95)
    posterior_sd, se = rng.uniform(0.5, 2, n), rng.uniform(0.5, 2, n)
    mean = rng.normal(size=n)
    expectation = mean + posterior_sd * rng.normal(size=n)
    measured = expectation + se * rng.normal(size=n)
    low, high = mean - z * posterior_sd, mean + z * posterior_sd
    assert mt.interval_coverage(low, high, expectation) == pytest.approx(level, abs=0.007)
    assert mt.interval_coverage(low, high, measured) < 0.8
    assert mt.interval_coverage(low, high, measured, truth_se=se) == pytest.approx(level, abs=0.007)
    # An overconfident interval is still found out.
    assert mt.interval_coverage(mean, mean, measured, truth_se=se) < 0.75
    low, high = mean - norm.ppf(0.75) * posterior_sd, mean + norm.ppf(0.75) * posterior_sd
    assert mt.interval_coverage(low, high, measured, truth_se=se, level=0.5) == pytest.approx(0.5, abs=0.01)


def test_calibration_curve():
    rng = np.random.default_rng(0)
    location = rng.normal(size=8_000)
    y = location + rng.normal(size=8_000)
    for n_draws in (19, 99):  # level 0.9 is reachable with 19 draws
        draws = location + rng.normal(size=(n_draws, 8_000))
        curve = mt.calibration_curve(draws, y, levels=[0.1, 0.5, 0.9])
        np.testing.assert_allclose(curve["coverage"], curve["level"], atol=0.016)
        assert mt.calibration_error(draws, y) < 0.016
        assert mt.calibration_error(0.3 * (draws - location) + location, y) > 0.2
    assert curve["width"].is_monotonic_increasing


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: mt.interval_coverage([1.0], [0.0], [0.5]), "`low`"),
        (lambda: mt.interval_coverage([0.0], [1.0], [0.5, 0.5]), "`truth`"),
        (lambda: mt.interval_coverage([0.0], [1.0], [0.5], truth_se=[-1.0]), "`truth_se`"),
        (lambda: mt.interval_score([0.0], [1.0], [0.5], level=90), "`level`"),
        (lambda: mt.crps([0.0, np.nan], 0.5), "`draws`"),
    ],
)
def test_errors(call, word):
    with pytest.raises(ValueError, match=word):
        call()
