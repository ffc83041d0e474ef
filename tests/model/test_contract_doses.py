"""The unit of doses plays no part: predictions, intervals, novelty."""

from __future__ import annotations

import numpy as np
import pytest

from pertura import datasets

SCREEN = {
    "doses": [0.3, 3.0, 10.0],
    "n_cells_per_condition": 12,
    "n_control_cells": 40,
    "n_genes": 40,
    "n_regulators": 6,
    "n_perturbations": 3,
    "combinations": 1,
    "n_contexts": 2,
    "n_unresponsive_contexts": 0,
    "n_biomarkers": 2,
    "n_truth_cells": 20,
    "seed": 3,
}
# measured, between, below and above
ASKED = [3.0, 1.0, 0.05, 40.0]


def answers(spec, unit):
    adata = datasets.simulate(**SCREEN)
    adata.obs["dose"] = adata.obs["dose"] * unit
    spec.setup(adata, dose_key="dose")
    model = spec.fit(spec.make(adata))
    labels = [*model.vocabulary.names[:2], model.vocabulary.labels[-1]]
    options = {"n_samples": 4, "indices": np.flatnonzero(adata.obs["perturbation"] == "control")}
    asked = [model.get_perturbation_effect(labels, dose=[d * unit for d in ASKED], **options)]
    asked += [model.get_perturbation_effect(labels, dose=d, **options) for d in (0.0, None)]
    table = asked[0]
    predicted = model.predict_perturbation(labels[0], dose=1.0 * unit, return_anndata=True, ci=0.9, **options)
    return asked, predicted, table


def test_doses_have_no_unit(spec):
    expected, cells, table = answers(spec, 1.0)
    assert set(table["novelty"]) >= {"seen", "new dose"}
    assert table["lfc_mean"].abs().groupby([table["dose"].astype(str)]).sum().nunique() > 1
    for unit in (1e-9, 1e9):
        found, own_cells, _ = answers(spec, unit)
        for mine, other in zip(found, expected, strict=True):
            assert mine["novelty"].tolist() == other["novelty"].tolist()
            for column in ("lfc_mean", "lfc_sd", "ci_low", "ci_high", "response_sd", "proba_de"):
                np.testing.assert_allclose(mine[column], other[column], rtol=1e-3, atol=1e-4, err_msg=column)
        for a, b in ((own_cells.X, cells.X), (own_cells.layers["high"], cells.layers["high"])):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.needs("only_genes", value=False)
def test_doses_that_were_not_registered(trained):
    with pytest.raises(ValueError, match="was registered without doses"):
        trained.get_perturbation_effect(trained.vocabulary.names[0], dose=[1.0, 1.0000001])
