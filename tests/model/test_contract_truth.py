"""What predictions mean, on planted truth, for every model."""

from __future__ import annotations

import numpy as np
import pytest

from pertura import datasets

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
    for (name, context), own in effects(fitted).items():
        truth = measured(fitted.adata, name, 10.0, context)
        r = np.corrcoef(own["lfc_mean"], truth)[0, 1]
        assert r > spec.planted_r, (name, context, r)
        slope = (own["lfc_mean"].to_numpy() * truth).sum() / (truth**2).sum()
        assert spec.planted_slope < slope < 1.6, (name, context, slope)


def test_doses_matter(fitted, spec):
    if not spec.planted_dose:
        return
    low, high = effects(fitted, 1.0), effects(fitted, 10.0)
    for key in high:
        weak, strong = (np.abs(e[key]["lfc_mean"]).sum() for e in (low, high))
        assert strong > 1.1 * weak, (key, weak, strong)


def test_batches_are_no_effect(fitted):
    """Perturbed cells are mostly of one batch: what differs between batches must not pass for an effect."""
    adata = fitted.adata
    x, control = log_normalized(adata.layers["counts"]), (adata.obs["perturbation"] == "control").to_numpy()
    one, other = adata.obs["batch"].unique()
    shift = x[control & (adata.obs["batch"] == other)].mean(0) - x[control & (adata.obs["batch"] == one)].mean(0)
    for (name, context), own in effects(fitted).items():
        truth = measured(adata, name, 10.0, context)
        left = own["lfc_mean"].to_numpy() - truth * (own["lfc_mean"].to_numpy() @ truth) / (truth @ truth)
        apart = shift - truth * (shift @ truth) / (truth @ truth)
        assert abs(left @ apart) / (apart @ apart) < 0.25, (name, context)


def test_intervals_of_effects(fitted):
    wide, narrow = (effects(fitted, ci=ci) for ci in (0.9, 0.5))
    inside = {}
    for ci, tables in ((0.9, wide), (0.5, narrow)):
        hits = []
        for (name, context), own in tables.items():
            truth = measured(fitted.adata, name, 10.0, context)
            hits.append((own["ci_low"] <= truth) & (truth <= own["ci_high"]))
        inside[ci] = np.mean(hits)
    assert inside[0.9] > 0.6 and inside[0.9] >= inside[0.5]
    for key, own in wide.items():
        width, half = (t["ci_high"] - t["ci_low"] for t in (own, narrow[key]))
        np.testing.assert_allclose(half / width, 0.41, atol=0.01)


def test_proba_de_does_not_grow_with_ignorance(fitted):
    table = fitted.get_perturbation_effect(fitted.vocabulary.names[0], dose=10.0)
    unsure = table["lfc_mean"].abs() < 0.02
    assert (table.loc[unsure, "proba_de"] <= 0.55).all()


def test_blocks_of_cells_have_noise_of_their_own(fitted, spec):
    if not spec.samples:
        return
    adata = fitted.adata
    rows = np.tile(np.flatnonzero(adata.obs["perturbation"] == "control")[:1], 300)
    copies = adata[rows].copy()
    copies.obs_names_make_unique()
    found = fitted.posterior_predictive_sample(copies, n_samples=25).todense()
    assert not np.array_equal(found[0], found[256]) and not np.array_equal(found[:40], found[256:296])


def test_likelihood_is_that_of_the_perturbation(fitted, spec):
    if not spec.scores:
        with pytest.raises((ValueError, NotImplementedError)):
            fitted.get_marginal_ll()
        return
    adata = fitted.adata
    rows = np.flatnonzero((adata.obs["perturbation"] == fitted.vocabulary.names[0]) & (adata.obs["dose"] == 10.0))
    own = fitted.get_marginal_ll(indices=rows, n_samples=50)
    other = adata[rows].copy()
    other.obs["perturbation"], other.obs["dose"] = "control", 0.0
    assert own.shape == (len(rows),) and np.isfinite(own).all()
    difference = own.mean() - fitted.get_marginal_ll(other, n_samples=50).mean()
    assert difference > 0 if spec.likes_own else abs(difference) > 1e-3
