"""CPA predicts combinations and doses that were not trained, from a basal state that does not know the perturbation."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from pertura import datasets
from pertura.model import CPA

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SETUP = {"perturbation_key": "perturbation", "control": "control", "layer": "counts", "context_key": "cell_type"}
SMALL = {
    "n_latent": 12,
    "n_layers": 0,
    "n_hidden": 32,
    "discriminator_hidden": (32,),
    "lr": 1e-2,
    "lr_discriminator": 1e-2,
}
WORLD = {
    "n_genes": 60,
    "n_regulators": 8,
    "n_biomarkers": 3,
    "n_batches": 1,
    "n_truth_cells": 50,
    "n_unresponsive_contexts": 0,
}


def fitted(adata, max_epochs, **options):
    CPA.setup_anndata(adata, **SETUP, dose_key="dose" if "dose" in adata.obs else None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CPA(adata, **{**SMALL, **options})
    model.train(max_epochs=max_epochs, batch_size=128, **QUIET)
    return model


def measured(adata, by="perturbation"):
    means = (
        pd.DataFrame(adata.X.toarray(), columns=adata.var_names).groupby(adata.obs[by].astype(str).to_numpy()).mean()
    )
    return means.drop(index="control") - means.loc["control"]


def predicted(model, names, **asked):
    table = model.get_perturbation_effect(names, **asked)
    return table.groupby(["perturbation", "gene"])["lfc_mean"].mean().unstack()[model.adata.var_names]


def slope(x, y):
    return float((x * y).sum() / (x * x).sum())


@pytest.fixture(scope="module")
def screen():
    """Two contexts, four knock-outs and two pairs, of which one is held out."""
    adata = datasets.simulate(
        n_cells_per_condition=60, n_control_cells=150, n_perturbations=4, combinations=2, n_contexts=2, seed=1, **WORLD
    )
    (held_out, _) = sorted({p for p in adata.obs["perturbation"] if "+" in p})
    return adata[adata.obs["perturbation"] != held_out].copy(), measured(adata), held_out


@pytest.fixture(scope="module")
def trained(screen):
    return fitted(screen[0].copy(), max_epochs=50)


def test_a_planted_combination_that_was_not_trained_is_predicted(trained, screen):
    _, truth, pair = screen
    effects = predicted(trained, list(truth.index)).loc[truth.index]
    correlation = {p: np.corrcoef(effects.loc[p], truth.loc[p])[0, 1] for p in truth.index}
    assert correlation[pair] > 0.8
    assert 0.5 < slope(truth.loc[pair], effects.loc[pair]) < 1.5
    # closer than either member alone
    error = {p: ((effects.loc[p] - truth.loc[pair]) ** 2).mean() for p in (pair, *pair.split("+"))}
    assert min(error, key=error.get) == pair


def recognized(model, label):
    """Balanced accuracy of a linear probe of the basal state, in units of chance."""
    z, cells = model.get_latent_representation(), model.adata.obs
    single = ~cells["perturbation"].astype(str).str.contains("+", regex=False).to_numpy()
    y = cells.loc[single, label].astype(str)
    probe = LogisticRegression(max_iter=500)
    return cross_val_score(probe, z[single], y, cv=3, scoring="balanced_accuracy").mean() * y.nunique()


def test_the_adversary_takes_perturbation_and_context_out_of_the_basal_state(trained, screen):
    free = fitted(screen[0].copy(), max_epochs=15, adversary_weight=0.0)
    assert recognized(trained, "perturbation") < 1.4
    assert recognized(free, "perturbation") > 2.0
    assert recognized(trained, "cell_type") < 1.3
    assert recognized(free, "cell_type") > 1.7


def test_a_cell_under_its_own_perturbation_is_what_was_measured(trained):
    adata = trained.adata
    for name in ("control", *trained.vocabulary.names[:2]):
        rows = np.flatnonzero(adata.obs["perturbation"] == name)[:20]
        own = trained.predict_perturbation(name, indices=rows, scale="counts", ci=None, return_anndata=True)
        assert np.array_equal(own.X, adata.layers["counts"][rows].toarray())


def test_the_effect_is_the_mean_change_of_control_cells(trained):
    rows = np.flatnonzero(trained.adata.obs["perturbation"] == "control")
    name = trained.vocabulary.names[0]
    cells = trained.predict_perturbation(name, indices=rows, ci=None, n_samples=4, return_anndata=True)
    change = pd.DataFrame(cells.X - trained.adata.X[rows].toarray(), columns=cells.var_names)
    by_context = change.groupby(trained.adata.obs["cell_type"].astype(str).to_numpy()[rows]).mean()
    table = trained.get_perturbation_effect(name, n_samples=4).pivot(index="context", columns="gene", values="lfc_mean")
    np.testing.assert_allclose(by_context, table.loc[by_context.index, by_context.columns], atol=0.03)


def test_log_likelihood_knows_the_perturbation(trained, screen):
    other = trained.adata.copy()
    labels = other.obs["perturbation"].astype(str)
    other.obs["perturbation"] = labels.map(dict(zip(sorted(set(labels)), np.roll(sorted(set(labels)), 1), strict=True)))
    own = trained.get_marginal_ll(n_samples=20)
    assert own.shape == (other.n_obs,)
    assert own.mean() > trained.get_marginal_ll(other, n_samples=20).mean() + 1.0


def test_a_context_that_was_not_trained_is_predicted_with_wider_intervals(trained):
    new = trained.adata[trained.adata.obs["perturbation"] == "control"].copy()
    new.obs["cell_type"] = "another"
    name = trained.vocabulary.names[0]
    there, here = (trained.get_perturbation_effect(name, adata=a) for a in (new, None))
    assert (there["novelty"] == "new context").all()
    assert there["lfc_sd"].mean() > 1.03 * here["lfc_sd"].mean()
    mean = here.groupby("gene")["lfc_mean"].mean()
    assert np.corrcoef(there.set_index("gene")["lfc_mean"].loc[mean.index], mean)[0, 1] > 0.9


def test_saved_and_loaded_it_predicts_the_same_and_trains_on(trained, tmp_path):
    trained.save(tmp_path / "cpa", overwrite=True)
    loaded = CPA.load(tmp_path / "cpa", adata=trained.adata.copy(), accelerator="cpu")
    names = list(trained.vocabulary.names)
    pd.testing.assert_frame_equal(predicted(loaded, names), predicted(trained, names))
    loaded.train(max_epochs=1, **QUIET)
    assert (
        np.corrcoef(predicted(loaded, names).to_numpy().ravel(), predicted(trained, names).to_numpy().ravel())[0, 1]
        > 0.9
    )


def test_embeddings_have_a_row_for_each_perturbation_and_context(trained):
    assert list(trained.get_embedding().index) == list(trained.vocabulary.names)
    assert trained.get_embedding("context").shape == (2, 12)
    with pytest.raises(ValueError, match="kind"):
        trained.get_embedding("gene")


@pytest.fixture(scope="module")
def dosed():
    """Four doses of two drugs; the third dose is held out."""
    adata = datasets.simulate(
        n_cells_per_condition=100,
        n_control_cells=150,
        n_perturbations=2,
        doses=[0.1, 1.0, 3.0, 10.0],
        perturbation_type="drug",
        n_contexts=1,
        seed=2,
        **WORLD,
    )
    model = fitted(adata[adata.obs["dose"] != 3.0].copy(), max_epochs=60)
    return model, adata


def test_effects_grow_with_the_dose_as_they_were_measured_to(dosed):
    model, adata = dosed
    response = model.get_dose_response([0.0, 0.1, 1.0, 3.0, 10.0])
    assert (response.diff().iloc[1:] > 0).all(axis=None)
    np.testing.assert_allclose(response.loc[[0.0, 10.0]], [[0.0, 0.0], [1.0, 1.0]], atol=1e-6)
    for name in model.vocabulary.names:
        cells = adata[adata.obs["perturbation"].isin([name, "control"])].copy()
        cells.obs["by"] = np.where(cells.obs["perturbation"] == name, cells.obs["dose"].astype(str), "control")
        truth = measured(cells, "by")
        for dose, room in ((0.1, 0.25), (1.0, 0.25), (3.0, 0.25)):
            found = predicted(model, [name], dose=dose).loc[name]
            expected = slope(truth.loc["10.0"], truth.loc[str(dose)])
            assert abs(slope(truth.loc["10.0"], found) - expected) < room
        with pytest.raises(ValueError, match="dose"):
            model.get_dose_response([-1.0])


def test_the_paper_s_preset_trains_on_continuous_data():
    adata = datasets.simulate(
        n_cells_per_condition=10, n_perturbations=2, n_contexts=2, modality="log", seed=3, **{**WORLD, "n_batches": 2}
    )
    CPA.setup_anndata(adata, **{**SETUP, "layer": None}, batch_key="batch")
    model = CPA(adata, preset="paper", n_hidden=16)
    module = model.module
    assert (module.n_latent, module.decoder.n_out, module.basal_sd, module.adversary_weight) == (256, 16, 0.01, 5.0)
    model.train(max_epochs=2, **QUIET)
    rows = np.flatnonzero(adata.obs["perturbation"] == "control")[:10]
    own = model.predict_perturbation("control", indices=rows, ci=None, return_anndata=True)
    np.testing.assert_allclose(own.X, adata.X[rows], atol=1e-4)
