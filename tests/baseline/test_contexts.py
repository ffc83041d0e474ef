"""Contexts that were never or hardly treated: convergence, and few cells or perturbations that were measured."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura import baseline as bl

N_GENES, N_CONTEXTS = 60, 7
NEW = "c0"


def cells(convergence=0.0, *, n_cells=40, n_new=0, labels=("A",), context_sd=0.0, own_sd=0.0, seed=0):
    """Arms of contexts, `n_new` treated cells in the first of them, and the true effects there."""
    rng = np.random.default_rng(seed)
    base = 5 + rng.normal(0, 0.7, (N_CONTEXTS, N_GENES))
    mean = {label: rng.normal(0, 0.5, N_GENES) for label in labels}
    shift = context_sd * rng.normal(size=(N_CONTEXTS, N_GENES))
    x, obs, truth = [], [], {}
    for c in range(N_CONTEXTS):
        x.append(base[c] + 0.5 * rng.normal(size=(n_cells, N_GENES)))
        obs += [("ctrl", f"c{c}")] * n_cells
        for label in labels:
            effect = mean[label] - convergence * (base[c] - 5) + shift[c] + own_sd * rng.normal(size=N_GENES)
            n = (n_new if isinstance(n_new, int) else n_new.get(label, 0)) if c == 0 else n_cells
            x.append(base[c] + effect + 0.5 * rng.normal(size=(n, N_GENES)))
            obs += [(label, f"c{c}")] * n
            if c == 0:
                truth[label] = effect
    obs = pd.DataFrame(obs, columns=["perturbation", "context"], index=[f"cell{i}" for i in range(len(obs))])
    return AnnData(np.concatenate(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)])), truth


def error(model, effect, truth, label="A"):
    return ((effect(model, label, NEW) - truth[label]) ** 2).mean()


# -- convergence --------------------------------------------------------------------------------------------------------


def test_convergence_of_arms_is_learned(fit, effect):
    adata, truth = cells(0.7)
    plain, model = fit(bl.MeanEffect, adata), fit(bl.MeanEffect, adata, converge=True)
    assert float(model.module.convergence) == pytest.approx(0.7, abs=0.05)
    assert error(model, effect, truth) < 0.15 * error(plain, effect, truth)


def test_convergence_is_of_the_difference_to_the_contexts_of_the_mean(fit, effect):
    adata, _ = cells(0.7)
    plain, model = fit(bl.MeanEffect, adata), fit(bl.MeanEffect, adata, converge=True)
    control = plain.module.means.control.numpy()
    for context, at in (("c0", 0), ("c3", 3)):
        expected = effect(plain, "A", context) - float(model.module.convergence) * (control[at] - control[1:].mean(0))
        np.testing.assert_allclose(effect(model, "A", context), expected, atol=1e-5)


def test_a_context_of_the_query_converges_as_well(fit, effect):
    adata, truth = cells(0.7)
    known = adata[adata.obs["context"] != NEW].copy()
    model = fit(bl.MeanEffect, known, converge=True)
    table = model.get_perturbation_effect("A", adata=adata[adata.obs["context"] == NEW].copy(), n_samples=2)
    assert ((table["lfc_mean"].to_numpy() - truth["A"]) ** 2).mean() < 0.05


def test_without_convergence_it_is_the_mean_effect(fit, effect):
    """Few cells: the noise of a control profile is in the effects of the same controls."""
    for seed in range(3):
        adata, _ = cells(0.0, n_cells=8, seed=seed)
        model = fit(bl.MeanEffect, adata, converge=True)
        assert float(model.module.convergence) == 0
        np.testing.assert_array_equal(effect(model, "A", NEW), effect(fit(bl.MeanEffect, adata), "A", NEW))


# -- few shots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_sd", [0.1, 0.3, 1.0])
def test_few_cells_and_other_contexts_are_combined(fit, effect, own_sd):
    """Better than either alone, whichever of the two is the better one."""
    errors = []
    for seed in range(3):
        adata, truth = cells(n_new=5, own_sd=own_sd, seed=seed)
        without = adata[~((adata.obs["context"] == NEW) & (adata.obs["perturbation"] == "A")).to_numpy()].copy()
        own = fit(bl.MeanEffect, adata, use_own_context=True)
        models = (fit(bl.EmpiricalBayes, adata), own, fit(bl.MeanEffect, without))
        errors.append([error(m, effect, truth) for m in models])
    both, own, others = np.mean(errors, axis=0)
    assert both < 1.02 * own and both < 1.02 * others
    assert both < 0.9 * max(own, others)


def test_many_cells_are_believed(fit, effect):
    adata, _ = cells(n_new=400, own_sd=0.5)
    own = effect(fit(bl.MeanEffect, adata, use_own_context=True), "A", NEW)
    others = adata[~((adata.obs["context"] == NEW) & (adata.obs["perturbation"] == "A")).to_numpy()].copy()
    moved = own - effect(fit(bl.EmpiricalBayes, adata), "A", NEW)
    assert (moved**2).mean() < 0.02 * ((own - effect(fit(bl.MeanEffect, others), "A", NEW)) ** 2).mean()


def test_other_perturbations_tell_of_the_context(fit, effect):
    """What a context does to the effects of all perturbations is learned from those measured in it."""
    labels = tuple("ABCDEF")
    few = dict.fromkeys("BCDEF", 40)
    adata, truth = cells(labels=labels, n_new=few, context_sd=0.6, own_sd=0.1)
    model = fit(bl.EmpiricalBayes, adata)
    assert float(model.module.share[1]) > 0.7
    assert error(model, effect, truth) < 0.3 * error(fit(bl.MeanEffect, adata), effect, truth)
    adata, truth = cells(labels=labels, n_new=few, own_sd=0.3)
    model = fit(bl.EmpiricalBayes, adata)
    assert float(model.module.share[1]) < 0.1


def test_transfer_converges(fit, effect):
    adata, truth = cells(0.7)
    model = fit(bl.EmpiricalBayes, adata)
    assert error(model, effect, truth) < 0.3 * error(fit(bl.MeanEffect, adata), effect, truth)


def test_one_context_has_nothing_to_transfer(fit, effect):
    adata, _ = cells(n_new=10)
    adata = adata[adata.obs["context"] == NEW].copy()
    own = effect(fit(bl.MeanEffect, adata), "A", NEW)
    np.testing.assert_allclose(effect(fit(bl.EmpiricalBayes, adata), "A", NEW), own, atol=1e-6)
