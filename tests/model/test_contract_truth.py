"""What predictions mean, on planted truth, for every model."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

import pertura.model.base._predict as predict
from pertura import datasets
from pertura.datasets import true_effects
from pertura.effects import Error
from pertura.module._base import Cells

FEW = {"n_samples": 2, "ci": None}


@pytest.fixture(scope="session")
def planted():
    """Two doses, two contexts, and a batch that most perturbed cells are in."""
    adata = datasets.simulate(
        n_cells_per_condition=50,
        n_control_cells=120,
        n_genes=40,
        n_regulators=6,
        n_perturbations=3,
        doses=[1.0, 10.0],
        n_contexts=2,
        n_unresponsive_contexts=0,
        n_biomarkers=2,
        n_batches=2,
        batch_sd=0.6,
        n_truth_cells=200,
        effect_size=2.0,
        library_size=4000.0,
        seed=5,
    )
    treated = (adata.obs["perturbation"] != "control").to_numpy()
    first = (adata.obs["batch"] == adata.obs["batch"].unique()[0]).to_numpy()
    keep = ~(treated & first) | (np.random.default_rng(0).random(adata.n_obs) < 0.3)
    return adata[keep].copy()


@pytest.fixture(scope="session")
def fitted(spec, planted):
    adata = planted.copy()
    spec.setup(adata, dose_key="dose")
    return spec.fit(spec.make(adata, **spec.planted), **spec.planted_train)


def log_normalized(counts):
    counts = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, dtype=np.float64)
    return np.log1p(1e4 * counts / counts.sum(1, keepdims=True))


def measured(adata, name, dose, context, batch=None):
    """Effect within batches, weighted by the perturbed cells'."""
    x = log_normalized(adata.layers["counts"])
    here = (adata.obs["cell_type"] == context).to_numpy()
    treated = here & (adata.obs["perturbation"] == name).to_numpy() & (adata.obs["dose"] == dose).to_numpy()
    control = here & (adata.obs["perturbation"] == "control").to_numpy()
    total, n = 0.0, 0
    for own in adata.obs["batch"].unique():
        at = (adata.obs["batch"] == own).to_numpy()
        if (treated & at).any() and (control & at).any():
            k = (treated & at).sum()
            total = total + k * (x[treated & at].mean(0) - x[control & at].mean(0))
            n += k
    return total / n


def along(effect, truth):
    """Size of an effect in units of another one."""
    return float(np.asarray(effect) @ truth / (truth @ truth))


def effects(model, dose=10.0, **options):
    table = model.get_perturbation_effect(list(model.vocabulary.names), dose=dose, **options)
    return dict(list(table.groupby(["perturbation", "context"], observed=True)))


def test_own_perturbation_gives_own_counts(fitted):
    adata = fitted.adata
    for name in ["control", fitted.vocabulary.names[0]]:
        rows = np.flatnonzero((adata.obs["perturbation"] == name) & (adata.obs["dose"].isin([0.0, 10.0])))[:40]
        asked = {"dose": 10.0} if name != "control" else {}
        found = fitted.predict_perturbation(name, indices=rows, scale="counts", return_anndata=True, **asked, **FEW)
        counts = adata.layers["counts"][rows]
        counts = counts.toarray() if hasattr(counts, "toarray") else counts
        np.testing.assert_allclose(found.X, counts, atol=2e-3, rtol=1e-4)
        log1p = fitted.predict_perturbation(name, indices=rows, return_anndata=True, n_samples=4, **asked)
        np.testing.assert_allclose(log1p.X, log_normalized(counts), atol=1e-3)


def test_effect_table_is_the_mean_of_predictions(fitted):
    adata, name = fitted.adata, fitted.vocabulary.names[0]
    rows = np.flatnonzero(adata.obs["perturbation"] == "control")
    options = {"indices": rows, "dose": 10.0, "n_samples": 10, "seed": 1}
    found = fitted.predict_perturbation(name, return_anndata=True, **options)
    table = fitted.get_perturbation_effect(name, **options)
    moved = found.X - log_normalized(adata.layers["counts"][rows])
    for context, own in table.groupby("context", observed=True):
        at = (adata.obs["cell_type"].iloc[rows] == context).to_numpy()
        np.testing.assert_allclose(own["lfc_mean"], moved[at].mean(0), atol=0.02)


def test_effects_are_those_that_were_planted(fitted, spec):
    for (name, context), own in effects(fitted, spec.planted_dose).items():
        truth = measured(fitted.adata, name, 10.0, context)
        r = np.corrcoef(own["lfc_mean"], truth)[0, 1]
        assert r > spec.planted_r, (name, context, r)
        slope = along(own["lfc_mean"], truth)
        assert spec.planted_slope < slope < 1.6, (name, context, slope)


def test_effects_rise_with_the_dose_as_planted(fitted, spec):
    """A tenth of the dose has a quarter to two fifths of the effect here, and nothing is said of doses above the highest.

    A gene that is knocked down by a tenth loses a tenth of its counts, which is less of their logarithm.
    """
    least = 0.01 if spec.only_genes else 0.05
    by_dose = [effects(fitted, dose) for dose in (1.0, 3.0, 10.0)]
    for key, own in by_dose[-1].items():
        highest = own["lfc_mean"].to_numpy()
        sizes = [along(found[key]["lfc_mean"], highest) for found in by_dose]
        assert least < sizes[0] < 0.6, (key, sizes)
        assert sizes[0] < sizes[1] < sizes[2], (key, sizes)


def test_perturbations_are_taken_back(fitted):
    """Perturbed cells, asked for the control, lose the effect: not nothing of it, and not twice."""
    adata = fitted.adata
    x = log_normalized(adata.layers["counts"])
    for name in fitted.vocabulary.names:
        here = (adata.obs["perturbation"] == name) & (adata.obs["dose"] == 10.0)
        rows = np.flatnonzero(here)
        found = fitted.predict_perturbation("control", indices=rows, return_anndata=True, **FEW)
        for context in adata.obs["cell_type"].unique():
            at = (adata.obs["cell_type"].iloc[rows] == context).to_numpy()
            size = along((x[rows] - found.X)[at].mean(0), measured(adata, name, 10.0, context))
            assert 0.25 < size < 1.4, (name, context, size)


@pytest.mark.needs("samples", value=False)
def test_basal_states_are_expression_without_the_effect(fitted):
    """Where there is no latent space."""
    adata, name = fitted.adata, fitted.vocabulary.names[0]
    x = log_normalized(adata.layers["counts"])
    for context in adata.obs["cell_type"].unique():
        here = (adata.obs["perturbation"] == name) & (adata.obs["dose"] == 10.0) & (adata.obs["cell_type"] == context)
        rows = np.flatnonzero(here)
        basal = fitted.get_latent_representation(indices=rows, kind="basal", n_samples=2)
        # effects that are drawn towards those of other contexts are smaller along their own noise
        assert along((x[rows] - basal).mean(0), measured(adata, name, 10.0, context)) == pytest.approx(1.0, abs=0.25)


def test_batches_are_no_effect(fitted, spec):
    """Perturbed cells are mostly of one batch: what differs between batches must not pass for an effect."""
    adata = fitted.adata
    x, control = log_normalized(adata.layers["counts"]), (adata.obs["perturbation"] == "control").to_numpy()
    one, other = adata.obs["batch"].unique()
    shift = x[control & (adata.obs["batch"] == other)].mean(0) - x[control & (adata.obs["batch"] == one)].mean(0)
    passed = []
    for (name, context), own in effects(fitted, spec.planted_dose).items():
        truth = measured(adata, name, 10.0, context)
        left, apart = (v - truth * along(v, truth) for v in (own["lfc_mean"].to_numpy(), shift))
        passed.append(along(left, apart))
    # perturbed cells have a quarter more of one batch than controls
    assert np.abs(passed).max() < 0.12, passed


def test_intervals_of_effects_hold_what_was_planted(fitted, spec):
    """Compared with the effects of the simulation, not with the cells that the model was trained on."""
    wide, narrow = (effects(fitted, spec.planted_dose, ci=ci, n_samples=50) for ci in (0.9, 0.5))
    planted_effects = true_effects(fitted.adata)
    inside = {}
    for ci, tables in ((0.9, wide), (0.5, narrow)):
        hits = []
        for (name, context), own in tables.items():
            truth = planted_effects.loc[(name, 10.0, context), own["gene"]].to_numpy()
            hits.append((own["ci_low"] <= truth) & (truth <= own["ci_high"]))
        inside[ci] = np.mean(hits)
    assert 0.8 <= inside[0.9] <= 0.985 and 0.35 <= inside[0.5] <= 0.75, inside
    for key, own in wide.items():
        # errors of few strong genes have heavier tails than a normal distribution, for which it is 0.41
        width, half = (t["ci_high"] - t["ci_low"] for t in (own, narrow[key]))
        assert (half / width).between(0.1, 0.5).all()


def test_intervals_of_cells_are_quantiles_of_their_draws(fitted, monkeypatch):
    """Draws that rise evenly from 0 to 1, and no discrepancy."""

    def even(block, found):
        return torch.linspace(0.0, 1.0, 101)[:, None, None].expand(101, len(block), len(fitted.gene_names))

    monkeypatch.setattr(predict.Block, "draws", even)
    monkeypatch.setattr(fitted, "calibration_", None)
    for ci in (0.9, 0.5):
        options = {"ci": ci, "n_samples": 2, "indices": [0, 1], "dose": 10.0, "return_anndata": True}
        found = fitted.predict_perturbation(fitted.vocabulary.names[0], **options)
        np.testing.assert_allclose(found.layers["low"], (1 - ci) / 2, atol=1e-5)
        np.testing.assert_allclose(found.layers["high"], (1 + ci) / 2, atol=1e-5)


def test_what_is_taken_back_is_as_uncertain_as_what_is_added(fitted, monkeypatch):
    """Perturbed cells, asked for the control: the discrepancy is that of their own perturbation."""
    name = fitted.vocabulary.names[0]
    rows = np.flatnonzero((fitted.adata.obs["perturbation"] == name) & (fitted.adata.obs["dose"] == 10.0))[:5]
    ends = []
    for seen in (0.0, 0.5):
        calibration = {**fitted.calibration_, "noise": 0.0, "seen": asdict(Error(seen))}
        monkeypatch.setattr(fitted, "calibration_", calibration)
        found = fitted.predict_perturbation("control", indices=rows, n_samples=4, return_anndata=True)
        ends.append(found.layers["high"] - found.X)
    expected = np.sqrt(ends[0].clip(min=0) ** 2 + (1.6449 * 0.5) ** 2)
    np.testing.assert_allclose(ends[1], expected, rtol=1e-3, atol=1e-3)


def test_proba_de_does_not_grow_with_ignorance(fitted):
    table = fitted.get_perturbation_effect(fitted.vocabulary.names[0], dose=10.0)
    unsure = table["lfc_mean"].abs() < 0.02
    assert (table.loc[unsure, "proba_de"] <= 0.55).all()


@pytest.mark.needs("samples")
def test_blocks_of_cells_have_noise_of_their_own(fitted):
    """Two full blocks of copies of one cell: noise averages out over cells only if it differs between them."""
    adata = fitted.adata
    rows = np.tile(np.flatnonzero(adata.obs["perturbation"] == "control")[:1], 512)
    copies = adata[rows].copy()
    copies.obs_names_make_unique()
    found = fitted.posterior_predictive_sample(copies, n_samples=2).todense()
    one, other = found[:256] - found.mean(0), found[256:] - found.mean(0)
    assert abs((one * other).sum()) < 0.2 * np.sqrt((one**2).sum() * (other**2).sum())


@pytest.mark.needs("samples")
@pytest.mark.needs("replicates_counts")
def test_replicates_are_like_the_cells(fitted):
    """Mean, zeros and spread of each gene, where a replicate has the distribution of the registered layer."""
    rows = np.flatnonzero(fitted.adata.obs["perturbation"] == "control")
    counts = fitted.adata.layers["counts"][rows].toarray()
    drawn = fitted.posterior_predictive_sample(indices=rows, n_samples=2).todense()
    np.testing.assert_allclose(drawn.mean((0, 2)), counts.mean(0), rtol=0.15, atol=0.05)
    np.testing.assert_allclose((drawn == 0).mean((0, 2)), (counts == 0).mean(0), atol=0.07)
    ratio = drawn.var((0, 2)) / counts.var(0)
    assert 0.8 < np.median(ratio) < 1.25 and 0.5 < ratio.min() and ratio.max() < 2.2


@pytest.mark.needs("scores")
def test_warm_up_weighs_divergences_alone(fitted):
    """Prior and posterior of a latent variable count alike, expression fully, whatever the weight of the divergences."""
    import pyro

    module, rows = fitted.module, np.arange(20)
    batch = next(fitted._registered_cells(rows).tensors(20, torch.device("cpu")))
    scales = []
    for weight in (0.25, 1.0):
        with torch.no_grad():
            guide, model = (
                pyro.poutine.trace(program).get_trace(Cells.from_tensors(batch), kl_weight=weight).nodes
                for program in (module.guide, module.model)
            )
        local = [
            n
            for n, s in guide.items()
            if s["type"] == "sample" and any(f.name == "cells" for f in s["cond_indep_stack"])
        ]
        local = [n for n in local if not n.endswith("cells")]
        assert local
        scales.append(
            [(float(model[n]["scale"]), float(guide[n]["scale"])) for n in local] + [float(model["x"]["scale"])]
        )
    for (p, q), (p_full, q_full) in zip(scales[0][:-1], scales[1][:-1], strict=True):
        assert p == pytest.approx(q) and p_full == pytest.approx(q_full) and p == pytest.approx(0.25 * p_full)
    assert scales[0][-1] == scales[1][-1]


@pytest.mark.needs("scores")
def test_likelihood_is_that_of_the_perturbation(fitted, spec):
    adata = fitted.adata
    rows = np.flatnonzero((adata.obs["perturbation"] == fitted.vocabulary.names[0]) & (adata.obs["dose"] == 10.0))
    own = fitted.get_marginal_ll(indices=rows, n_samples=50)
    other = adata[rows].copy()
    other.obs["perturbation"], other.obs["dose"] = "control", 0.0
    assert own.shape == (len(rows),) and np.isfinite(own).all()
    difference = own.mean() - fitted.get_marginal_ll(other, n_samples=50).mean()
    assert difference > 0 if spec.likes_own else abs(difference) > 1e-3


@pytest.mark.needs("scores", value=False)
def test_there_is_no_likelihood_without_a_distribution(fitted):
    with pytest.raises((ValueError, NotImplementedError)):
        fitted.get_marginal_ll()


# -- data that are no counts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def planted_continuous():
    """Centered profiles of two contexts."""
    adata = datasets.simulate(
        modality="log",
        n_cells_per_condition=25,
        n_control_cells=40,
        n_genes=30,
        n_regulators=5,
        n_perturbations=2,
        n_contexts=2,
        n_unresponsive_contexts=0,
        n_biomarkers=2,
        n_batches=1,
        effect_size=2.0,
        noise_sd=0.3,
        seed=5,
    )
    adata.X = adata.X - adata.X.mean(0)
    return adata


@pytest.fixture(scope="session")
def fitted_continuous(spec, planted_continuous):
    adata = planted_continuous.copy()
    spec.setup(adata, layer=None, batch_key=None)
    epochs = {"max_epochs": 40, "batch_size": 64} if spec.learns_by_gradient else {}
    return spec.fit(spec.make(adata, **spec.planted), **epochs)


def test_continuous_data_have_the_planted_effect(fitted_continuous, spec):
    model, adata = fitted_continuous, fitted_continuous.adata
    table = model.get_perturbation_effect(list(model.vocabulary.names))
    planted_effects = true_effects(adata)
    for (name, context), own in table.groupby(["perturbation", "context"], observed=True):
        truth = planted_effects.loc[(name, context), own["gene"]].to_numpy()
        assert np.corrcoef(own["lfc_mean"], truth)[0, 1] > spec.planted_r, (name, context)
        assert spec.planted_continuous < along(own["lfc_mean"], truth) < 1.5, (name, context)
    name = model.vocabulary.names[0]
    rows = np.flatnonzero(adata.obs["perturbation"] == "control")
    found = model.predict_perturbation(name, indices=rows, return_anndata=True, **FEW)
    for context, own in table[table["perturbation"] == name].groupby("context", observed=True):
        at = (adata.obs["cell_type"].iloc[rows] == context).to_numpy()
        np.testing.assert_allclose((found.X - adata.X[rows])[at].mean(0), own["lfc_mean"], atol=0.15)


def test_continuous_data_are_given_back(fitted_continuous):
    adata, name = fitted_continuous.adata, fitted_continuous.vocabulary.names[0]
    for label in ("control", name):
        rows = np.flatnonzero(adata.obs["perturbation"] == label)
        found = fitted_continuous.predict_perturbation(label, indices=rows, return_anndata=True, **FEW)
        np.testing.assert_allclose(found.X, adata.X[rows], atol=1e-3)
