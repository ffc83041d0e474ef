"""SAMSVAE finds planted effects and masks, and where cells are many its effects are the measured ones."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.optimize import linear_sum_assignment

from pertura.model import SAMSVAE

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
N_LATENT, N_GENES, N_PERTURBATIONS, N_CELLS = 8, 60, 40, 40


def planted_counts(seed=0, n_cells=N_CELLS, n_perturbations=N_PERTURBATIONS):
    """Counts of a log-linear decoder of sparse shifts; also the mask and the effects on log expression."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(N_LATENT, N_GENES)) * (rng.random((N_LATENT, N_GENES)) < 0.3)
    mask = np.zeros((n_perturbations, N_LATENT), dtype=bool)
    for row in mask:
        row[rng.choice(N_LATENT, 1 + rng.integers(2), replace=False)] = True
    shift = mask * rng.choice([-1.0, 1.0], mask.shape) * rng.normal(1.5, 0.1, mask.shape)
    labels = np.repeat(["control", *(f"P{t:02d}" for t in range(n_perturbations))], n_cells)
    table = np.concatenate([np.zeros((1, N_LATENT)), shift])
    z = 0.4 * rng.normal(size=(len(labels), N_LATENT)) + np.repeat(table, n_cells, axis=0)
    base = rng.normal(1.0, 0.7, N_GENES)
    rate = np.exp(base + z @ loadings)
    counts = rng.poisson(4000 * rate / rate.sum(1, keepdims=True)).astype(np.float32)
    adata = AnnData(counts, obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))]))
    return adata, mask, (shift @ loadings)


def measured_effects(adata):
    x = np.log1p(1e4 * adata.X / adata.X.sum(1, keepdims=True))
    means = pd.DataFrame(x, columns=adata.var_names).groupby(adata.obs["perturbation"].to_numpy()).mean()
    return means.drop(index="control") - means.loc["control"]


def fitted(adata, max_epochs=60, **options):
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SAMSVAE(adata, **options)
    model.train(max_epochs=max_epochs, **QUIET)
    return model


def predicted_effects(model, names):
    table = model.get_perturbation_effect(list(names), n_samples=20)
    return table.pivot(index="perturbation", columns="gene", values="lfc_mean")


def pearson(a, b):
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(np.asarray(a), np.asarray(b), strict=True)])


@pytest.fixture(scope="module")
def planted():
    adata, mask, effects = planted_counts()
    return fitted(adata, n_latent=N_LATENT, link_sharpness=1.0), mask, effects


def test_planted_effects_are_found(planted):
    model, _, _ = planted
    large, _, _ = planted_counts(n_cells=1000)
    truth = measured_effects(large)
    predicted = predicted_effects(model, truth.index)[truth.columns]
    assert pearson(predicted, truth).mean() > 0.95
    # the measured effects of the same few cells are no better
    own = measured_effects(model.adata)
    assert ((predicted - truth) ** 2).to_numpy().mean() <= 1.25 * ((own - truth) ** 2).to_numpy().mean()


def test_many_cells_give_the_measured_effect():
    adata, _, _ = planted_counts(seed=1, n_cells=300, n_perturbations=8)
    own = measured_effects(adata)
    predicted = predicted_effects(fitted(adata, max_epochs=5, n_latent=2), own.index)[own.columns]
    assert np.abs(predicted - own).to_numpy().mean() < 0.1
    assert pearson(predicted, own).min() > 0.98


def test_without_shrinkage_effects_are_those_of_the_latent_shift():
    adata, _, _ = planted_counts(seed=1, n_perturbations=8)
    model = fitted(adata, max_epochs=3, n_latent=2, shrinkage=False)
    assert not model.module.residual.any()


def test_shifts_are_in_the_planted_dimensions(planted):
    """Columns matched as in the paper (Hungarian), as many entries as were planted, beside as many placed at random."""
    model, mask, _ = planted
    table = model.get_shifts().pivot(index="perturbation", columns="dimension")
    size, proba = table["shift"].abs().to_numpy(), table["proba"].to_numpy()
    found = size >= np.sort(size.ravel())[-mask.sum()]
    assert _f1(mask, found) > 0.65
    assert _f1(mask, found) > _f1(mask, _shuffled(found)) + 0.25
    # the mask's own probability is less sharp
    assert _f1(mask, proba > 0.5) > _f1(mask, _shuffled(proba > 0.5)) + 0.1


def _shuffled(entries):
    return np.random.default_rng(0).permutation(entries.ravel()).reshape(entries.shape)


def _f1(mask, found):
    hits = mask.T.astype(int) @ found.astype(int)
    rows, columns = linear_sum_assignment(-hits)
    return 2 * hits[rows, columns].sum() / (mask.sum() + found.sum())


def test_an_unseen_perturbation_is_the_mean_where_features_say_nothing():
    adata, _, _ = planted_counts(seed=2, n_perturbations=8)
    names = [f"P{t:02d}" for t in range(8)]
    adata.uns["known"] = pd.DataFrame(np.random.default_rng(0).normal(size=(8, 2)), index=names)
    seen = adata[adata.obs["perturbation"] != "P07"].copy()
    options = {"perturbation_key": "perturbation", "control": "control", "perturbation_features_key": "known"}
    SAMSVAE.setup_anndata(seen, **options)
    model = SAMSVAE(seen, n_latent=2)
    model.train(max_epochs=3, **QUIET)
    own = predicted_effects(model, names)[seen.var_names]
    mean = own.loc[names[:-1]].mean()
    assert np.corrcoef(own.loc["P07"], mean)[0, 1] > 0.9
    assert 0.5 < own.loc["P07"].std() / mean.std() < 1.5


def test_log_likelihood_of_a_cell_knows_its_perturbation(planted):
    model, _, _ = planted
    own = model.get_marginal_ll(n_samples=20)
    other = model.adata.copy()
    labels = other.obs["perturbation"].to_numpy(object)
    other.obs["perturbation"] = np.roll(labels, 3 * N_CELLS)
    assert own.mean() > model.get_marginal_ll(other, n_samples=20).mean() + 1.0
    assert own.shape == (model.adata.n_obs,)


def test_paper_preset_is_that_of_the_paper(planted):
    adata = planted[0].adata.copy()
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = SAMSVAE(adata, preset="paper")
    module = model.module
    assert (module.n_latent, module.decoder.n_out, module.mask_prior) == (200, 400, 0.01)
    assert module.effect_network is not None and not module.effect_log_prior_sd.requires_grad
    assert model.n_particles == 5 and not model.shrinkage
    assert SAMSVAE(adata, preset="paper", n_latent=7).module.n_latent == 7
