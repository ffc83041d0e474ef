"""Reference numbers on real data: Kang et al. 2018, each cell type predicted from the others.

They pin the definitions: effects against the measured control, `top` = the 100 genes of largest true effect,
R2 of the post-perturbation means on them, MSE over all genes; averages over the five cell types.
"""

import numpy as np
import pandas as pd
import pytest

from pertura import metrics as mt
from pertura.data._splits import leave_context_out

KEYS = {"perturbation_key": "condition", "control": "ctrl", "context_key": "cell_type"}


@pytest.fixture(scope="module")
def kang(load_dataset):
    return load_dataset("kang_2018_mini")


def profile(adata, condition, context):
    keep = (adata.obs["condition"] == condition) & (adata.obs["cell_type"] == context)
    return np.asarray(adata[keep.to_numpy()].X.mean(axis=0), dtype=np.float64).ravel()


@pytest.fixture(scope="module")
def scores(kang):
    """Mean effect, mean effect weighted by similarity of the controls, and split halves."""
    predictions = {"mean": {}, "weighted": {}}
    ceiling = []
    for split in leave_context_out(kang, **KEYS):
        (context,) = split.held_out
        train = kang[split.train]
        others = [c for c in train.obs["cell_type"].unique() if c != context]
        effect = np.stack([profile(train, "stim", c) - profile(train, "ctrl", c) for c in others])
        control = profile(train, "ctrl", context)
        similarity = np.array([np.corrcoef(control, profile(train, "ctrl", c))[0, 1] for c in others])
        weights = np.exp(similarity / 0.1)
        predictions["mean"]["stim", context] = control + effect.mean(axis=0)
        predictions["weighted"]["stim", context] = control + weights @ effect / weights.sum()
        ceiling.append(mt.split_half_ceiling(kang[split.test].X, control, n_splits=50).mean())
    columns = {
        name: mt.evaluate(pd.DataFrame(rows, index=kang.var_names).T, kang, **KEYS).groupby("metric")["value"].mean()
        for name, rows in predictions.items()
    }
    return pd.DataFrame(columns | {"ceiling": pd.concat(ceiling, axis=1).mean(axis=1)})


@pytest.mark.parametrize(
    ("model", "pearson", "r2", "mse"),
    # against effects that are not at equal depth, the correlations are 0.878 and 0.927, and r2 of the mean is 0.51
    [("mean", 0.8865, 0.528, 0.095), ("weighted", 0.933, 0.765, 0.048), ("ceiling", 0.977, 0.95, 0.024)],
)
def test_reference_numbers(scores, model, pearson, r2, mse):
    assert scores.loc["pearson_effect_top", model] == pytest.approx(pearson, abs=1e-3)
    assert scores.loc["r2_top", model] == pytest.approx(r2, abs=5e-3)
    assert scores.loc["mse", model] == pytest.approx(mse, abs=1.5e-3)


def test_r2_of_effects_is_another_quantity(scores):
    assert scores.loc["r2_effect", "mean"] == pytest.approx(0.479, abs=5e-3)


def test_gap_closed_by_the_weighted_mean_effect(scores):
    gap = {
        m: mt.gap_closed(*scores.loc[m, ["weighted", "mean", "ceiling"]], metric=m)
        for m in ("pearson_effect_top", "r2_top", "mse")
    }
    assert gap == pytest.approx({"pearson_effect_top": 0.49, "r2_top": 0.56, "mse": 0.65}, abs=0.03)


def test_evaluate_matches_the_effect_shared_by_all_cell_types(kang, scores):
    assert scores.loc["pearson_effect", "weighted"] == pytest.approx(0.884, abs=5e-3)
    assert scores.loc["mae", "weighted"] < scores.loc["mae", "mean"]
    assert kang.n_vars == 1267
