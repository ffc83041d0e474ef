"""Ceilings, gap closed and bootstrap intervals against theory."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pertura import metrics as mt


def test_split_half_mse_is_the_sampling_variance():
    rng = np.random.default_rng(0)
    n, sd = 100, 1.5
    cells = rng.normal(scale=sd, size=(n, 2000)) + rng.gamma(2.0, size=2000)
    control = np.zeros(2000)
    table = mt.split_half_ceiling(cells, control, ["mse", "mae", "pearson_effect"], n_splits=30)
    assert table.shape == (30, 3)
    # Two means of n/2 cells differ with variance 2 sd^2 / (n/2).
    expected = 4 * sd**2 / n
    assert table["mse"].mean() == pytest.approx(expected, rel=0.05)
    full = mt.split_half_ceiling(cells, control, ["mse", "mae", "pearson_effect"], n_splits=30, spearman_brown=True)
    np.testing.assert_allclose(full["mse"], table["mse"] / 2)
    np.testing.assert_allclose(full["pearson_effect"], 2 * table["pearson_effect"] / (1 + table["pearson_effect"]))
    assert full["mae"].isna().all()


def test_spearman_brown_predicts_the_correlation_of_full_size_duplicates():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=4000) * 0.3
    first, second = (signal + rng.normal(size=(40, 4000)) * 2 for _ in range(2))
    zero = np.zeros(4000)
    target = mt.pearson_effect(first.mean(0), second.mean(0), zero)
    half = mt.split_half_ceiling(first, zero, "pearson_effect")["pearson_effect"].mean()
    corrected = mt.split_half_ceiling(first, zero, "pearson_effect", spearman_brown=True)["pearson_effect"].mean()
    assert abs(corrected - target) < 0.03 < abs(half - target)


def test_halves_of_controls_share_no_noise():
    """Cells without an effect: only shared controls make the halves agree."""
    rng = np.random.default_rng(0)
    cells, controls = rng.normal(size=(40, 500)), rng.normal(size=(40, 500))
    shared = mt.split_half_ceiling(cells, controls.mean(0), "pearson_effect", n_splits=20)["pearson_effect"].mean()
    own = mt.split_half_ceiling(cells, controls, "pearson_effect", n_splits=20)["pearson_effect"].mean()
    # correlation is the share of the variance that is of controls: 1/40 of 1/40 + 1/20
    assert shared == pytest.approx(1 / 3, abs=0.05)
    assert own == pytest.approx(0.0, abs=0.05)
    effect = 0.3 * rng.normal(size=500)
    cells, again = (effect + rng.normal(size=(40, 500)) for _ in range(2))
    other = rng.normal(size=(40, 500))
    full = mt.pearson_effect(again.mean(0), cells.mean(0), controls.mean(0), other.mean(0))
    ceiling = mt.split_half_ceiling(cells, sp.csr_matrix(controls), "pearson_effect", spearman_brown=True)
    assert ceiling["pearson_effect"].mean() == pytest.approx(full, abs=0.05)


def test_split_half_halves_are_disjoint_and_seeded():
    cells = np.diag(np.arange(1.0, 6.0))  # each cell has its own gene: halves share none
    table = mt.split_half_ceiling(cells, np.zeros(5), "mse", n_splits=20, seed=1)
    # 2 against 3 cells: sum over the first of (i/2)^2 plus over the second of (i/3)^2, over 5 genes.
    possible = {round((((a**2 + b**2) / 4) + (55 - a**2 - b**2) / 9) / 5, 9) for a in range(1, 6) for b in range(1, a)}
    assert set(table["mse"].round(9)) <= possible
    assert table["mse"].nunique() > 3
    again = mt.split_half_ceiling(sp.csr_matrix(cells), np.zeros(5), "mse", n_splits=20, seed=1)
    pd.testing.assert_frame_equal(again, table)


def test_split_half_errors():
    cells = np.random.default_rng(0).normal(size=(10, 4))
    for call, word in (
        (lambda: mt.split_half_ceiling(cells[:3], cells[0]), "`cells`"),
        (lambda: mt.split_half_ceiling(cells, cells[:3]), "`control`"),
        (lambda: mt.split_half_ceiling(cells, cells[0], "energy_distance"), "mean profiles"),
        (lambda: mt.split_half_ceiling(cells, cells[0], "pearson_effect_vs_reference"), "reference"),
        (lambda: mt.split_half_ceiling(cells, cells[0], n_splits=0), "`n_splits`"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


def test_interpolated_duplicate():
    np.testing.assert_allclose(mt.interpolated_duplicate([1.0, 1, 1], [3.0, 3, 3], [0.0, 1.0, 0.25]), [1.0, 3.0, 1.5])
    with pytest.raises(ValueError, match="`adjusted_p`"):
        mt.interpolated_duplicate([1.0], [3.0], [2.0])


def test_gap_closed():
    assert mt.gap_closed(0.75, 0.5, 1.0) == 0.5
    assert mt.gap_closed(0.4, 0.5, 1.0) == pytest.approx(-0.2)
    assert mt.gap_closed(0.2, 0.5, 0.1, higher_is_better=False) == pytest.approx(0.75)
    assert mt.gap_closed(0.2, 0.5, 0.1, metric="mse_top") == pytest.approx(0.75)
    assert np.isnan(mt.gap_closed(0.2, 0.5, 0.1))
    assert np.isnan(mt.gap_closed(0.2, 0.5, 0.5, metric="mse"))
    # Ratio of variances: 0.5 and 1.5 are equally far from the best value.
    assert mt.gap_closed(1.5, 0.0, 1.0, metric="variance_ratio") == pytest.approx(0.5)
    np.testing.assert_allclose(mt.gap_closed([0.5, 1.0], np.zeros(2), np.array([1.0, 0.0])), [0.5, np.nan])
    series = [pd.Series(v, index=["a", "b"]) for v in ([0.5, 1.0], [0.0, 0.0], [1.0, -1.0])]
    pd.testing.assert_series_equal(mt.gap_closed(*series), pd.Series([0.5, np.nan], index=["a", "b"]))
    assert np.isnan(mt.gap_closed(np.nan, 0.5, 1.0))


def test_bootstrap_interval_matches_normal_theory_and_covers():
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 1.0, size=400)
    estimate, low, high = mt.bootstrap_interval(x, level=0.9)
    assert estimate == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(1.645 * x.std() / 20, rel=0.08)
    inside = []
    for seed in range(300):
        sample = np.random.default_rng(seed).normal(size=40)
        interval = mt.bootstrap_interval(sample, level=0.8, n_resamples=500, seed=seed)
        inside.append(interval.low <= 0 <= interval.high)
    assert np.mean(inside) == pytest.approx(0.8, abs=0.07)


def test_bootstrap_interval_paired_and_degenerate():
    rng = np.random.default_rng(0)
    level = rng.normal(size=50) * 10
    model = level + 0.1 + 0.01 * rng.normal(size=50)
    paired = mt.bootstrap_interval(model, level)
    assert 0.09 < paired.low < paired.high < 0.11
    unpaired = mt.bootstrap_interval(model)
    assert unpaired.high - unpaired.low > 1
    assert mt.bootstrap_interval(model, level) == paired
    assert mt.bootstrap_interval([1.0, np.nan, 3.0]).estimate == 2.0
    one = mt.bootstrap_interval([2.0])
    assert one.estimate == 2.0 and np.isnan(one.low)
    assert np.isnan(mt.bootstrap_interval([np.nan]).estimate)
    with pytest.raises(ValueError, match="`paired`"):
        mt.bootstrap_interval(model, level[:3])
    with pytest.raises(ValueError, match="`level`"):
        mt.bootstrap_interval(model, level=90)
    with pytest.raises(ValueError, match="`values`"):
        mt.bootstrap_interval(np.ones((2, 2)))
