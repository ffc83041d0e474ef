from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pertura import benchmark as bm


def table(values: dict[str, dict[str, list[float]]], metric: str = "pearson_effect") -> pd.DataFrame:
    """Results of models: condition -> values of its runs."""
    rows = [
        {
            "dataset": "d",
            "split": "unseen_context",
            "held_out": f"context={context}",
            "perturbation": "stim",
            "dose": "",
            "context": context,
            "model": model,
            "seed": seed,
            "metric": metric,
            "value": value,
            "seconds": 2.0 + seed,
            "peak_mb": 100.0 + seed,
        }
        for model, conditions in values.items()
        for context, runs in conditions.items()
        for seed, value in enumerate(runs)
    ]
    return pd.DataFrame(rows)


HAND = {
    "MeanEffect": {"a": [0.5], "b": [0.7]},
    "model": {"a": [0.6, 0.8], "b": [0.9, 0.8]},
    "ceiling": {"a": [0.9], "b": [1.0]},
}


def test_by_hand():
    s = bm.summarize(table(HAND)).set_index("model")
    assert s.loc["model", "mean"] == pytest.approx((0.7 + 0.85) / 2)
    assert s.loc["model", "gain"] == pytest.approx(0.775 - 0.6)
    assert s.loc["model", "gap_closed"] == pytest.approx((0.775 - 0.6) / (0.95 - 0.6))
    assert s.loc["MeanEffect", "gap_closed"] == 0
    assert s.loc["ceiling", "gap_closed"] == pytest.approx(1) and np.isnan(s.loc["ceiling", "gain"])
    assert s.loc["model", ["n_conditions", "n_runs"]].tolist() == [2, 2]
    assert s.loc["MeanEffect", "n_runs"] == 1
    assert s.loc["model", "seconds"] == 2.5 and s.loc["model", "peak_mb"] == 101.0
    # Two conditions with one run: resamples are aa, ab, bb.
    assert s.loc["MeanEffect", ["low", "high"]].tolist() == pytest.approx([0.5, 0.7])


def test_a_constant_gain_has_no_spread():
    """Conditions are the same for both models in every resample: only then does what they share cancel."""
    base = np.random.default_rng(0).normal(0.5, 0.2, 8)
    values = {
        "MeanEffect": {str(i): [v] for i, v in enumerate(base)},
        "model": {str(i): [v + 0.1] for i, v in enumerate(base)},
        "ceiling": {str(i): [v + 0.4] for i, v in enumerate(base)},
    }
    s = bm.summarize(table(values)).set_index("model").loc["model"]
    assert s[["gain", "gain_low", "gain_high"]].tolist() == pytest.approx([0.1] * 3)
    assert s[["gap_closed", "gap_low", "gap_high"]].tolist() == pytest.approx([0.25] * 3)
    assert s["high"] - s["low"] > 0.1


def test_errors_count_downwards():
    values = {
        "MeanEffect": {"a": [0.4], "b": [0.2]},
        "model": {"a": [0.3], "b": [0.1]},
        "ceiling": {"a": [0.1], "b": [0.1]},
    }
    s = bm.summarize(table(values, "mse")).set_index("model").loc["model"]
    assert s["gain"] == pytest.approx(0.1)
    assert s["gap_closed"] == pytest.approx((0.3 - 0.2) / (0.3 - 0.1))


def test_coverage_is_compared_by_its_distance_from_the_level():
    values = {"MeanEffect": {"a": [0.7], "b": [0.7]}, "model": {"a": [0.95], "b": [0.95]}}
    s = bm.summarize(table(values, "interval_coverage_top")).set_index("model").loc["model"]
    assert s["gain"] == pytest.approx(0.2 - 0.05)
    assert np.isnan(s["gap_closed"])


def test_no_gap_where_there_is_nothing_to_win():
    values = {"MeanEffect": {"a": [0.9]}, "model": {"a": [0.95]}, "ceiling": {"a": [0.8]}}
    s = bm.summarize(table(values)).set_index("model").loc["model"]
    assert np.isnan(s[["gap_closed", "gap_low", "gap_high"]].astype(float)).all()
    assert np.isnan(s[["low", "high"]].astype(float)).all()  # one value: nothing to resample


def test_only_shared_conditions_are_compared():
    values = {**HAND, "picky": {"b": [0.8]}}
    values["picky"]["a"] = [np.nan]
    s = bm.summarize(table(values)).set_index("model").loc["picky"]
    assert s["n_conditions"] == 1
    assert s["gain"] == pytest.approx(0.8 - 0.7)
    assert s["gap_closed"] == pytest.approx((0.8 - 0.7) / (1.0 - 0.7))


def test_spread_over_seeds_is_in_the_interval():
    quiet = {"m": {"a": [0.5, 0.5], "b": [0.5, 0.5]}}
    loud = {"m": {"a": [0.3, 0.7], "b": [0.3, 0.7]}}
    width = [s["high"].item() - s["low"].item() for s in (bm.summarize(table(v)) for v in (quiet, loud))]
    assert width[0] == pytest.approx(0, abs=1e-12)
    # Mean of two conditions, each the mean of two draws out of {.3, .7}: sd .2 / sqrt(4); 5 % to 95 %.
    assert width[1] == pytest.approx(0.4, abs=0.11)


def test_interval_covers_the_mean_of_new_conditions():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(200):
        values = {"m": {str(i): [v] for i, v in enumerate(rng.normal(0.5, 0.1, 30))}}
        s = bm.summarize(table(values), n_resamples=300).iloc[0]
        inside.append(s["low"] <= 0.5 <= s["high"])
    assert 0.82 <= np.mean(inside) <= 0.96


def test_groups_are_apart_and_refusals():
    first = table(HAND)
    second = table({k: {c: [v[0] / 2] for c, v in m.items()} for k, m in HAND.items()}).assign(dataset="e")
    s = bm.summarize(pd.concat([first, second])).set_index(["dataset", "model"])
    assert s.loc[("e", "MeanEffect"), "mean"] == pytest.approx(0.3)
    assert s.loc[("d", "MeanEffect"), "mean"] == pytest.approx(0.6)
    with pytest.raises(ValueError, match="lacks the columns"):
        bm.summarize(first.drop(columns="value"))
    with pytest.raises(ValueError, match="empty"):
        bm.summarize(first[:0])
    with pytest.raises(ValueError, match="`level`"):
        bm.summarize(first, level=90)
