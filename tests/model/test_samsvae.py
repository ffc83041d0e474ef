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


def test_effects_by_name():
    """The latent shift alone, and the measured effect alone: what is predicted depends on nothing else."""
    adata, _, _ = planted_counts(seed=1, n_perturbations=8)
    names = [f"P{t:02d}" for t in range(8)]
    for effects, moves in (("latent", True), ("measured", False)):
        model = fitted(adata.copy(), max_epochs=3, n_latent=2, effects=effects)
        before = predicted_effects(model, names)
        with torch.no_grad():
            model.module.shifts.loc.normal_()
            model.module.shifts.mask_logits.fill_(5.0)
        assert (np.abs(predicted_effects(model, names) - before).to_numpy().max() > 1e-3) == moves
    with pytest.raises(ValueError, match="`effects='measured'` is not possible"):
        SAMSVAE(model.adata, effect="svae+", effects="measured")


def test_a_measured_pair_is_not_less_certain_than_its_members():
    from pertura import datasets

    adata = datasets.simulate(
        n_cells_per_condition=60, n_genes=40, n_perturbations=4, combinations=2, n_contexts=1, n_unresponsive_contexts=0,
        n_truth_cells=10, seed=1,
    )  # fmt: skip
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control", layer="counts")
    model = SAMSVAE(adata, n_latent=4)
    model.train(max_epochs=10, **QUIET)
    measured = ["+".join(c) for c in model.vocabulary.combinations]
    names = model.vocabulary.names
    unmeasured = [f"{a}+{b}" for i, a in enumerate(names) for b in names[i + 1 :] if f"{a}+{b}" not in measured]
    table = model.get_perturbation_effect([*measured, *unmeasured], n_samples=50)
    sd = table.groupby("perturbation")["lfc_sd"].mean()
    assert sd[measured].max() < sd[unmeasured].min()


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
    module, options = model.module, model.options
    assert (module.n_latent, module.decoder.n_out) == (200, 400)
    torch.testing.assert_close(module.shifts.prior_logits.sigmoid().mean(), torch.tensor(0.01))
    assert module.shifts.correlated and not module.shifts.log_prior_sd.requires_grad
    assert options.n_particles == 5 and module.gene_effects is None
    plan = model._plan_defaults()
    assert (plan["lr"], plan["lr_schedule"], plan["n_epochs_kl_warmup"]) == (3e-4, "constant", None)
    assert SAMSVAE(adata, preset="paper", n_latent=7).module.n_latent == 7
    assert SAMSVAE(adata, preset="paper", n_latent=30).module.n_latent == 30, "a default that is given wins, too"
