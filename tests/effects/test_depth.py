"""Effects at equal sequencing depth, against brute force and on thinned real counts."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.stats import binom

from pertura import baseline, datasets, metrics, model
from pertura.data._scale import counts_of
from pertura.effects._depth import Thinning, change_at_depth, equal_depth_changes

KANG = {"perturbation_key": "condition", "control": "ctrl", "context_key": "cell_type"}


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def normalized(counts):
    x = sparse.csr_matrix(counts.multiply(1e4 / np.maximum(np.asarray(counts.sum(1)), 1)))
    x.data = np.log1p(x.data)
    return x.astype(np.float32)


# -- expression at another depth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("p", [0.97, 0.5, 0.1])
def test_expected_expression_of_a_thinned_count(storage, p):
    counts = np.array([[0, 1, 2, 7, 128], [3, 0, 129, 300, 1000]], float)
    unit = np.array([12.0, 2.5])
    found = change_at_depth(storage(counts), unit, np.full(2, np.log(p)))
    found = found.toarray() if sparse.issparse(found) else found
    for i, u in enumerate(unit):
        for x, change in zip(counts[i].astype(int), found[i], strict=True):
            k = np.arange(x + 1)
            expected = (binom.pmf(k, x, p) * np.log1p(u / p * k)).sum() - np.log1p(u * x)
            # large counts by two terms of the Taylor series
            np.testing.assert_allclose(change, expected, atol=1e-9 if x <= 128 else 1 / (p * x) ** 2)
    same = change_at_depth(storage(counts), unit, np.full(2, -0.005))
    assert not (same.toarray() if sparse.issparse(same) else same).any()


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_matrix])
def test_counts_behind_normalized_values(storage):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 2, 60) * rng.lognormal(0, 0.5, (300, 1))).astype(float)
    counts[0], counts[1] = 0, counts[1] * 2  # nothing, and no count of one
    unit = 1e4 / np.maximum(counts.sum(1), 1)
    x = storage(np.log1p(counts * unit[:, None]).astype(np.float32))
    recovered, found = counts_of(x)
    recovered = recovered.toarray() if sparse.issparse(recovered) else recovered
    assert np.isnan(found[0])
    np.testing.assert_array_equal(recovered[2:], counts[2:])
    np.testing.assert_allclose(found[2:], unit[2:], rtol=1e-4)
    # a cell without a single count is recovered where others are no multiples of its smallest
    alone = counts.copy()
    alone[alone == 1] = 0
    kept = (alone == 2).any(1) & (alone == 3).any(1)
    recovered = counts_of(storage(np.log1p(alone[kept] * unit[kept, None]).astype(np.float32)))[0]
    np.testing.assert_array_equal(recovered.toarray() if sparse.issparse(recovered) else recovered, alone[kept])


@pytest.mark.parametrize("change", [lambda x: x - x.mean(0), lambda x: x / x.std(0), lambda x: x / np.log(2), np.expm1])
def test_other_values_have_no_counts(change):
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, (300, 60))
    assert counts_of(change(np.log1p(1e4 * counts / counts.sum(1, keepdims=True)))) is None


# -- many arms ------------------------------------------------------------------------------------------------------------


def test_shallow_arms_are_compared_with_controls_of_their_depth():
    """Interpolated between steps; every arm is of cells like the controls, so that there is no effect."""
    rng = np.random.default_rng(1)
    depth = np.exp(np.r_[0.0, -np.linspace(0.0, 1.5, 7), 0.8])
    group = np.repeat(np.arange(len(depth)), 1500)
    counts = rng.poisson(rng.gamma(0.5, 1.0, 50) * rng.lognormal(0, 0.3, (len(group), 1)) * 30 * depth[group][:, None])
    x = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    mean = np.stack([x[group == k].mean(0) for k in range(len(depth))])
    se = np.sqrt(2 * x.var(0) / 1500)
    change = equal_depth_changes(x, group, np.zeros(len(depth), int), library=counts.sum(1))
    assert not change[0].any()
    plain, equal = (((m - m[0]) / se)[1:] for m in (mean, mean + change))
    assert rms(equal) < 1.5 < 4 < rms(plain[1:])
    # nothing is done to an arm of the depth of the controls
    again = equal_depth_changes(x, np.zeros(len(x), int), np.zeros(1, int))
    assert not again.any()


def test_equal_depths_need_no_thinning():
    plan = Thinning.of(np.array([0.005, -0.009]), np.zeros(2, int), 1)
    assert not plan.treated.any() and not plan.step.any() and plan.weight.shape == (2, 0)


# -- real counts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinned():
    """`thinned(arms, seed)`: Kang with the counts of some arms at 0.3 of their depth."""
    adata = datasets.kang_2018_mini()
    adata = adata[:, np.asarray(adata.layers["counts"].sum(0)).ravel() > 1000].copy()
    counts = adata.layers["counts"].toarray().astype(int)

    def of(*arms, seed):
        rows = adata.obs["condition"].isin(arms).to_numpy()
        drawn = counts.copy()
        drawn[rows] = np.random.default_rng(seed).binomial(drawn[rows], 0.3)
        drawn = sparse.csr_matrix(drawn)
        return AnnData(
            normalized(drawn), obs=adata.obs.copy(), var=adata.var, layers={"counts": drawn.astype(np.float32)}
        )

    return of


@pytest.mark.parametrize("deep", ["ctrl", "stim"])
@pytest.mark.parametrize("layer", ["counts", None])
def test_arms_of_different_depth_have_the_effect_of_equal_depth(thinned, measure, deep, layer):
    """Arms thinned alike, twice, say how much is chance; one arm thinned says no more, in a table and in what baselines hold."""
    setup = {**KANG, "layer": layer, "batch_key": None, "dose_key": None}
    shallow = "ctrl" if deep == "stim" else "stim"
    one, other, unequal = (
        measure(thinned(*arms, seed=seed), setup=setup)
        for seed, arms in enumerate([("ctrl", "stim"), ("ctrl", "stim"), (shallow,)])
    )
    expected = one.effects().effect
    chance = rms(other.effects().effect - expected)
    assert rms(unequal.effects().effect - expected) < 1.1 * chance
    assert rms(unequal.effects(adjust_depth=False).effect - expected) > 2 * chance
    means = unequal.condition_means()
    held = means.mean[: len(means.codes)] - means.mean[len(means.codes) :][means.context]
    np.testing.assert_allclose(held, unequal.effects().effect, atol=1e-5)


@pytest.mark.parametrize("deep", ["ctrl", "stim"])
def test_means_of_groups_are_changed_alike(thinned, measure, deep):
    """What metrics add to the means of groups is what the table does."""
    adata = thinned("ctrl" if deep == "stim" else "stim", seed=3)
    table = measure(adata, setup={**KANG, "layer": "counts", "batch_key": None, "dose_key": None})
    keys = pd.MultiIndex.from_frame(adata.obs[["cell_type", "condition"]].astype(str))
    group, names = keys.factorize(sort=True)
    reference = names.get_indexer([(context, "ctrl") for context, _ in names])
    change = equal_depth_changes(adata.X, group, reference)
    mean = np.stack([np.asarray(adata.X[group == k].mean(0)).ravel() for k in range(len(names))])
    found = (mean + change)[1::2] - (mean + change)[::2]
    # log libraries are averaged over the same cells: the same to the rounding of the values
    np.testing.assert_allclose(found, table.effects().effect, atol=0.01)
    assert equal_depth_changes(-adata.X, group, reference) is None
    measured = metrics.measured_effect(adata, "stim", **KANG).pivot(index="context", columns="gene", values="effect")
    np.testing.assert_allclose(measured.sort_index()[adata.var_names], found, atol=1e-5)
    # the profile that predictions are scored against
    table = pd.DataFrame((mean + change)[1::2], names[1::2].reorder_levels([1, 0]), adata.var_names)
    assert metrics.evaluate(table, adata, metrics=["mse"], **KANG)["value"].max() < 1e-10


@pytest.mark.parametrize(
    ("cls", "options", "train", "deep"),
    [
        (baseline.MeanEffect, {}, {}, "ctrl"),
        (baseline.MeanEffect, {}, {}, "stim"),
        pytest.param(model.SAMSVAE, {"n_hidden": 16, "n_latent": 4}, {"max_epochs": 2}, "stim", marks=pytest.mark.slow),
    ],
)
def test_predictions_are_at_equal_depth(thinned, cls, options, train, deep):
    """What a model predicts from arms of different depth is what it does from equal ones, for cells of the lower depth."""
    found = []
    for shallow, seed in ((("ctrl", "stim"), 0), (("ctrl", "stim"), 1), (("ctrl" if deep == "stim" else "stim",), 2)):
        adata = thinned(*shallow, seed=seed)
        adata = adata[adata.obs["cell_type"].isin(["B cells", "CD8 T cells"])].copy()
        if not found:
            asked = adata[adata.obs["condition"] == "ctrl"].copy()
        cls.setup_anndata(adata, **KANG, layer="counts")
        trained = cls(adata, **options)
        trained.train(**train)
        table = trained.get_perturbation_effect("stim", adata=asked.copy())
        found.append(table.sort_values(["context", "gene"])["lfc_mean"].to_numpy())
    chance = rms(found[1] - found[0])
    assert rms(found[2] - found[0]) < 1.5 * chance < 0.5 * rms(found[0])
