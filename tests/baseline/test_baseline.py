"""What all baselines share: one pass over training cells, intervals, new contexts, saving, errors."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from pertura import baseline as bl
from pertura import datasets
from pertura.data._cells import CellDataset
from pertura.data._perturbation import Perturbation
from pertura.effects import _sums
from pertura.metrics import measured_effect
from pertura.module import Action

ALL = [
    bl.NoChange,
    bl.MeanEffect,
    bl.WeightedMeanEffect,
    bl.NearestNeighbour,
    bl.Additive,
    bl.Linear,
    bl.EmpiricalBayes,
    bl.GaussianProcess,
]
SCREEN = {"perturbation_key": "perturbation", "control": "control", "layer": "counts", "context_key": "cell_type"}


@pytest.fixture(scope="module")
def simulated():
    return datasets.simulate(
        n_cells_per_condition=12,
        n_control_cells=30,
        n_genes=50,
        n_regulators=6,
        n_perturbations=3,
        combinations=1,
        n_contexts=3,
        n_unresponsive_contexts=0,
        n_truth_cells=20,
        seed=1,
    )


@pytest.fixture
def cells(simulated):
    return simulated.copy()


def log1p(adata, library=None):
    counts = adata.layers["counts"].toarray().astype(float)
    return np.log1p(1e4 * counts / (counts.sum(1, keepdims=True) if library is None else library[:, None]))


def of(adata, label, context):
    return ((adata.obs["perturbation"] == label) & (adata.obs["cell_type"] == context)).to_numpy()


# -- means and their errors ---------------------------------------------------------------------------------------------


def test_means_are_of_log1p_of_counts_per_10000(cells, fit, effect):
    x = log1p(cells)
    model = fit(bl.MeanEffect, cells, setup=SCREEN, use_own_context=True)
    label, context = model.vocabulary.names[0], model.contexts[1]
    expected = x[of(cells, label, context)].mean(0) - x[of(cells, "control", context)].mean(0)
    np.testing.assert_allclose(estimated(model, label, 1), expected, atol=1e-5)


def estimated(model, label, context):
    """Mean effect in a context, without any cell."""
    code = torch.as_tensor(model.vocabulary.code(model.vocabulary.parse(label)))[None]
    asked = model.module.means.distinct(Action(code, torch.ones(code.shape)), torch.tensor([context]))
    return model.module.effects(asked, model.module.draw_globals(1))[0][0].numpy()


def test_mean_over_controls_moves_by_the_effect_and_no_cell_falls_below_zero(cells, fit):
    model = fit(bl.MeanEffect, cells, setup=SCREEN)
    label, context = model.vocabulary.names[0], model.contexts[0]
    rows = np.flatnonzero(of(cells, "control", context))
    predicted = model.predict_perturbation(label, indices=rows, return_anndata=True, ci=None)
    assert predicted.X.min() >= 0
    control = log1p(cells)[rows].mean(0)
    mean = estimated(model, label, 0)
    assert (mean < -0.05).sum() > 3 and (mean > 0.05).sum() > 3
    # sampling errors of few cells reach below 0 for rare genes only
    sure = control + mean > 0.3
    assert sure.sum() > 20
    np.testing.assert_allclose(predicted.X.mean(0)[sure], (control + mean)[sure], atol=2e-3)
    np.testing.assert_array_less(np.abs(predicted.X.mean(0) - np.maximum(control + mean, 0)), 0.05)


@pytest.mark.parametrize("storage", ["csr", "csc", "dense", "backed", "backed dense"])
def test_streaming_is_the_same_from_any_storage_and_in_any_chunks(cells, fit, storage, monkeypatch, tmp_path):
    expected = fit(bl.MeanEffect, cells.copy(), setup=SCREEN).module
    setup = {**SCREEN, "layer": None}
    x = cells.layers["counts"]
    cells.X = x.toarray() if "dense" in storage else x.asformat("csc" if storage == "csc" else "csr")
    del cells.layers["counts"]
    if "backed" in storage:
        cells.write_h5ad(tmp_path / "cells.h5ad")
        cells = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    monkeypatch.setattr(_sums, "_CHUNK_ENTRIES", 1)
    chunks = []
    real = _sums.chunks

    def counted(dataset, rows):
        for chunk in real(dataset, rows):
            chunks.append(len(chunk.positions))
            assert sparse.issparse(chunk.x) == ("dense" not in storage)
            yield chunk

    monkeypatch.setattr(_sums, "chunks", counted)
    found = fit(bl.MeanEffect, cells, setup=setup).module
    assert max(chunks) == 64 and sum(chunks) == cells.n_obs
    for name in ("mean", "variance"):
        np.testing.assert_allclose(getattr(found.means, name), getattr(expected.means, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sized", [False, True])
def test_means_are_on_the_scale_of_predictions(cells, fit, sized):
    """What the fit averages is what the model sees of a cell."""
    setup = SCREEN
    if sized:
        cells.obs["size"] = np.random.default_rng(0).uniform(0.2, 3, cells.n_obs)
        setup = {**SCREEN, "size_factor_key": "size"}
    model = fit(bl.NoChange, cells, setup=setup)
    rows = np.flatnonzero(of(cells, "control", model.contexts[0]))
    seen = model.get_latent_representation(indices=rows)
    np.testing.assert_allclose(seen.mean(0), model.module.means.control[0], atol=1e-5)
    parts = [chunk.x for chunk in _sums.chunks(CellDataset(model.adata_manager), rows)]
    np.testing.assert_allclose(seen, parts[0].toarray(), atol=1e-5)


def test_standard_errors(made, fit, effect):
    """Means over conditions of one context share the error of its control."""
    means = {("ctrl", "x"): [0.0, 0.0], ("A", "x"): [1.0, 2.0], ("B", "x"): [1.0, 2.0], ("ctrl", "y"): [0.0, 1.0]}
    module = fit(bl.MeanEffect, made(means, sd=0.6)).module
    # all groups have the same variance, so that moderation leaves it
    se2 = 0.6**2 / 4
    np.testing.assert_allclose(module.means.variance.numpy(), [[se2] * 2] * 4, rtol=1e-5)
    asked = module.conditions.ask(np.array([0]), np.ones(1))
    mean, variance = module.weighted(module.combine(asked, 0, np.ones(2))[None])
    np.testing.assert_allclose(variance, [[2 * se2] * 2], rtol=1e-5)
    unseen = module.conditions.ask(np.array([-2]), np.ones(1))
    mean, variance = module.weighted(module.combine(unseen, 0, np.ones(2))[None])
    np.testing.assert_allclose(mean, [[1.0, 2.0]], atol=1e-6)
    np.testing.assert_allclose(variance, [[1.5 * se2] * 2], rtol=1e-5)


def test_intervals_hold_standard_errors(made, fit, effect):
    means = {("ctrl", "x"): [5.0, 5.0], ("A", "x"): [6.0, 7.0], ("A", "y"): [6.0, 7.0], ("ctrl", "y"): [5.0, 5.0]}
    model = fit(bl.MeanEffect, made(means, sd=0.6))
    # the mean of two contexts, each a difference of two means
    se = np.sqrt((0.6**2 / 4 * 2) * 2 / 4)
    for n_samples in (5, 40):
        options = {"n_samples": n_samples, "ci": 0.9, "column": "lfc_sd"}
        np.testing.assert_allclose(effect(model, "A", "x", **options), se, rtol=1e-4)
        # no Monte Carlo error
        np.testing.assert_allclose(effect(model, "A", "x", n_samples=n_samples), [1, 2], atol=1e-6)


def test_moderated_variances(made, fit):
    """Few replicates borrow from the others; single ones have no variance of their own."""
    adata = made({("ctrl", "x"): [0.0], ("A", "x"): [1.0]}, sd=1.0)
    single = adata[[4]].copy()
    single.obs_names, single.obs["perturbation"] = ["single"], "B"
    module = fit(bl.MeanEffect, anndata.concat([adata, single])).module
    np.testing.assert_allclose(module.means.variance.numpy().ravel(), [1 / 4, 1, 1 / 4], rtol=1e-5)
    noisy = anndata.concat([made({("ctrl", "x"): [0.0]}, sd=3.0), made({("A", "x"): [1.0]}, sd=1.0)], index_unique="-")
    module = fit(bl.MeanEffect, noisy).module
    pooled = (3 * 9 + 3 * 1) / 6
    # the weight of what is borrowed is that of three degrees of freedom, as many as each group has
    np.testing.assert_allclose(
        module.means.variance.numpy().ravel(), [(1 + pooled) / 2 / 4, (9 + pooled) / 2 / 4], rtol=1e-5
    )
    alone = anndata.concat([adata[[0]], adata[[4]]])
    module = fit(bl.MeanEffect, alone).module
    assert (module.means.variance == 0).all()


# -- training rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_rows_outside_training_play_no_part(cells, fit, cls):
    rng = np.random.default_rng(0)
    train = np.sort(rng.permutation(cells.n_obs)[:150])
    split = {"datasplitter_kwargs": {"external_indexing": [train, None, None]}}
    one = fit(cls, cells, setup=SCREEN, train=split)
    part = cells[train].copy()
    other = fit(cls, part, setup=SCREEN)
    for (name, a), b in zip(one.module.state_dict().items(), other.module.state_dict().values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    assert len(one.test_indices) == cells.n_obs - 150 and not len(one.validation_indices)


def test_fraction_of_cells(cells, fit):
    model = fit(bl.MeanEffect, cells, setup=SCREEN, train={"train_size": 0.8, "seed": 3})
    assert len(model.train_indices) == np.ceil(0.8 * cells.n_obs)
    assert model.module.n_train == len(model.train_indices)
    assert len(np.intersect1d(model.train_indices, model.validation_indices)) == 0


def test_arguments_of_gradient_training_are_named(cells, fit, caplog):
    fit(bl.MeanEffect, cells, setup=SCREEN, train={"max_epochs": 3, "accelerator": "cpu", "lr": 0.1})
    assert "MeanEffect is fitted in one pass: lr, max_epochs has no effect" in caplog.text
    caplog.clear()
    fit(bl.MeanEffect, cells, setup=SCREEN, train={"accelerator": "cpu", "enable_progress_bar": False})
    assert "no effect" not in caplog.text


def test_registered_but_not_trained(cells, fit, effect):
    """A perturbation held out by rows is an unseen one."""
    label = "+".join(p for p in cells.obs["perturbation"].unique() if "+" in p)
    first, second = label.split("+")
    held_out = cells.obs["perturbation"].str.split("+").map(lambda m: first in m).to_numpy()
    split = {"datasplitter_kwargs": {"external_indexing": [np.flatnonzero(~held_out), None, np.flatnonzero(held_out)]}}
    model = fit(bl.MeanEffect, cells, calibrated=True, setup=SCREEN, train=split)
    context = model.contexts[0]
    np.testing.assert_allclose(effect(model, first, context), effect(model, "never heard of", context), atol=1e-6)
    unseen, seen = (model._discrepancy.spread(Perturbation(p, (1.0,)), context) for p in (first, second))
    assert (unseen.gene >= seen.gene).all() and unseen.effect + unseen.response > seen.effect + seen.response
    nearest = fit(bl.NearestNeighbour, cells, setup=SCREEN, train=split)
    controls = np.flatnonzero(cells.obs["perturbation"] == "control")
    with pytest.raises(ValueError, match=f"`perturbation`: '{first}' was not seen in training"):
        nearest.get_perturbation_effect(first, indices=controls)
    with pytest.raises(ValueError, match=f"36 cells carry the perturbation '{first}'|72 cells carry the perturbation"):
        nearest.get_perturbation_effect(second)


# -- contexts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [bl.WeightedMeanEffect, bl.NearestNeighbour, bl.Linear, bl.MeanEffect])
def test_controls_of_the_query_tell_of_new_contexts(cells, fit, effect, cls):
    """A context that only the query has is predicted as if its controls had been in training."""
    new = cells.obs["cell_type"].unique()[2]
    treated = ((cells.obs["cell_type"] == new) & (cells.obs["perturbation"] != "control")).to_numpy()
    with_controls = fit(cls, cells[~treated].copy(), setup=SCREEN)
    without = fit(cls, cells[(cells.obs["cell_type"] != new).to_numpy()].copy(), setup=SCREEN)
    query = cells[(of(cells, "control", new))].copy()
    label = with_controls.vocabulary.names[0]
    expected = effect(with_controls, label, new)
    np.testing.assert_allclose(effect(without, label, new, adata=query), expected, atol=1e-3)
    assert np.abs(expected).max() > 0.1
    columns = list(query.obs.columns)
    without.predict_perturbation(label, adata=query, key_added="p", ci=None)
    assert list(query.obs.columns) == columns
    # some of the cells are asked, all controls count
    few = effect(without, label, new, adata=query, indices=np.arange(25))
    assert np.isfinite(few).all()


def test_held_out_controls_tell_of_their_context(cells, fit, effect):
    """A context without any training cell: its controls are among the own cells."""
    new = cells.obs["cell_type"].unique()[2]
    outside = (cells.obs["cell_type"] == new).to_numpy()
    split = {"datasplitter_kwargs": {"external_indexing": [np.flatnonzero(~outside), None, None]}}
    model = fit(bl.WeightedMeanEffect, cells, setup=SCREEN, train=split)
    treated = outside & (cells.obs["perturbation"] != "control").to_numpy()
    expected = fit(bl.WeightedMeanEffect, cells[~treated].copy(), setup=SCREEN)
    label = model.vocabulary.names[0]
    np.testing.assert_allclose(effect(model, label, new), effect(expected, label, new), atol=1e-3)


def test_context_without_controls_is_an_average_one(made, fit, effect, caplog):
    means = {("ctrl", c): [1.0, i, 3.0] for i, c in enumerate("xy")}
    means |= {("A", c): [2.0, i, i] for i, c in enumerate("xy")}
    model = fit(bl.WeightedMeanEffect, made(means))
    query = made({("A", "z"): [2.0, 0.5, 1.0]})
    found = effect(model, "A", "z", adata=query)
    assert "No control cells in 'z'" in caplog.text
    assert np.isfinite(found).all() and found[0] == pytest.approx(1)


def test_perturbed_cells_without_controls_are_left_out(made, fit, effect, caplog):
    means = {("ctrl", "x"): [1.0, 1.0], ("A", "x"): [2.0, 2.0], ("A", "y"): [9.0, 9.0]}
    model = fit(bl.MeanEffect, made(means))
    assert "4 perturbed cells are in contexts without control cells" in caplog.text
    np.testing.assert_allclose(effect(model, "A", "x"), 1, atol=1e-5)
    with pytest.raises(ValueError, match="Every context needs control cells"):
        fit(bl.MeanEffect, made({("ctrl", "x"): [1.0], ("A", "y"): [2.0]}))


def test_without_contexts(cells, fit, effect):
    model = fit(bl.MeanEffect, cells, setup={**SCREEN, "context_key": None})
    label = model.vocabulary.names[0]
    cells.X = log1p(cells)
    expected = measured_effect(cells, **{k: SCREEN[k] for k in ("perturbation_key", "control")})
    expected = expected[expected["perturbation"] == label]["effect"]
    np.testing.assert_allclose(estimated(model, label, 0), expected, atol=1e-4)


# -- cells --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_a_cell_under_its_own_perturbation_is_itself(cells, fit, cls):
    model = fit(cls, cells, setup=SCREEN)
    x = log1p(cells)
    for label in (model.vocabulary.names[0], "+".join(model.vocabulary.combinations[0])):
        rows = np.flatnonzero(cells.obs["perturbation"] == label)
        ask = {"indices": rows, "return_anndata": True, "n_samples": 2}
        predicted = model.predict_perturbation(label, **ask)
        np.testing.assert_allclose(predicted.X, x[rows], rtol=1e-6)
        counts = model.predict_perturbation(label, scale="counts", **ask)
        expected = cells.layers["counts"][rows].toarray()
        np.testing.assert_array_equal(counts.X, expected)
        np.testing.assert_array_equal(counts.layers["low"], expected)


def test_effects_of_treated_cells_are_taken_back(made, fit):
    means = {("ctrl", "x"): [5.0, 5.0], ("A", "x"): [6.0, 2.0], ("B", "x"): [5.0, 9.0]}
    adata = made(means)
    model = fit(bl.MeanEffect, adata)
    rows = np.arange(4, 8)
    basal = model.get_latent_representation(indices=rows)
    np.testing.assert_allclose(basal, adata.X[rows] - [1, -3], atol=1e-5)
    predicted = model.predict_perturbation("B", indices=rows, return_anndata=True, ci=None)
    np.testing.assert_allclose(predicted.X, basal + [0, 4], atol=1e-5)
    perturbed = model.get_latent_representation(indices=rows, kind="perturbed")
    np.testing.assert_allclose(perturbed, adata.X[rows], atol=1e-5)


def test_scales(cells, fit):
    model = fit(bl.NoChange, cells, setup=SCREEN)
    rows = np.flatnonzero(cells.obs["perturbation"] == "control")[:20]
    label = model.vocabulary.names[0]
    counts = model.predict_perturbation(label, indices=rows, scale="counts", return_anndata=True, ci=None)
    np.testing.assert_array_equal(counts.X, cells.layers["counts"][rows].toarray())


def test_more_distant_questions_have_wider_intervals(cells, fit, effect):
    model = fit(bl.MeanEffect, cells, calibrated=True, setup=SCREEN)
    label, context = model.vocabulary.names[0], model.contexts[0]
    widths = [effect(model, p, context, column="lfc_sd").mean() for p in (label, "never heard of")]
    assert widths[0] < widths[1]


def test_seeds(cells, fit):
    model = fit(bl.MeanEffect, cells, setup=SCREEN)
    rows = np.flatnonzero(cells.obs["perturbation"] == "control")[:10]
    ask = {"indices": rows, "return_anndata": True, "n_samples": 6}
    label = model.vocabulary.names[0]
    one, same, other = (model.predict_perturbation(label, seed=s, **ask) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.layers["low"], same.layers["low"])
    # draws are quantiles in random order: another seed gives other draws, but the same means and intervals
    np.testing.assert_allclose(one.X, other.X, atol=1e-5)
    deviates = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        deviates.append(model.module.draw_globals(6)["deviate"].numpy())
    np.testing.assert_array_equal(deviates[0], deviates[1])
    assert not np.array_equal(deviates[0], deviates[2])
    np.testing.assert_allclose(deviates[0].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(deviates[0].std(0, ddof=1), 1, rtol=1e-5)
    assert (one.layers["low"] <= one.X + 1e-6).all() and (one.X <= one.layers["high"] + 1e-6).all()


# -- saving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_saved_and_loaded(cells, fit, tmp_path, cls):
    options = {"temperature": 0.3, "use_own_context": True} if cls is bl.WeightedMeanEffect else {}
    cells.uns["f"] = pd.DataFrame(
        np.random.default_rng(0).normal(size=(4, 3)),
        index=[*sorted(p for p in cells.obs["perturbation"].unique() if p not in ("control",) and "+" not in p), "new"],
    )
    model = fit(cls, cells, calibrated=True, setup={**SCREEN, "perturbation_features_key": "f"}, **options)
    model.save(tmp_path / "model")
    ask = {"perturbation": [model.vocabulary.names[0], "new"], "n_samples": 4}
    expected = model.get_perturbation_effect(**ask)
    with_data = cls.load(tmp_path / "model", adata=cells.copy(), accelerator="cpu")
    pd.testing.assert_frame_equal(with_data.get_perturbation_effect(**ask), expected)
    without = cls.load(tmp_path / "model", adata=False, accelerator="cpu")
    pd.testing.assert_frame_equal(without.get_perturbation_effect(adata=cells.copy(), **ask), expected)
    # the number of conditions may change with new training
    half = np.flatnonzero(cells.obs["cell_type"].isin(model.contexts[:2]))
    with_data.train(datasplitter_kwargs={"external_indexing": [half, None, None]})
    assert len(with_data.module.conditions) < len(model.module.conditions)
    with_data.save(tmp_path / "again")
    again = cls.load(tmp_path / "again", adata=False, accelerator="cpu")
    pd.testing.assert_frame_equal(
        again.get_perturbation_effect(adata=cells.copy(), **ask), with_data.get_perturbation_effect(**ask)
    )


def test_linear_keeps_its_gene_loadings(cells, fit, tmp_path):
    # perturbations of the simulator bear the names of genes
    model = fit(bl.Linear, cells, setup=SCREEN)
    new = next(g for g in cells.var_names if g not in model.vocabulary.names)
    expected = model.get_perturbation_effect(new)
    assert set(expected["novelty"]) == {"unseen with features"}
    model.save(tmp_path / "model")
    loaded = bl.Linear.load(tmp_path / "model", adata=False, accelerator="cpu")
    pd.testing.assert_frame_equal(loaded.get_perturbation_effect(new, adata=cells.copy()), expected)


# -- unusual questions and errors ---------------------------------------------------------------------------------------


def test_usual_dose_of_an_unseen_perturbation(made, fit, effect):
    means = {("ctrl", "x", 0.0): [1.0], ("A", "x", 500.0): [2.0], ("B", "x", 500.0): [4.0]}
    model = fit(bl.MeanEffect, made(means), setup={"dose_key": "dose"})
    table = model.get_perturbation_effect("new")
    assert set(table["dose"]) == {"500"}
    np.testing.assert_allclose(table["lfc_mean"], 2, atol=1e-5)


def test_a_misspelt_name_is_reported(made, fit, effect, caplog):
    model = fit(bl.MeanEffect, made({("ctrl", "x"): [1.0], ("stim", "x"): [2.0]}))
    effect(model, "stin", "x")
    assert "'stin' was not seen in training" in caplog.text and "Did you mean 'stim'?" in caplog.text


def test_hints_name_what_was_trained_and_may_be_meant(made, fit, effect, caplog):
    means = {("ctrl", "x"): [1.0], ("IRF1", "x"): [2.0], ("Acetaminophen", "x"): [2.0], ("IRF3", "x"): [3.0]}
    adata = made(means)
    keep = np.flatnonzero(adata.obs["perturbation"] != "IRF3")
    rest = np.flatnonzero(adata.obs["perturbation"] == "IRF3")
    split = {"external_indexing": [keep, rest, np.array([], dtype=int)]}
    model = fit(bl.MeanEffect, adata, train={"datasplitter_kwargs": split})
    for name, hint in (("IRF2", ""), ("IRF-1", "IRF1"), ("irf3", ""), ("paracetamol", "Acetaminophen"), ("IRF3", "")):
        caplog.clear()
        effect(model, name, "x")
        assert f"'{name}' was not seen" in caplog.text
        assert (f"Did you mean {hint!r}?" in caplog.text) if hint else ("Did you mean" not in caplog.text), name


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (bl.WeightedMeanEffect, {"temperature": 0}, "`temperature` must be a number above 0, got 0"),
        (bl.WeightedMeanEffect, {"temperature": "low"}, "`temperature` must be a number above 0, got 'low'"),
        (bl.MeanEffect, {"use_own_context": "yes"}, "`use_own_context` must be True or False, got 'yes'"),
        (bl.Linear, {"n_components": 0}, "`n_components` must be a whole number of at least 1, got 0"),
        (bl.Linear, {"ridge": -0.1}, "`ridge` must be a number above 0, got -0.1"),
    ],
)
def test_wrong_options(made, fit, cls, options, message):
    with pytest.raises(ValueError, match=message):
        fit(cls, made({("ctrl", "x"): [1.0], ("A", "x"): [2.0]}), **options)


def test_untrained(made):
    adata = made({("ctrl", "x"): [1.0], ("A", "x"): [2.0]})
    bl.MeanEffect.setup_anndata(adata, perturbation_key="perturbation", control="ctrl")
    with pytest.raises(RuntimeError, match="not trained"):
        bl.MeanEffect(adata).predict_perturbation("A")


def test_no_distribution_of_cells(made, fit):
    model = fit(bl.MeanEffect, made({("ctrl", "x"): [1.0], ("A", "x"): [2.0]}))
    for ask in (model.posterior_predictive_sample, model.get_marginal_ll):
        with pytest.raises(ValueError, match="no distribution of single cells"):
            ask()
