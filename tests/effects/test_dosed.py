"""Effects of several doses and combinations, solved together."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from pertura.effects import fit_curvature, fit_dosed
from pertura.effects._dosed import hill, solve_effects
from pertura.effects._kernels import correlations
from pertura.module import _latent

CONTINUOUS = {"layer": None, "context_key": None, "batch_key": None}


def test_hill_is_0_at_0_and_1_at_1_and_the_same_in_numpy_and_torch():
    dose = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0])
    for log_k, log_n in [(0.0, 0.0), (-1.0, 0.5), (1.0, -0.5)]:
        found = _latent.hill(dose, torch.tensor(log_k), torch.tensor(log_n))
        assert found[0] == 0 and found[3] == pytest.approx(1)
        assert (found.diff() > 0).all()
        np.testing.assert_allclose(found, hill(dose.numpy(), log_k, log_n), rtol=1e-5)


def dosed_profiles(truth: np.ndarray, doses: list[float], log_k: float, log_n: float, noise: float = 0.02) -> AnnData:
    """Two profiles of each perturbation at each dose, and 20 controls."""
    rng = np.random.default_rng(7)
    n, n_genes = truth.shape
    what, dose = np.repeat(np.arange(n), 2 * len(doses)), np.tile(np.repeat(doses, 2), n)
    effect = hill(dose / max(doses), log_k, log_n)[:, None] * truth[what]
    x = np.concatenate([np.zeros((20, n_genes)), effect]) + noise * rng.normal(size=(20 + len(what), n_genes))
    obs = pd.DataFrame({"perturbation": ["ctrl"] * 20 + [f"p{w}" for w in what], "dose": [0.0] * 20 + list(dose)})
    return AnnData(x.astype(np.float32), obs=obs.set_axis(obs.index.astype(str)))


def test_planted_hill_curves_are_found(measure):
    log_k, log_n = -1.5, 0.5
    truth = np.random.default_rng(0).normal(size=(6, 20))
    table = measure(dosed_profiles(truth, [0.4, 2.0, 5.0, 10.0], log_k, log_n), setup=CONTINUOUS)
    found = fit_dosed(table, np.full(6, 10.0))
    assert (found.log_k, found.log_n) == (log_k, log_n)
    np.testing.assert_allclose(found.effect[:, 0], truth, atol=0.15)
    assert found.measured.all()
    np.testing.assert_allclose(found.overall + found.deviation, truth, atol=0.15)


def test_a_perturbation_without_cells_has_the_mean_effect(measure):
    truth = np.random.default_rng(0).normal(size=(4, 20)) + 1.0
    adata = dosed_profiles(truth, [1.0], 0.0, 0.0)
    rows = np.flatnonzero(adata.obs["perturbation"] != "p2")
    found = fit_dosed(measure(adata, rows=rows, setup=CONTINUOUS), np.ones(4))
    assert found.measured.tolist() == [True, True, False, True]
    np.testing.assert_allclose(found.effect[2, 0], found.mean[0])
    np.testing.assert_allclose(found.mean[0], truth[[0, 1, 3]].mean(0), atol=0.05)


def test_effects_of_doses_and_combinations_are_solved_together():
    rng = np.random.default_rng(4)
    truth = 3 * rng.normal(size=(4, 6))
    design = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0.7]])
    found, *_ = solve_effects(design, design @ truth, np.full((6, 6), 1e-6))
    assert correlations(found, truth).min() > 0.98


def test_a_context_in_which_perturbations_do_less_has_a_smaller_amplitude(measure):
    rng = np.random.default_rng(2)
    own, planted = rng.normal(size=(20, 30)), np.array([1.0, 0.3, 1.0])
    what, context = np.repeat(np.arange(20), 6), np.tile(np.repeat(np.arange(3), 2), 20)
    x = np.concatenate([np.zeros((60, 30)), planted[context][:, None] * own[what]]) + 0.1 * rng.normal(size=(180, 30))
    obs = {"perturbation": ["ctrl"] * 60 + [f"p{w:02d}" for w in what], "cell_type": [*np.arange(60) % 3, *context]}
    obs = pd.DataFrame(obs).astype(str)
    setup = CONTINUOUS | {"context_key": "cell_type", "dose_key": None}
    adata = AnnData(x.astype(np.float32), obs=obs.set_axis(obs.index.astype(str)))
    rows = np.flatnonzero((obs["perturbation"] != "p05") | (obs["cell_type"] != "1"))
    found = fit_dosed(measure(adata, rows=rows, setup=setup), np.ones(20))
    np.testing.assert_allclose(found.amplitude(own), np.stack([planted, np.zeros(3)], 1), atol=0.15)
    # what a perturbation does elsewhere is worth less there
    np.testing.assert_allclose(found.effect[5, 1], planted[1] * own[5], atol=0.25)
    assert np.abs(found.effect[5, 1] - planted[0] * own[5]).mean() > 0.4


def curved_profiles(kappa: list[float], doses: list[float], noise: float) -> AnnData:
    rng = np.random.default_rng(0)
    what, dose = np.repeat(np.arange(len(kappa)), 4 * len(doses)), np.tile(np.repeat(doses, 4), len(kappa))
    k = np.asarray(kappa)[what]
    strength = np.log1p(k * dose / max(doses)) / np.log1p(k)
    x = np.concatenate([np.zeros((40, 30)), strength[:, None] * rng.normal(size=(len(kappa), 30))[what]])
    x += noise * rng.normal(size=x.shape)
    obs = pd.DataFrame({"perturbation": ["ctrl"] * 40 + [f"p{w}" for w in what], "dose": [0.0] * 40 + list(dose)})
    return AnnData(x.astype(np.float32), obs=obs.set_axis(obs.index.astype(str)))


def test_planted_curvatures_are_found(measure):
    planted = [0.3, 30.0, 3000.0]
    table = measure(curved_profiles(planted, [1.0, 10.0, 100.0], 0.05), setup=CONTINUOUS)
    found = fit_curvature(table, np.full(3, 100.0))
    # of nearly straight curves only their straightness is told
    assert found[0] < 3 and 15 < found[1] < 60 and 1500 < found[2] < 6000


def test_one_dose_tells_no_curvature(measure):
    table = measure(curved_profiles([3.0, 3.0], [10.0], 0.05), setup=CONTINUOUS)
    assert fit_curvature(table, np.full(2, 10.0)) is None


def test_what_is_not_known_of_one_is_learned_from_the_others(measure):
    adata = curved_profiles([30.0] * 6, [1.0, 10.0, 100.0], 0.05)
    adata = adata[~((adata.obs["perturbation"] == "p5") & (adata.obs["dose"] < 100))].copy()
    table = measure(adata, setup=CONTINUOUS)
    assert 15 < fit_curvature(table, np.full(6, 100.0))[5] < 60
