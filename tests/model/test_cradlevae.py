"""CRADLEVAE finds planted artefacts and takes them away; its extra loss does not depend on the minibatch."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pertura import datasets
from pertura.model import CRADLEVAE
from pertura.module import Cells

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
    model.train(max_epochs=60, **QUIET)
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


def test_predictions_with_the_artefact_removed(trained):
    name = trained.vocabulary.names[0]
    asked = {"n_samples": 5, "return_anndata": True}
    own = trained.predict_perturbation(name, **asked)
    removed = trained.predict_perturbation(name, artefact="removed", **asked)
    assert _gap(removed.X, trained.adata) < 0.5 * _gap(own.X, trained.adata)
    passed = ~trained.adata.obs["failed"].to_numpy()
    np.testing.assert_allclose(own.X[passed].mean(0), removed.X[passed].mean(0), atol=0.15)
    with pytest.raises(ValueError, match="`artefact`"):
        trained.predict_perturbation(name, artefact="doubled")


def _told_apart(states, failed):
    """AUC of a linear classifier on held-out fifths."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    return cross_val_score(classifier, states, failed, scoring="roc_auc", cv=5).mean()


def test_the_basal_state_does_not_tell_quality(trained):
    """Near chance; where the encoder sees failed cells as they are, .80 of draws and 1.00 of means (docs/trust.md)."""
    module, failed = trained.module, trained.adata.obs["failed"].to_numpy()
    (cells,) = trained._cells(trained.adata_manager, np.arange(len(failed)), len(failed))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        globals_ = module.draw_globals(1)
        posterior = module.basal(cells, module.moves(globals_, cells, cells.action))
        draw, mean = torch.normal(posterior.loc, posterior.scale)[0].numpy(), posterior.loc[0].numpy()
        expression = module.normalised(cells.x).numpy()
    assert _told_apart(expression, failed) > 0.95
    assert _told_apart(draw, failed) < 0.6
    assert _told_apart(mean, failed) < 0.75


def test_the_counterfactual_is_of_the_same_perturbation_and_the_other_label(trained):
    module, adata = trained.module, trained.adata
    name = trained.vocabulary.names[1]
    own = (adata.obs["perturbation"] == name).to_numpy() & adata.obs["failed"].to_numpy()
    counts = torch.as_tensor(np.asarray(adata.layers["counts"][own].todense()))
    expected = torch.log1p(1e4 * counts / counts.sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(module.profile[2, 1], expected, atol=1e-3, rtol=1e-3)
    assert int(module.profile_cells[2, 1]) == own.sum()


def test_the_extra_loss_adds_up_over_minibatches(trained):
    """A sum over cells, divided by their number with the rest of the loss: no weight of the batch size."""
    module = trained.module
    (cells,) = list(trained._cells(trained.adata_manager, np.arange(64), 64))
    globals_ = module.draw_globals(1)
    with torch.no_grad():
        whole = float(module.counterfactual(cells, globals_))
        parts = sum(float(module.counterfactual(_rows(cells, slice(s, s + 16)), globals_)) for s in range(0, 64, 16))
    assert whole > 0
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


def _rows(cells, rows):
    action = type(cells.action)(cells.action.codes[rows], cells.action.dose[rows])
    return Cells(cells.x[rows], action, cells.context[rows], cells.batch[rows], cells.library[rows], cells.qc[rows])


def test_wrong_labels_and_settings(screen):
    adata = screen.copy()
    with pytest.raises(ValueError, match="`qc_key`"):
        CRADLEVAE.setup_anndata(adata, **{**KEYS, "qc_key": "cell_type"})
    CRADLEVAE.setup_anndata(adata, **KEYS)
    with pytest.raises(ValueError, match="`effect`"):
        CRADLEVAE(adata, effect="conditional")
    module = CRADLEVAE(adata, preset="paper").module
    assert module.class_balance and not module.match_quality
