"""Intervals hold effects of simulated truth as often as they say: what was trained, and what was left out."""

import anndata as ad
import numpy as np
import pytest
from scipy import stats

from pertura import baseline as bl
from pertura import datasets
from pertura.metrics import measured_effect

KEYS = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type"}
SIZE = {"n_cells_per_condition": 50, "n_control_cells": 200, "n_genes": 120, "n_truth_cells": 20, "n_batches": 1}
QUESTIONS = {
    "seen": {"n_contexts": 2, "n_perturbations": 6},
    "context": {"n_contexts": 6, "n_perturbations": 4, "n_unresponsive_contexts": 0},
    "dose": {"n_contexts": 2, "n_perturbations": 6, "perturbation_type": "drug", "doses": [0.1, 1.0, 10.0]},
    "perturbation": {"n_contexts": 2, "n_perturbations": 10},
}


def held_out(question, obs):
    """Which treated cells are left out."""
    treated = (obs["perturbation"] != "control").to_numpy()
    if question == "context":
        return treated & (obs["cell_type"] == "context_1").to_numpy()
    names = sorted(set(obs["perturbation"]) - {"control"})[:2]
    chosen = obs["perturbation"].isin(names).to_numpy()
    if question == "dose":
        return chosen & (obs["dose"] == 1.0).to_numpy()
    # half of the cells of each condition, in the order of the cells, which is random
    return chosen if question == "perturbation" else treated & (np.arange(len(obs)) % 2 == 0)


@pytest.fixture(scope="module", params=QUESTIONS)
def answered(request):
    """Predicted effects at two levels and measured ones, with other controls than those of training."""
    question = request.param
    settings = {"n_unresponsive_contexts": 0, "seed": 7, **SIZE, **QUESTIONS[question]}
    adata = datasets.simulate(**settings)
    out, control = held_out(question, adata.obs), (adata.obs["perturbation"] == "control").to_numpy()
    other = control & (np.arange(adata.n_obs) % 2 == 0)
    train, has_dose = adata[~out & ~other].copy(), "dose" in adata.obs
    bl.MeanEffect.setup_anndata(train, layer="counts", **KEYS, **({"dose_key": "dose"} if has_dose else {}))
    model = bl.MeanEffect(train, use_own_context=True)
    model.train(enable_progress_bar=False)
    asked = adata[control & ~other].copy()
    rows = []
    for (name, context), own in adata.obs[out].groupby(["perturbation", "cell_type"], observed=True):
        query = asked[(asked.obs["cell_type"] == context).to_numpy()].copy()
        options = {"adata": query, **({"dose": 1.0} if has_dose else {})}
        cells = ad.concat([adata[own.index], adata[other & (adata.obs["cell_type"] == context).to_numpy()]])
        truth = measured_effect(cells, perturbation=name, **KEYS).set_index("gene")
        found = {ci: model.get_perturbation_effect(name, ci=ci, **options).set_index("gene") for ci in (0.5, 0.9)}
        rows.append((found, truth.loc[found[0.9].index]))
    return question, rows


def coverage(rows, ci, strong):
    held = []
    for found, truth in rows:
        table, z = found[ci], stats.norm.ppf((1 + ci) / 2)
        half = np.sqrt(((table["ci_high"] - table["ci_low"]) / 2) ** 2 + (z * truth["se"]) ** 2)
        inside = (truth["effect"] - table["lfc_mean"]).abs() <= half
        at = table["lfc_mean"].abs().nlargest(30).index if strong else inside.index
        held += inside[at].tolist()
    return np.mean(held)


@pytest.mark.parametrize(("ci", "low", "high"), [(0.5, 0.36, 0.68), (0.9, 0.82, 0.98)])
def test_intervals_hold_what_they_say(answered, ci, low, high):
    question, rows = answered
    for strong in (False, True):
        # means as measured are not shrunk: those that are largest by chance are too large
        least = low - 0.08 if question == "seen" and strong else low
        assert least <= coverage(rows, ci, strong) <= high, (question, ci, strong, coverage(rows, ci, strong))


def test_strong_genes_are_significant_where_the_response_is_not(answered):
    """How strongly a context responds is not known, which genes respond is."""
    question, rows = answered
    if question not in ("seen", "context"):
        return
    for found, _ in rows:
        table = found[0.9]
        strongest = table["lfc_mean"].abs().nlargest(5).index
        scores = (table["lfc_mean"] / table["gene_sd"]).abs()[strongest]
        assert scores.median() > 2.0, (question, scores.to_list())
        assert (table["gene_sd"] <= table["lfc_sd"] + 1e-9).all()
    if question == "context":
        assert all(found[0.9]["response_sd"].iloc[0] > 0.02 for found, _ in rows)
