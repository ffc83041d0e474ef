"""What predictions must satisfy whatever the model learned."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import pertura.model.base._predict as predict
from pertura.effects import Error

N = {"n_samples": 4}
# sums may be rounded one way or the other, depending on where in memory their terms are
equal = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def ask(model, perturbation, **arguments):
    return model.predict_perturbation(perturbation, return_anndata=True, **{**N, **arguments})


def name_of(model):
    return model.vocabulary.names[0]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 cells, so that a few hundred cells make many."""
    monkeypatch.setattr(predict, "_MAX_CELLS", 32)


def same(one, other):
    equal(one.X, other.X)
    for layer in ("low", "high"):
        equal(one.layers[layer], other.layers[layer])
    for key in ("X_latent", "X_basal"):
        equal(one.obsm[key], other.obsm[key])


# -- what a result may not depend on --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 50, 10_000])
def test_not_on_the_batch_size(trained, small_blocks, batch_size):
    same(ask(trained, name_of(trained), batch_size=batch_size), ask(trained, name_of(trained)))
    tables = [trained.get_perturbation_effect(name_of(trained), batch_size=b, **N) for b in (batch_size, None)]
    pd.testing.assert_frame_equal(*tables)
    latent = [trained.get_latent_representation(batch_size=b, **N) for b in (batch_size, None)]
    equal(*latent)


@pytest.mark.parametrize("chunk_size", [7, 64, 1000])
def test_not_on_chunks(trained, small_blocks, chunk_size):
    rows = np.random.default_rng(0).permutation(trained.adata.n_obs)[:100]
    names = [name_of(trained), "control"]
    whole = ask(trained, names, indices=rows)
    chunks = list(trained.iter_predictions(names, indices=rows, chunk_size=chunk_size, **N))
    assert [c.n_obs for c in chunks[:-1]] == [2 * chunk_size] * (len(chunks) - 1)
    assert sum(c.n_obs for c in chunks) == 200
    for name in names:
        parts = [c[(c.obs["perturbation"] == name).to_numpy()] for c in chunks]
        expected = whole[(whole.obs["perturbation"] == name).to_numpy()]
        equal(np.concatenate([p.X for p in parts]), expected.X)
        equal(np.concatenate([p.layers["high"] for p in parts]), expected.layers["high"])
        assert [c for p in parts for c in p.obs["cell"]] == expected.obs["cell"].to_list()


def test_not_on_what_else_is_asked(trained, small_blocks):
    names = list(trained.vocabulary.names)
    together = ask(trained, [*names, "control"])
    for name in (*names, "control"):
        same(together[(together.obs["perturbation"] == name).to_numpy()], ask(trained, name))
    tables = trained.get_perturbation_effect(names, **N)
    for name in names:
        own = tables[tables["perturbation"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, trained.get_perturbation_effect(name, **N))


def test_not_on_the_number_of_passes(trained, monkeypatch):
    """Sums of many perturbations are made in several passes."""
    import pertura.model.base._effects as effects

    names = list(trained.vocabulary.names)
    at_once = trained.get_perturbation_effect(names, **N)
    monkeypatch.setattr(effects, "_BUDGET", 1)
    pd.testing.assert_frame_equal(at_once, trained.get_perturbation_effect(names, **N))


def test_seeds(trained):
    name = name_of(trained)
    same(ask(trained, name, seed=3), ask(trained, name, seed=3))
    same(ask(trained, name), ask(trained, name, seed=0))


@pytest.mark.needs("learns_by_gradient")
def test_other_seeds_give_other_draws(trained):
    one, other = (ask(trained, name_of(trained), seed=s) for s in (3, 4))
    assert not np.array_equal(one.X, other.X)
    assert np.corrcoef(one.X.ravel(), other.X.ravel())[0, 1] > 0.9


def test_seed_of_scvi(trained, monkeypatch):
    from scvi import settings

    expected = ask(trained, name_of(trained), seed=11)
    monkeypatch.setattr(type(settings), "seed", property(lambda self: 11))
    same(ask(trained, name_of(trained)), expected)


def test_global_random_state_is_left_alone(spec, trained):
    torch.manual_seed(5)
    np.random.seed(5)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    ask(trained, name_of(trained))
    trained.get_perturbation_effect(name_of(trained), **N)
    trained.get_latent_representation(**N)
    if spec.samples:
        trained.posterior_predictive_sample(indices=[0, 1], n_samples=2)
    assert torch.equal(before, torch.get_rng_state())
    equal(numbers, np.random.get_state()[1])
    torch.manual_seed(6)
    same(ask(trained, name_of(trained)), ask(trained, name_of(trained)))


# -- identities -----------------------------------------------------------------------------------------------------


def test_own_perturbation_is_no_change(trained):
    """Cells that already have a perturbation are predicted as they were measured, without any doubt."""
    measured, obs = np.asarray(trained.adata.X.todense()), trained.adata.obs["perturbation"]
    for name in ("control", name_of(trained)):
        rows = np.flatnonzero(obs == name)
        found = ask(trained, name, indices=rows, n_samples=20)
        for values in (found.X, found.layers["low"], found.layers["high"]):
            np.testing.assert_allclose(values, measured[rows], atol=2e-4)
    table = trained.get_perturbation_effect("control", **N)
    np.testing.assert_allclose(table[["lfc_mean", "lfc_sd", "log2fc"]].to_numpy(), 0.0, atol=1e-5)


def test_own_perturbation_needs_no_widening(trained):
    """The interval of what was measured does not know of discrepancies, that of a counterfactual does."""
    rows = np.flatnonzero(trained.adata.obs["perturbation"] == name_of(trained))
    widths = {}
    for calibrated in (True, False):
        kept = trained.calibration_
        try:
            trained.calibration_ = kept if calibrated else None
            for name in (name_of(trained), "control"):
                found = ask(trained, name, indices=rows)
                widths[calibrated, name] = (found.layers["high"] - found.layers["low"]).mean()
        finally:
            trained.calibration_ = kept
    np.testing.assert_allclose(widths[True, name_of(trained)], widths[False, name_of(trained)], atol=1e-5)
    if np.any(trained.calibration_["seen"]["gene"]):
        assert widths[True, "control"] > widths[False, "control"]


def test_effects_are_means_over_control_cells(trained):
    """Closed form: mean of the predictions of control cells minus mean of their own, context by context."""
    name, obs = name_of(trained), trained.adata.obs
    table = trained.get_perturbation_effect(name, **N)
    rows = np.flatnonzero(obs["perturbation"] == "control")
    after, before = (ask(trained, p, indices=rows, ci=None) for p in (name, "control"))
    for context, own in table.groupby("context"):
        inside = (after.obs["cell_type"] == context).to_numpy()
        np.testing.assert_allclose(own["mean_perturbed"], after.X[inside].mean(0), atol=1e-4)
        np.testing.assert_allclose(own["mean_control"], before.X[inside].mean(0), atol=1e-4)
        np.testing.assert_allclose(own["lfc_mean"], (after.X - before.X)[inside].mean(0), atol=1e-4)
        assert own["gene"].to_list() == trained.gene_names.to_list()


def test_effect_table_is_consistent(trained):
    from scipy import stats

    table = trained.get_perturbation_effect(list(trained.vocabulary.names), ci=0.9, delta=0.2, n_samples=10)
    z = stats.norm.ppf(0.95)
    np.testing.assert_allclose(table["ci_high"] - table["ci_low"], 2 * z * table["lfc_sd"], atol=1e-9)
    np.testing.assert_allclose((table["ci_high"] + table["ci_low"]) / 2, table["lfc_mean"], atol=1e-9)
    np.testing.assert_allclose(table["mean_perturbed"] - table["mean_control"], table["lfc_mean"], atol=1e-9)
    certain = table["lfc_sd"] > 0
    p = stats.norm.sf(0.2, table["lfc_mean"].abs(), table["lfc_sd"])
    np.testing.assert_allclose(table["proba_de"][certain], p[certain], atol=1e-9)
    fold = np.log2(np.expm1(table["mean_perturbed"]) + 1e-9) - np.log2(np.expm1(table["mean_control"]) + 1e-9)
    np.testing.assert_allclose(table["log2fc"], fold, rtol=1e-4, atol=1e-4)


def test_contexts_without_controls(trained, screen):
    """Treated cells stand in: what they would be like without and with the perturbation."""
    adata, name = screen(), name_of(trained)
    contexts = adata.obs["cell_type"].cat.categories
    keep = (adata.obs["cell_type"] == contexts[0]) | (adata.obs["perturbation"] != "control")
    adata = adata[keep.to_numpy()].copy()
    table = trained.get_perturbation_effect(name, adata=adata, n_samples=60)
    assert set(table["context"]) == set(contexts)
    rows = np.flatnonzero(adata.obs["cell_type"] == contexts[1])
    after, before = (ask(trained, p, adata=adata, indices=rows, ci=None, n_samples=60) for p in (name, "control"))
    own = table[table["context"] == contexts[1]]
    # other rows are asked, so that draws differ
    np.testing.assert_allclose(own["lfc_mean"], (after.X - before.X).mean(0), atol=0.1)
    np.testing.assert_allclose(own["mean_control"], before.X.mean(0), atol=0.1)
    # the other context, which has controls, is asked of these alone
    measured = screen()[
        ((screen().obs["cell_type"] == contexts[0]) & (screen().obs["perturbation"] == "control"))
    ].copy()
    alone = trained.get_perturbation_effect(name, adata=measured, n_samples=60)
    first = table[table["context"] == contexts[0]]
    np.testing.assert_allclose(first["mean_control"], alone["mean_control"], atol=0.1)


# -- scales ---------------------------------------------------------------------------------------------------------


def test_scales_agree(trained):
    """Counts at the cell's depth, and log1p of counts per 10,000 of the same prediction."""
    rows, name = np.arange(40), name_of(trained)
    counts, log1p = (ask(trained, name, indices=rows, scale=scale, n_samples=6).X for scale in ("counts", "log1p"))
    library = np.asarray(trained.adata.layers["counts"][rows].sum(1))
    # the mean of a logarithm is below the logarithm of the mean, and near it where there is little doubt
    bound = np.log1p(1e4 * counts / library)
    assert (log1p <= bound + 1e-3).all() and np.corrcoef(log1p.ravel(), bound.ravel())[0, 1] > 0.98
    same(ask(trained, name, scale="layer"), ask(trained, name, scale="counts"))
    same(ask(trained, name, scale="log1p"), ask(trained, name))


def test_expectations_leave_the_noise_of_the_cell_out(trained):
    name = name_of(trained)
    own, none = (ask(trained, name, noise=noise, ci=None) for noise in ("own", "none"))
    assert none.uns["prediction"]["noise"] == "none"
    if trained.module.native_scale == "counts":
        assert none.X.var(0).sum() < own.X.var(0).sum()


def test_counts_are_at_the_depth_of_the_cell(trained):
    found = ask(trained, name_of(trained), scale="counts", n_samples=10)
    depth = np.asarray(trained.adata.layers["counts"].sum(1)).ravel()
    ratio = found.X.sum(1) / depth
    assert np.abs(np.median(ratio) - 1) < 0.1
    assert np.corrcoef(found.X.sum(1), depth)[0, 1] > 0.9


def test_intervals_widen_on_the_scale_of_counts_too(trained):
    rows = np.flatnonzero(trained.adata.obs["perturbation"] == "control")
    kept = trained.calibration_
    widths = []
    try:
        for calibration in (None, {**kept, "noise": 0.0, "seen": asdict(Error(0.5))}):
            trained.calibration_ = calibration
            found = ask(trained, name_of(trained), scale="counts", indices=rows)
            widths.append(found.layers["high"] - found.X)
    finally:
        trained.calibration_ = kept
    library = np.asarray(trained.adata.layers["counts"][rows].sum(1))
    own = ask(trained, "control", scale="counts", indices=rows).X
    # an error of 0.5 of log1p(counts per 10,000) is one of 0.5 (counts + library / 10,000) counts
    expected = np.sqrt(widths[0].clip(min=0) ** 2 + (1.6449 * 0.5 * (own + library / 1e4)) ** 2)
    np.testing.assert_allclose(widths[1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_size_factors(spec, screen, unit):
    """Only their ratios matter, and log1p is relative to them."""
    adata = screen()
    depth = np.asarray(adata.layers["counts"].sum(1)).ravel()
    adata.obs["size"] = depth * unit
    spec.setup(adata, size_factor_key="size")
    model = spec.fit(spec.make(adata))
    plain = screen()
    spec.setup(plain)
    other = spec.fit(spec.make(plain))
    counts = [ask(m, name_of(m), scale="counts", n_samples=10).X for m in (model, other)]
    assert np.abs(counts[0] - counts[1]).mean() < 0.05 * counts[1].mean()
    query = screen()
    query.obs["size"] = depth * unit
    equal(ask(model, name_of(model), adata=query).X, ask(model, name_of(model)).X)
    query.obs["size"] = -1.0
    with pytest.raises(ValueError, match="`size_factor_key`: .* must hold positive numbers"):
        ask(model, name_of(model), adata=query)


# -- replicates -----------------------------------------------------------------------------------------------------


@pytest.mark.needs("samples")
def test_posterior_predictive_sample(trained):
    rows = [5, 0, 9]
    draws = trained.posterior_predictive_sample(n_samples=3, indices=rows)
    assert draws.shape == (3, trained.adata.n_vars, 3)
    dense = draws.todense()
    assert (dense >= 0).all()
    again = trained.posterior_predictive_sample(n_samples=3, indices=rows, batch_size=1)
    equal(dense, again.todense())
    single = trained.posterior_predictive_sample(n_samples=1, indices=rows)
    assert single.shape == (3, trained.adata.n_vars, 1)


@pytest.mark.needs("samples", value=False)
def test_there_are_no_replicates_without_a_distribution(trained):
    with pytest.raises(ValueError, match="no distribution"):
        trained.posterior_predictive_sample(indices=[0])


@pytest.mark.slow  # numba compiles what `sparse` does
@pytest.mark.needs("samples")
def test_criticism_of_scvi(trained):
    from scvi.criticism import PosteriorPredictiveCheck

    adata = trained.adata.copy()
    adata.layers["counts"] = adata.layers["counts"].astype(int)
    check = PosteriorPredictiveCheck(adata, {"model": trained}, count_layer_key="counts", n_samples=3)
    check.zero_fraction()
    check.coefficient_of_variation("cells")
    zeros = check.metrics["zero_fraction"]
    assert np.corrcoef(zeros["model"], zeros["Raw"])[0, 1] > 0.8
