"""Perturbations that a context, or all contexts, lack: against planted effects, and what made them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pertura import baseline

FOLDER = Path(__file__).parents[2] / "docs" / "studies"


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        from screen_kernels import oracle, scores, simulate

    screen = simulate(80, 3, 60)
    features = screen.adata.uns["features"]
    runs = {
        "mean": (baseline.MeanEffect, features),
        "process": (baseline.GaussianProcess, features),
        "oracle": (baseline.GaussianProcess, oracle(screen)),
    }
    tables, models = {}, {}
    for name, (cls, given) in runs.items():
        table, models[name] = scores(screen, cls, given)
        tables[name] = table.set_index("asked")
    return pd.concat(tables), models, screen


def test_perturbations_that_a_context_lacks(found):
    table, models, _ = found
    error = table["mse"].unstack()
    for asked in ("unseen", "missing here"):
        best, mean = error.loc["oracle", asked], error.loc["mean", asked]
        assert mean - error.loc["process", asked] > 0.5 * (mean - best) > 0
    assert table.loc["process", "coverage"].between(0.85, 0.96).all()
    assert table.loc["process", "coverage of top 50"].between(0.8, 0.95).all()
    sources = models["process"].sources
    assert (sources["useless"] < 0.02).all() and (sources[["informative", "elsewhere"]].mean() > 0.15).all()


def test_what_a_context_has_is_its_own_and_saved_models_predict_the_same(found, tmp_path):
    _, models, screen = found
    model = models["process"]
    everywhere, lacking = ~screen.missing.any(1), ~screen.unseen & screen.missing.any(1)
    seen, lacks = (f"p{int(np.flatnonzero(one)[0]):03d}" for one in (everywhere, lacking))
    asked = [seen, "p000", lacks]
    before = model.get_perturbation_effect(asked)
    model.save(tmp_path / "model")
    loaded = baseline.GaussianProcess.load(tmp_path / "model", adata=model.adata.copy())
    columns = ["lfc_mean", "ci_low", "ci_high"]
    np.testing.assert_allclose(loaded.get_perturbation_effect(asked)[columns], before[columns], atol=1e-5)
    own = screen.effect[int(seen[1:])].ravel()
    error = ((before.loc[before["perturbation"] == seen, "lfc_mean"] - own) ** 2).mean()
    assert error < 0.35
