"""Linear against the equations of Ahlmann-Eltze et al., written out, and on data that are linear."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura import baseline as bl

RNG = np.random.default_rng(1)
N = 15
GENES = [f"g{i}" for i in range(N)]


def by_hand(control, measured, p, p_new, k=10, ridge=0.1):
    """Effects predicted for the rows of `p_new` from the means of one context."""
    means = np.column_stack([*measured, control])
    u, s, _ = np.linalg.svd(means - means.mean(0), full_matrices=False)
    g = (u * s)[:, :k]
    p = g[p] if p is not None and p.dtype.kind == "i" else p
    p_new = g[p_new] if p_new.dtype.kind == "i" else p_new
    y = np.column_stack(measured) - control[:, None]
    b = y.mean(1, keepdims=True)
    left = np.linalg.inv(g.T @ g + ridge * np.eye(g.shape[1])) @ g.T
    right = p @ np.linalg.inv(p.T @ p + ridge * np.eye(p.shape[1]))
    w = left @ (y - b) @ right
    return g, w, b, (g @ w @ p_new.T + b).T


@pytest.fixture
def screen(made):
    control = RNG.normal(2, 1, N)
    measured = {f"g{i}": control + RNG.normal(0, 1, N) for i in (0, 3, 5, 7, 8, 11)}
    adata = made({("ctrl", "x"): control, **{(p, "x"): mean for p, mean in measured.items()}}, sd=0.01)
    return adata, control, measured


@pytest.mark.parametrize("k", [2, 10])
def test_perturbations_are_described_by_the_genes_they_hit(screen, fit, effect, k):
    adata, control, measured = screen
    model = fit(bl.Linear, adata, n_components=k)
    assert not model.vocabulary.features.isna().any(axis=None)
    trained = np.array([int(p[1:]) for p in measured])
    *_, expected = by_hand(control, list(measured.values()), trained, np.array([1, 14]), k)
    np.testing.assert_allclose(effect(model, "g1", "x"), expected[0], atol=1e-4)
    np.testing.assert_allclose(effect(model, "g14", "x"), expected[1], atol=1e-4)
    table = model.get_perturbation_effect(["g1", "g3"])
    assert dict(zip(table["perturbation"], table["novelty"], strict=True)) == {
        "g1": "unseen with features",
        "g3": "seen",
    }
    # what was measured is not predicted anew
    np.testing.assert_allclose(effect(model, "g3", "x"), measured["g3"] - control, atol=1e-4)
    # members of a combination add up in P
    g, w, b, _ = by_hand(control, list(measured.values()), trained, np.array([1]), k)
    np.testing.assert_allclose(effect(model, "g1+g3", "x"), g @ w @ (g[1] + g[3]) + b.ravel(), atol=1e-4)
    with pytest.raises(ValueError, match="'drug' was not seen in training"):
        model.get_perturbation_effect("drug")


@pytest.mark.parametrize("n_features", [2, 9])
def test_registered_features_come_first(screen, fit, effect, n_features):
    adata, control, measured = screen
    names = [*measured, "new"]
    features = RNG.normal(0, 1, (len(names), n_features))
    adata.uns["f"] = pd.DataFrame(features, index=names)
    model = fit(bl.Linear, adata, setup={"perturbation_features_key": "f"}, ridge=0.3)
    *_, expected = by_hand(control, list(measured.values()), features[:-1], features[-1:], ridge=0.3)
    np.testing.assert_allclose(effect(model, "new", "x"), expected[0], atol=1e-4)
    with pytest.raises(ValueError, match="'g1' was not seen"):
        model.get_perturbation_effect("g1")


def test_indicators_where_nothing_is_known(made, fit, effect):
    control = RNG.normal(0, 1, N)
    measured = [control + RNG.normal(0, 1, N) for _ in range(3)]
    names = ("A", "B", "C")
    adata = made({("ctrl", "x"): control, **{(p, "x"): m for p, m in zip(names, measured, strict=True)}}, sd=0.01)
    model = fit(bl.Linear, adata)
    *_, expected = by_hand(control, measured, np.eye(3), np.array([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(effect(model, "A+B", "x"), expected[0], atol=1e-4)
    assert model.vocabulary.features is None


def test_recovers_linear_effects_of_unseen_perturbations(made, fit, effect):
    """Effects that are linear in few features are predicted, where the mean effect is far off."""
    features = RNG.normal(0, 1, (30, 3))
    features -= features[:24].mean(0)
    loadings = RNG.normal(0, 1, (3, N))
    # the equations have no intercept for perturbations, and none for the average gene
    effects = features @ (loadings - loadings.mean(1, keepdims=True))
    control = RNG.normal(5, 1, N)
    names = [f"p{i}" for i in range(30)]
    means = {(p, "x"): control + e for p, e in zip(names[:24], effects, strict=False)}
    tables = {}
    for cls in (bl.Linear, bl.MeanEffect, bl.NearestNeighbour):
        adata = made({("ctrl", "x"): control, **means})
        adata.uns["f"] = pd.DataFrame(features, index=names)
        model = fit(cls, adata, setup={"perturbation_features_key": "f"})
        predicted = np.stack([effect(model, p, "x") for p in names[24:]])
        tables[cls.__name__] = np.mean((predicted - effects[24:]) ** 2)
    assert tables["Linear"] < 0.02
    assert tables["NearestNeighbour"] < tables["MeanEffect"]
    assert tables["MeanEffect"] > 1


def profiles(n):
    """Contexts that differ along one direction, by which an effect grows."""
    position = np.linspace(-1, 1, n)
    direction, base, slope = RNG.normal(0, 1, (3, N))
    return position, 5 + position[:, None] * direction, base + position[:, None] * slope


def test_transfers_to_contexts_by_their_controls(made, fit, effect):
    _, control, effects = profiles(6)
    names = [f"c{i}" for i in range(6)]
    means = {("ctrl", c): m for c, m in zip(names, control, strict=True)}
    means |= {("A", c): m + e for c, m, e in zip(names[:5], control, effects, strict=False)}
    linear = fit(bl.Linear, made(means, sd=0.01))
    assert float(linear.module.strength) < 0.1
    # beyond the contexts of training: an extrapolation
    np.testing.assert_allclose(effect(linear, "A", "c5"), effects[5], atol=0.05)
    mean = fit(bl.MeanEffect, made(means, sd=0.01))
    assert np.abs(effect(mean, "A", "c5") - effects[5]).max() > 0.5


def test_unrelated_contexts_get_the_mean_effect(made, fit, effect):
    rng = np.random.default_rng(5)
    means = {("ctrl", f"c{i}"): rng.normal(0, 1, N) for i in range(8)}
    means |= {("A", f"c{i}"): means["ctrl", f"c{i}"] + 1 + rng.normal(0, 1, N) for i in range(7)}
    linear, mean = fit(bl.Linear, made(means)), fit(bl.MeanEffect, made(means))
    # pure noise: leaving contexts out shows that there is nothing to learn
    assert float(linear.module.strength) >= 10
    np.testing.assert_allclose(effect(linear, "A", "c7"), effect(mean, "A", "c7"), atol=0.3)
    assert np.ptp(effect(mean, "A", "c7")) > 1


def test_strength_is_the_best_of_leaving_contexts_out(made, fit, effect):
    """The weights of contexts against ridge regression by scikit-learn."""
    from sklearn.linear_model import Ridge

    _, control, effects = profiles(6)
    control = control + RNG.normal(0, 0.3, control.shape)
    effects = effects + RNG.normal(0, 0.3, effects.shape)
    names = [f"c{i}" for i in range(6)]
    means = {("ctrl", c): m for c, m in zip(names, control, strict=True)}
    means |= {("A", c): m + e for c, m, e in zip(names[:5], control, effects, strict=False)}
    model = fit(bl.Linear, made(means, sd=0.01))
    strength = float(model.module.strength)

    def predicted(train, target, strength):
        x = control[train] - control[train].mean(0)
        ridge = strength * (x**2).sum() / (len(train) - 1)
        return Ridge(alpha=ridge).fit(control[train], effects[train]).predict(control[[target]])[0]

    errors = {
        s: sum(((predicted(np.delete(np.arange(5), i), i, s) - effects[i]) ** 2).sum() for i in range(5))
        for s in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e12)
    }
    assert strength == pytest.approx(min(errors, key=errors.get))
    np.testing.assert_allclose(effect(model, "A", "c5"), predicted(np.arange(5), 5, strength), atol=1e-3)


def test_unseen_perturbation_in_an_unseen_context(screen, made, fit, effect):
    _, control, measured = screen
    means = {("ctrl", "x"): control, **{(p, "x"): mean for p, mean in measured.items()}, ("ctrl", "y"): control + 1}
    model = fit(bl.Linear, made(means, sd=0.01))
    np.testing.assert_allclose(effect(model, "g1", "y"), effect(model, "g1", "x"), atol=1e-4)


def test_standard_errors(screen, fit):
    """Sampling variance of the prediction: the linear map written out as a matrix."""
    adata, control, measured = screen
    module = fit(bl.Linear, adata, n_components=2).module
    trained = np.array([int(p[1:]) for p in measured])
    g, *_ = by_hand(control, list(measured.values()), trained, np.array([1]), 2)
    names = sorted(measured)
    order = np.array([int(p[1:]) for p in names])
    p = g[order]
    score = p @ np.linalg.inv(p.T @ p + 0.1 * np.eye(2)) @ g[1]
    n = len(names)
    project = g @ np.linalg.inv(g.T @ g + 0.1 * np.eye(2)) @ g.T
    variance = module.means.variance.numpy().astype(float)
    maps = [np.eye(N) / n + (score[j] - score.sum() / n) * project for j in range(n)]
    of_control = -sum(maps)
    expected = sum(m**2 @ variance[j] for j, m in enumerate(maps)) + of_control**2 @ variance[n]
    asked = module.conditions.ask(np.array([-2]), np.ones(1), g[[1]])
    weights = module.combine(asked, 0, np.zeros(1))
    _, found = module.weighted(weights[None])
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-3)


def test_contexts_that_respond_alike_get_the_mean_effect(fit, monkeypatch):
    """With 15 cells in an arm: the noise of control profiles is not taken for a relation to effects."""
    from pertura.baseline import _linear

    def strengths():
        return np.array([float(fit(bl.Linear, adata.copy()).module.strength) for adata in screens])

    screens, effects = [], np.where(np.arange(60) < 20, 1.0, 0.0)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        arms = [(c, p) for c in range(10) for p in ("ctrl", "A")]
        x = [2 + (p == "A") * effects + rng.normal(size=(15, 60)) for _, p in arms]
        obs = pd.DataFrame([(p, f"c{c}") for c, p in arms for _ in range(15)], columns=["perturbation", "context"])
        obs.index = obs.index.astype(str)
        screens.append(AnnData(np.concatenate(x).astype(np.float32), obs=obs))
    halves = strengths()
    assert (halves > 10).all()
    monkeypatch.setattr(
        _linear, "split_controls", lambda means, table: [(means.control.numpy(), means.effect.numpy())] * 2
    )
    assert (strengths() < 10).all()
