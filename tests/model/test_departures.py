"""What few cells of a context say, beside what a model predicts there from other contexts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from pertura.baseline import MeanEffect
from pertura.model import CRADLEVAE, SAMSVAE, PertVAE
from pertura.model._pertvae import _LeftOut
from pertura.model.base._departures import ContextEffects, inverse

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SETUP = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type"}
N_GENES, N_FEW = 30, 4
ENDS = ["ci_low", "ci_high"]
SMALL = {
    SAMSVAE: {"n_latent": 4, "n_hidden": 8},
    CRADLEVAE: {"n_latent": 4, "n_hidden": 8},
    PertVAE: {"n_latent": 4, "encoder_hidden": (8,), "n_flow_hidden": 8, "n_flow_context": 8},
}


@pytest.fixture(scope="module")
def arms():
    """A drug in five contexts, in the first with few cells; measured as counts and as continuous values."""
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.5, N_GENES) + 0.4 * rng.normal(size=(5, N_GENES))
    base = 1.5 + rng.normal(0, 0.5, (5, N_GENES))
    x, obs = [], []
    for c in range(5):
        for name, n in (("control", 60), ("drug", 60 if c else N_FEW)):
            x.append(np.tile(base[c] + (name == "drug") * effect[c], (n, 1)))
            obs += [(name, f"line{c}")] * n
    x = np.concatenate(x)
    obs = pd.DataFrame(obs, columns=["perturbation", "cell_type"], index=[f"cell{i}" for i in range(len(obs))])
    adata = AnnData((x + 0.6 * rng.normal(size=x.shape)).astype(np.float32), obs=obs)
    adata.layers["counts"] = rng.poisson(np.exp(x)).astype(np.float32)
    adata.uns["effect"] = effect
    return adata


def fit(cls, adata, layer=None, epochs=1, **options):
    cls.setup_anndata(adata, layer=layer, **SETUP)
    torch.manual_seed(0)
    model = cls(adata, **SMALL.get(cls, {}), **options)
    model.train(**({} if cls is MeanEffect else {"max_epochs": epochs, "batch_size": 64}), **QUIET)
    return model


def effects(model, column="lfc_mean"):
    table = model.get_perturbation_effect("drug", n_samples=20)
    return table.pivot(index="context", columns="gene", values=column)[model.gene_names]


def measured(model):
    """By context, as the models measure it."""
    table = model._measure(np.arange(model.adata.n_obs), model._data_module(np.arange(model.adata.n_obs), [], 64, 0))
    return table.effects().effect


@pytest.mark.parametrize(
    ("cls", "layer"),
    [
        (PertVAE, "counts"),
        (CRADLEVAE, None),
        pytest.param(SAMSVAE, "counts", marks=pytest.mark.slow),
        pytest.param(PertVAE, None, marks=pytest.mark.slow),
    ],
)
def test_many_cells_decide_and_few_do_not(arms, cls, layer):
    """Where cells are many the effect is the measured one; where they are few it is drawn away from it."""
    adata = arms.copy()
    model = fit(cls, adata, layer)
    found, truth = effects(model).to_numpy(), measured(model)
    off = np.sqrt(((found - truth) ** 2).mean(1))
    assert (off[1:] < 0.15).all(), off
    assert off[0] > 1.5 * off[1:].max()
    sd = effects(model, "lfc_sd").to_numpy()
    assert sd[0].mean() > 1.3 * sd[1:].mean()


def test_few_cells_help(arms):
    """Better than the few cells alone, and than the other contexts alone."""
    truth = arms.uns["effect"][0]
    here = ((arms.obs["cell_type"] == "line0") & (arms.obs["perturbation"] == "drug")).to_numpy()
    few, none = fit(SAMSVAE, arms.copy()), fit(SAMSVAE, arms[~here].copy())
    error = {
        "both": effects(few).loc["line0"],
        "cells": measured(few)[0],
        "others": effects(none).loc["line0"],
    }
    error = {name: float(((found - truth) ** 2).mean()) for name, found in error.items()}
    assert error["both"] < 0.85 * min(error["cells"], error["others"]), error


def test_nothing_changes_where_nothing_was_measured(arms):
    """In a context without treated cells the effects are those of the model without the site."""
    here = ((arms.obs["cell_type"] == "line0") & (arms.obs["perturbation"] == "drug")).to_numpy()
    model = fit(SAMSVAE, arms[~here].copy(), "counts")
    with_site = effects(model)
    model.module.gene_effects.departures.clear()
    without = effects(model)
    np.testing.assert_array_equal(with_site.loc["line0"], without.loc["line0"])
    assert (with_site.loc["line1"] - without.loc["line1"]).abs().mean() > 0.05


@pytest.fixture(scope="module")
def screens():
    """Ten perturbations in three contexts, each context with something that all its effects have; the last lacks six."""
    rng = np.random.default_rng(1)
    effect = rng.normal(0, 0.5, (10, 3)) @ rng.normal(size=(3, N_GENES)) + rng.normal(0, 1.0, (3, 1, N_GENES))
    base, x, obs = 3.0 + rng.normal(0, 0.3, (3, N_GENES)), [], []
    for c in range(3):
        for p in range(-1, 10 if c < 2 else 4):
            n = 80 if p < 0 else 20
            x.append(base[c] + (effect[c, p] if p >= 0 else 0.0) + 0.5 * rng.normal(size=(n, N_GENES)))
            obs += [("control" if p < 0 else f"p{p}", f"line{c}")] * n
    obs = pd.DataFrame(obs, columns=["perturbation", "cell_type"], index=[f"cell{i}" for i in range(len(obs))])
    adata = AnnData(np.concatenate(x).astype(np.float32), obs=obs)
    adata.uns["effect"] = effect
    return adata


@pytest.mark.parametrize("cls", [SAMSVAE, PertVAE])
def test_other_perturbations_of_a_context_say_what_it_does_to_those_it_lacks(screens, cls):
    adata, names = screens.copy(), [f"p{p}" for p in range(4, 10)]
    model = fit(cls, adata)
    truth = adata.uns["effect"][2, 4:]

    def error():
        own = adata[adata.obs["cell_type"] == "line2"].copy()
        table = model.get_perturbation_effect(names, adata=own, n_samples=20)
        found = table.pivot(index="perturbation", columns="gene", values="lfc_mean").loc[names, model.gene_names]
        wide = [table.pivot(index="perturbation", columns="gene", values=c).loc[names, model.gene_names] for c in ENDS]
        inside = float(((wide[0] <= truth) & (truth <= wide[1])).to_numpy().mean())
        return float(((found - truth) ** 2).to_numpy().mean()), set(table["novelty"]), inside

    site = model.module.departures if cls is PertVAE else model.module.gene_effects.departures
    assert len(site) == 30  # 24 measured ones and six that are lacking
    (with_site, novelty, inside), _ = error(), site.clear()
    without, *_ = error()
    assert novelty == {"new context"} and inside > 0.85
    assert with_site < 0.4 * without


@pytest.mark.parametrize("alike", [True, False])
def test_w_is_kept_where_contexts_differ_as_left_out_ones_say(alike):
    """Ten contexts that respond alike, or in proportion to what can be seen of their controls."""
    rng = np.random.default_rng(1)
    effect, marker, at = rng.normal(0, 0.5, N_GENES), rng.normal(size=N_GENES), np.linspace(-1.5, 1.5, 10)
    what, context = np.repeat(["control", "drug"], [400, 400]), np.tile(np.repeat(np.arange(10), 40), 2)
    own = effect if alike else effect * (1.0 + at[context, None])
    x = 2.0 + at[context, None] * marker + (what == "drug")[:, None] * own + 0.5 * rng.normal(size=(800, N_GENES))
    obs = pd.DataFrame({"perturbation": what, "cell_type": [f"line{c}" for c in context]})
    adata = AnnData(x.astype(np.float32), obs=obs.set_axis(obs.index.astype(str)))
    share = fit(PertVAE, adata, epochs=15).share
    assert (share < 0.05) if alike else (share > 0.3), share


def test_latent_effects_have_no_departures(arms):
    """Where a user asks for what the latent space says alone."""
    model = fit(PertVAE, arms.copy(), effects="latent")
    assert len(model.module.departures) == 0 and model.share == 1.0
    assert PertVAE(model.adata, preset="paper").options.effects == "latent"


def test_training_goes_on_without_the_departures(arms):
    """They are fitted anew: the neural networks never see them."""
    model = fit(PertVAE, arms.copy())
    seen = []
    forward = model.module.departures.forward
    model.module.departures.forward = lambda *a, **k: (
        seen.append(model.module.training and len(model.module.departures)) or forward(*a, **k)
    )
    model.train(max_epochs=1, **QUIET)
    assert seen and not any(seen)
    assert len(model.module.departures) == 5


def test_left_out_contexts_have_no_part_in_what_predicts_them(arms):
    """W and b of the other contexts are those of a ridge regression with the model's priors."""
    adata = arms.copy()
    model = fit(PertVAE, adata)
    module, table = (
        model.module,
        model._measure(np.arange(adata.n_obs), model._data_module(np.arange(adata.n_obs), [], 64, 0)),
    )
    module.departures.clear()
    left_out = _LeftOut(model, table)
    others = np.arange(1, 5)
    u = module.context_profile.double().numpy()[others]
    design = np.concatenate([u, np.ones((4, 1))], axis=1)
    precision = np.diag(np.r_[np.full(u.shape[1], module.prior_sd_W**-2), module.prior_sd_b**-2])
    weight = np.diag(1 / left_out.noise[others])
    expected = np.linalg.solve(design.T @ weight @ design + precision, design.T @ weight @ left_out.effect[others])
    left_out.effect[0] = np.nan
    before = module.effect_U, module.effect_b
    with left_out.without(0.5)(np.array([0])):
        np.testing.assert_allclose(module.effect_W()[0].detach().numpy(), 0.5 * expected[:-1].T, atol=2e-4)
        np.testing.assert_allclose(module.effect_b[0].detach().numpy(), expected[-1], atol=2e-4)
    assert (module.effect_U, module.effect_b) == before


def test_contexts_of_a_fold_have_no_part_in_each_other(arms):
    """With more contexts than folds, some are left out together; what no other fold has measured is not corrected."""
    adata = arms[arms.obs["cell_type"].isin(["line1", "line2"])].copy()
    model = fit(SAMSVAE, adata)
    rows = np.arange(adata.n_obs)
    contexts = ContextEffects(model, model._measure(rows, model._data_module(rows, [], 64, 0)))
    assert [len(fold) for fold in contexts.folds] == [1, 1] and len(contexts) == 2
    adata = adata[~((adata.obs["cell_type"] == "line1") & (adata.obs["perturbation"] == "drug")).to_numpy()].copy()
    model = fit(SAMSVAE, adata)
    assert len(model.module.gene_effects.departures) == 0


def test_inverse_of_curves():
    curve, steps = np.array([[[0.0, 1.0, 4.0]]]), np.array([-1.0, 0.0, 1.0])
    for level, at in ((0.5, -0.5), (2.5, 0.5), (-3.0, -1.0), (9.0, 1.0)):
        assert inverse(np.array([[level]]), curve, steps)[0, 0] == at
