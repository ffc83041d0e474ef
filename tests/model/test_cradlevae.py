"""CRADLEVAE finds planted artifacts and takes them away, and measures effects between cells that passed."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pertura import datasets
from pertura.data._cells import CellDataset
from pertura.model import CRADLEVAE
from pertura.model.base import PerturbationModel
from pertura.model.base._artifact import passed_rows
from pertura.model.base._predict import device_of

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
KEYS = {"perturbation_key": "perturbation", "control": "control", "layer": "counts", "qc_key": "failed"}


@pytest.fixture(scope="module")
def screen():
    adata = datasets.simulate(
        n_cells_per_condition=80,
        n_control_cells=160,
        n_genes=50,
        n_regulators=8,
        n_perturbations=3,
        n_contexts=1,
        frac_qc_failed=0.3,
        n_artefact_genes=8,
        library_size=4000.0,
        seed=1,
    )
    adata.obs["failed"] = ~adata.obs["qc_pass"]
    return adata


@pytest.fixture(scope="module")
def trained(screen):
    adata = screen.copy()
    CRADLEVAE.setup_anndata(adata, **KEYS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CRADLEVAE(adata, n_latent=6)
    model.train(max_epochs=80, **QUIET)
    return model


def _gap(x, adata):
    failed = adata.obs["failed"].to_numpy()
    return np.abs(x[failed].mean(0) - x[~failed].mean(0))[adata.var["is_artefact"].to_numpy()].mean()


def test_denoise_moves_failed_cells_to_passed_ones(trained):
    adata = trained.adata
    trained.denoise(overwrite=True, n_samples=10)
    counts = np.asarray(adata.layers["counts"].todense())
    x = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    assert _gap(adata.layers["denoised"], adata) < 0.5 * _gap(x, adata)


def test_denoise_is_the_prediction_of_a_cell_s_own_perturbation_without_the_artifact(trained):
    name, adata = trained.vocabulary.names[1], trained.adata
    rows = np.flatnonzero(adata.obs["perturbation"] == name)[:20]
    part = adata[rows].copy()
    trained.denoise(part, n_samples=4, scale="counts", seed=3)
    asked = {"adata": part, "n_samples": 4, "ci": None, "scale": "counts", "seed": 3, "return_anndata": True}
    own = trained.predict_perturbation(name, artefact="removed", **asked)
    np.testing.assert_array_equal(part.layers["denoised"], own.X)
    assert part.uns["denoised"]["scale"] == "counts"
    passed = ~part.obs["failed"].to_numpy()
    np.testing.assert_array_equal(own.X[passed], part.layers["counts"].toarray()[passed])
    trained.denoise(part, n_samples=2)  # its own key
    part.layers["mine"] = part.layers["denoised"]
    with pytest.raises(ValueError, match="`key_added`"):
        trained.denoise(part, key_added="mine")


def test_a_cell_under_its_own_perturbation_is_what_was_measured(trained):
    name, adata = trained.vocabulary.names[0], trained.adata
    rows = np.flatnonzero(adata.obs["perturbation"] == name)
    asked = {"indices": rows, "n_samples": 4, "ci": None, "scale": "counts", "return_anndata": True}
    np.testing.assert_array_equal(trained.predict_perturbation(name, **asked).X, adata.layers["counts"][rows].toarray())


METHODS = ("predict_perturbation", "iter_predictions", "get_perturbation_effect", "get_latent_representation")


@pytest.mark.parametrize("method", METHODS)
def test_every_prediction_has_the_argument(trained, method):
    signature = inspect.signature(getattr(CRADLEVAE, method))
    shared = inspect.signature(getattr(PerturbationModel, method))
    assert list(signature.parameters) == [*list(shared.parameters)[:-1], "artefact"]
    doc = inspect.getdoc(getattr(CRADLEVAE, method))
    assert '\nartefact\n    ``"own"``' in doc and "changes" not in doc
    assert "artefact" not in inspect.getdoc(getattr(PerturbationModel, method))
    named = {} if method == "get_latent_representation" else {"perturbation": trained.vocabulary.names[0]}
    with pytest.raises(ValueError, match="`artefact` must be 'own' or 'removed', got 'doubled'"):
        getattr(trained, method)(**named, artefact="doubled")
    with pytest.raises(TypeError, match="artifct"):
        getattr(trained, method)(**named, artifct="own")


def test_predictions_with_the_artifact_removed(trained):
    name, adata = trained.vocabulary.names[0], trained.adata
    asked = {"n_samples": 4, "ci": None}
    own = trained.predict_perturbation(name, return_anndata=True, **asked)
    removed = trained.predict_perturbation(name, artefact="removed", return_anndata=True, **asked)
    assert _gap(removed.X, adata) < 0.5 * _gap(own.X, adata)
    passed = ~adata.obs["failed"].to_numpy()
    np.testing.assert_allclose(own.X[passed], removed.X[passed], atol=1e-5)
    parts = list(trained.iter_predictions(name, artefact="removed", chunk_size=250, **asked))
    np.testing.assert_array_equal(np.concatenate([part.X for part in parts]), removed.X)


def test_effects_and_states_with_the_artifact_removed(trained):
    """Effects on failed controls, and their states, are those of cells without the artifact."""
    adata, name = trained.adata, trained.vocabulary.names[0]
    failed = np.flatnonzero((adata.obs["perturbation"] == "control") & adata.obs["failed"])
    tables = [
        trained.get_perturbation_effect(name, indices=failed, artefact=artefact, n_samples=4)
        for artefact in ("own", "removed")
    ]
    x = np.log1p(1e4 * _counts(adata)[failed] / _counts(adata)[failed].sum(1, keepdims=True)).mean(0)
    artifact = adata.var["is_artefact"].to_numpy()
    np.testing.assert_allclose(tables[0]["mean_control"], x, atol=1e-3)
    assert (tables[0]["mean_control"] - tables[1]["mean_control"]).to_numpy()[artifact].mean() > 0.5
    states = [
        trained.get_latent_representation(indices=failed, kind="perturbed", artefact=artefact)
        for artefact in ("own", "removed")
    ]
    assert states[0].shape == states[1].shape == (len(failed), 18)
    assert np.abs(states[0][:, 12:]).max() > 0 and not states[1][:, 12:].any()
    np.testing.assert_allclose(states[0][:, :12], states[1][:, :12], atol=1e-5)


def _counts(adata):
    return adata.layers["counts"].toarray()


def _told_apart(states, failed):
    """AUC of a linear classifier on held-out fifths."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    return cross_val_score(classifier, states, failed, scoring="roc_auc", cv=5).mean()


def test_the_basal_state_does_not_tell_quality(trained):
    """Near chance; where the encoder sees failed cells as they are, .80 of draws and 1.00 of means."""
    module, failed = trained.module, trained.adata.obs["failed"].to_numpy()
    everything = trained._registered_cells(np.arange(len(failed)))
    (cells,) = everything.cells(len(failed), device_of(module))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draw = module.abduct(cells, 1, module.draw_globals(1, cells)).state[0, :, :6].numpy()
        expression = module.normalized(cells.x, cells.library).numpy()
    mean = trained.get_latent_representation(n_samples=30, artefact="removed")
    assert not mean[:, 6:].any()
    assert _told_apart(expression, failed) > 0.95
    assert _told_apart(draw, failed) < 0.6
    assert _told_apart(mean, failed) < 0.65


def test_most_cells_pass_quality_control_without_the_artifact(trained):
    """Judged by a classifier of measured cells."""
    adata, failed = trained.adata, trained.adata.obs["failed"].to_numpy()
    x = np.log1p(1e4 * _counts(adata) / _counts(adata).sum(1, keepdims=True))
    judge = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, failed)
    asked = {"n_samples": 4, "ci": None, "return_anndata": True}
    own, removed = (
        judge.predict(trained.predict_perturbation(trained.vocabulary.names[0], artefact=a, **asked).X)
        for a in ("own", "removed")
    )
    assert own.mean() > 0.25 and removed.mean() < 0.05


@pytest.mark.slow
def test_distributions_of_failed_and_passed_cells_are_matched(screen):
    """Without help from matched inputs, and without an empty basal state."""
    states = {}
    for weight in (0.0, 10.0):
        adata = screen.copy()
        CRADLEVAE.setup_anndata(adata, **KEYS)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = CRADLEVAE(adata, n_latent=6, match_quality=False, counterfactual_weight=weight)
        model.train(max_epochs=80, **QUIET)
        states[weight] = model.get_latent_representation(n_samples=30, artefact="removed")[:, :6]
    failed = screen.obs["failed"].to_numpy()
    assert _told_apart(states[0.0], failed) > 0.9 and _told_apart(states[10.0], failed) < 0.7
    assert states[10.0].std(0).mean() > 0.7 * states[0.0].std(0).mean()


def test_effects_are_measured_between_cells_that_passed(screen):
    adata = screen.copy()
    CRADLEVAE.setup_anndata(adata, **KEYS)
    model, rows = CRADLEVAE(adata, n_latent=3), np.arange(adata.n_obs)
    table = model._measure(rows, model._data_module(rows, rows[:0], 64, 0))
    x = pd.DataFrame(np.log1p(1e4 * _counts(adata) / _counts(adata).sum(1, keepdims=True)))
    kept = ~adata.obs["failed"].to_numpy()
    means = x[kept].groupby(adata.obs["perturbation"].astype(str).to_numpy()[kept]).mean()
    expected = means.loc[list(model.vocabulary.names)] - means.loc["control"]
    np.testing.assert_allclose(table.effects(adjust_depth=False).effect, expected, atol=1e-4)


def test_conditions_without_passed_cells_keep_their_cells(screen):
    adata = screen.copy()
    name = sorted(set(adata.obs["perturbation"]) - {"control"})[0]
    own = (adata.obs["perturbation"] == name).to_numpy()
    adata.obs["failed"] = adata.obs["failed"] | own
    CRADLEVAE.setup_anndata(adata, **KEYS)
    dataset = CellDataset(CRADLEVAE(adata).adata_manager)
    rows = passed_rows(dataset, np.arange(adata.n_obs))
    np.testing.assert_array_equal(rows, np.flatnonzero(~adata.obs["failed"] | own))


def test_saved_models_predict_the_same_and_train_on(trained, screen, tmp_path):
    name = trained.vocabulary.names[0]
    trained.save(tmp_path / "model")
    loaded = CRADLEVAE.load(tmp_path / "model", adata=screen.copy(), accelerator="cpu")
    asked = {"indices": np.arange(10), "n_samples": 3, "artefact": "removed", "return_anndata": True}
    one, other = (m.predict_perturbation(name, **asked).X for m in (trained, loaded))
    np.testing.assert_array_equal(one, other)
    before = loaded.module.artifact.loc.clone()
    loaded.train(max_epochs=1, **QUIET)
    assert not torch.equal(before, loaded.module.artifact.loc)


def test_wrong_labels_and_settings(screen):
    adata = screen.copy()
    with pytest.raises(ValueError, match="`qc_key`.*must be true for cells that failed"):
        CRADLEVAE.setup_anndata(adata, **{**KEYS, "qc_key": "cell_type"})
    with pytest.raises(ValueError, match="`qc_key`"):
        CRADLEVAE.setup_anndata(adata, **{**KEYS, "qc_key": "absent"})
    CRADLEVAE.setup_anndata(adata, **KEYS)
    with pytest.raises(ValueError, match="`effect` must be one of"):
        CRADLEVAE(adata, effect="conditional")


def test_paper_preset_is_that_of_the_paper(screen):
    adata = screen.copy()
    CRADLEVAE.setup_anndata(adata, **KEYS)
    model = CRADLEVAE(adata, preset="paper")
    module = model.module
    assert module.artifact.class_balance and not module.artifact.match_quality and module.gene_effects is None
    # the sum over 512 cells beside a mean
    assert module.artifact.counterfactual_weight == pytest.approx(0.1 * model._default_batch_size(adata.n_obs))
    assert (module.n_latent, module.decoder.n_out, module.shifts.correlated) == (200, 400, True)
    assert (len(module.encoder.hidden.rest), len(module.decoder.hidden.rest)) == (0, 1)
    plan = model._plan_defaults()
    assert (plan["lr"], plan["lr_schedule"], plan["n_epochs_kl_warmup"]) == (3e-4, "constant", None)
    assert plan["loss_fn"].num_particles == 5 and model._default_max_epochs(1) == 100_000
    small = CRADLEVAE(adata, preset="paper", n_latent=5, n_hidden=16, n_particles=2)
    small.train(max_epochs=2, **QUIET)
    assert np.isfinite(small.history["elbo_train"].to_numpy(float)).all()
    assert len(small.get_shifts()) == 15
