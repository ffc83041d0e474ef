"""Reference numbers on real data: Kang et al. 2018, each cell type predicted from the others, at equal depth."""

import anndata
import numpy as np
import pandas as pd
import pytest

from pertura import baseline as bl
from pertura import metrics as mt
from pertura.data import leave_context_out

KEYS = {"perturbation_key": "condition", "control": "ctrl", "context_key": "cell_type"}
CLASSES = [bl.NoChange, bl.MeanEffect, bl.WeightedMeanEffect, bl.NearestNeighbour, bl.Linear]


@pytest.fixture(scope="module")
def scores(load_dataset):
    """Cells predicted from the controls of the held-out type, and the effects that were fitted."""
    kang = load_dataset("kang_2018_mini")
    cells, effects = {cls: [] for cls in CLASSES}, {cls: {} for cls in CLASSES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bl.Baseline, "_after_training", lambda self, rows, table: None)
        for split in leave_context_out(kang, **KEYS):
            (context,) = split.held_out
            train = kang[split.train].copy()
            rows = np.flatnonzero((train.obs["cell_type"] == context) & (train.obs["condition"] == "ctrl"))
            assert len(rows) == (train.obs["cell_type"] == context).sum()
            for cls in CLASSES:
                cls.setup_anndata(train, layer="counts", **KEYS)
                model = cls(train)
                model.train()
                options = {"indices": rows, "ci": None, "n_samples": 1}
                cells[cls].append(model.predict_perturbation("stim", return_anndata=True, **options))
                module = model.module
                asked = module.conditions.ask(np.array([0]), np.ones(1))
                code = model.contexts.index(context)
                weights = module.combine(asked, code, module.affinity(module.means.control)[code])
                control = np.asarray(kang.X[split.train][rows].mean(0)).ravel()
                effects[cls]["stim", context] = control + module.weighted(weights[None])[0][0].numpy()
    measure = lambda pred: mt.evaluate(pred, kang, **KEYS).groupby("metric")["value"].mean()  # noqa: E731
    return {
        "cells": {cls: measure(anndata.concat(parts)) for cls, parts in cells.items()},
        "means": {cls: measure(pd.DataFrame(rows, index=kang.var_names).T) for cls, rows in effects.items()},
    }


@pytest.mark.parametrize(
    ("cls", "pearson", "r2", "mse"),
    [(bl.MeanEffect, 0.888, 0.527, 0.0940), (bl.WeightedMeanEffect, 0.934, 0.765, 0.0484)],
)
def test_reference_numbers_of_the_estimators(scores, cls, pearson, r2, mse):
    found = scores["means"][cls]
    assert found["pearson_effect_top"] == pytest.approx(pearson, abs=5e-4)
    assert found["r2_top"] == pytest.approx(r2, abs=5e-4)
    assert found["mse"] == pytest.approx(mse, abs=5e-5)


@pytest.mark.parametrize(
    ("cls", "pearson", "r2", "mse"),
    [
        (bl.NoChange, 0.0, -0.973, 0.2282),
        (bl.MeanEffect, 0.888, 0.527, 0.0908),
        (bl.WeightedMeanEffect, 0.934, 0.767, 0.0472),
        (bl.NearestNeighbour, 0.932, 0.770, 0.0522),
        (bl.Linear, 0.940, 0.800, 0.0448),
    ],
)
def test_reference_numbers_of_predicted_cells(scores, cls, pearson, r2, mse):
    """Cells do not fall below 0: on means near 0 this is a little better than the estimator alone."""
    found = scores["cells"][cls]
    assert found["pearson_effect_top"] == pytest.approx(pearson, abs=1e-3)
    assert found["r2_top"] == pytest.approx(r2, abs=2e-3)
    assert found["mse"] == pytest.approx(mse, abs=3e-4)
