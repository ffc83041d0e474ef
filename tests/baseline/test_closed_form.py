"""Each estimator against its definition, computed by hand."""

import anndata
import numpy as np
import pandas as pd
import pytest

from pertura import baseline as bl

RNG = np.random.default_rng(0)
N = 12
CONTROL = {c: RNG.normal(0, 1, N) for c in ("x", "y", "z")}
EFFECT = {(p, c): RNG.normal(0, 1, N) for p in ("A", "B", "C", "A+B", "A+C") for c in CONTROL}


def screen(*conditions):
    """Means of controls and of the named conditions, such as `"A x"`."""
    means = {("ctrl", c): CONTROL[c] for c in CONTROL}
    for condition in conditions:
        label, context = condition.split()
        means[label, context] = CONTROL[context] + EFFECT[label, context]
    return means


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_no_change(made, fit, effect):
    adata = made(screen("A x", "A y"))
    model = fit(bl.NoChange, adata)
    close(effect(model, "A", "x"), 0)
    close(effect(model, "A+Q", "z"), 0)
    model.predict_perturbation("A", key_added="p")
    # a baseline has no effect to take back
    close(adata.layers["p"], adata.X)


def test_mean_effect_of_a_perturbation_seen_elsewhere(made, fit, effect):
    model = fit(bl.MeanEffect, made(screen("A x", "A y", "B x")))
    mean = (EFFECT["A", "x"] + EFFECT["A", "y"]) / 2
    for context in CONTROL:  # also in the contexts where it was measured
        close(effect(model, "A", context), mean)
    close(effect(model, "B", "z"), EFFECT["B", "x"])


def test_mean_effect_counts_contexts_and_not_cells(made, fit, effect):
    adata = made(screen("A x", "A y"))
    twice = adata[(adata.obs["context"] == "x").to_numpy()].copy()
    twice.obs_names = twice.obs_names + "again"
    model = fit(bl.MeanEffect, anndata.concat([adata, twice]))
    close(effect(model, "A", "z"), (EFFECT["A", "x"] + EFFECT["A", "y"]) / 2)


def test_own_context(made, fit, effect):
    adata = made(screen("A x", "A y"))
    model = fit(bl.MeanEffect, adata, use_own_context=True)
    close(effect(model, "A", "x"), EFFECT["A", "x"])
    close(effect(model, "A", "z"), (EFFECT["A", "x"] + EFFECT["A", "y"]) / 2)


def test_mean_effect_of_an_unseen_perturbation(made, fit, effect):
    model = fit(bl.MeanEffect, made(screen("A x", "B x", "A y", "A+B x")))
    # of the single perturbations in its context, and in another one of these over contexts
    own = (EFFECT["A", "x"] + EFFECT["B", "x"]) / 2
    close(effect(model, "new", "x"), own)
    close(effect(model, "new", "y"), EFFECT["A", "y"])
    close(effect(model, "new", "z"), (own + EFFECT["A", "y"]) / 2)
    assert set(model.get_perturbation_effect("new")["novelty"].str.split(",").str[0]) == {"unseen"}


def test_mean_effect_of_a_new_combination(made, fit, effect):
    singles = fit(bl.MeanEffect, made(screen("A x", "B x")))
    close(effect(singles, "A+B", "x"), (EFFECT["A", "x"] + EFFECT["B", "x"]) / 2)
    pairs = fit(bl.MeanEffect, made(screen("A x", "B x", "C x", "A+B x", "A+C x")))
    close(effect(pairs, "B+C", "x"), (EFFECT["A+B", "x"] + EFFECT["A+C", "x"]) / 2)


def weights(target, others, temperature):
    similarity = np.array([np.corrcoef(CONTROL[target], CONTROL[c])[0, 1] for c in others])
    w = np.exp(similarity / temperature)
    return w / w.sum()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_weighted_mean_effect(made, fit, effect, temperature):
    model = fit(bl.WeightedMeanEffect, made(screen("A x", "A y", "B z")), temperature=temperature)
    w = weights("z", ["x", "y"], temperature)
    close(effect(model, "A", "z"), w @ [EFFECT["A", "x"], EFFECT["A", "y"]])
    w = weights("x", ["x", "y"], temperature)
    close(effect(model, "A", "x"), w @ [EFFECT["A", "x"], EFFECT["A", "y"]])
    close(effect(model, "new", "z"), EFFECT["B", "z"])


def test_temperature_between_mean_and_nearest(made, fit, effect):
    adata = made(screen("A x", "A y"))
    nearest = fit(bl.NearestNeighbour, adata)
    similarity = [np.corrcoef(CONTROL["z"], CONTROL[c])[0, 1] for c in "xy"]
    close(effect(nearest, "A", "z"), EFFECT["A", "xy"[int(np.argmax(similarity))]])
    close(effect(nearest, "A", "x"), EFFECT["A", "x"])
    cold = fit(bl.WeightedMeanEffect, made(screen("A x", "A y")), temperature=1e-3)
    close(effect(cold, "A", "z"), effect(nearest, "A", "z"))
    hot = fit(bl.WeightedMeanEffect, made(screen("A x", "A y")), temperature=1e6)
    close(effect(hot, "A", "z"), (EFFECT["A", "x"] + EFFECT["A", "y"]) / 2)


def test_nearest_perturbation_by_features(made, fit, effect):
    adata = made(screen("A x", "B x", "C y", "A+B x"))
    rows = {
        "A": [1, 0, 0],
        "B": [0, 1, 0],
        "C": [0, 0, 1],
        "like B": [0.2, 3, 0.1],
        "both": [1, 1.1, 0],
        "Q": [0, 0, 9],
    }
    adata.uns["described"] = pd.DataFrame(rows).T
    model = fit(bl.NearestNeighbour, adata, setup={"perturbation_features_key": "described"})
    close(effect(model, "like B", "x"), EFFECT["B", "x"])
    close(effect(model, "both", "x"), EFFECT["A+B", "x"])
    close(effect(model, "Q", "x"), EFFECT["C", "y"])  # measured in another context only
    # as like B as C, of which B was measured here; less like A+B
    close(effect(model, "B+C", "x"), EFFECT["B", "x"])
    close(effect(model, "B+C", "y"), EFFECT["C", "y"])
    with pytest.raises(ValueError, match=r"'unheard of' was not seen in training and has no features.*Register"):
        model.get_perturbation_effect("unheard of")


def test_nearest_combination_without_features(made, fit, effect):
    model = fit(bl.NearestNeighbour, made(screen("A x", "B x", "A+C x")))
    # C was not measured alone: A+C and B+C share half of their members, as B and B+C do of theirs, but B is in fewer
    close(effect(model, "B+C", "x"), EFFECT["B", "x"])
    close(effect(model, "A+B", "x"), (EFFECT["A", "x"] + EFFECT["B", "x"]) / 2)


def test_additive(made, fit, effect):
    model = fit(bl.Additive, made(screen("A x", "B x", "A y", "B y", "A+B y", "A+C x")))
    close(effect(model, "A+B", "x"), EFFECT["A", "x"] + EFFECT["B", "x"])
    # also where the combination was measured; in a context without, means over contexts
    close(effect(model, "B+A", "y"), EFFECT["A", "y"] + EFFECT["B", "y"])
    close(effect(model, "A+B", "z"), sum(EFFECT[p, c] for p in "AB" for c in "xy") / 2)
    close(effect(model, "A", "x"), EFFECT["A", "x"])
    # C was measured in a combination only: it stands for the average single perturbation
    mean = (EFFECT["A", "x"] + EFFECT["B", "x"]) / 2
    close(effect(model, "B+C", "x"), EFFECT["B", "x"] + mean)
    close(effect(model, "B+unheard of", "x"), EFFECT["B", "x"] + mean)


def test_additive_over_contexts(made, fit, effect):
    model = fit(bl.Additive, made(screen("A x", "B x", "A y", "B y")), use_own_context=False)
    close(effect(model, "A+B", "x"), sum(EFFECT[p, c] for p in "AB" for c in "xy") / 2)


DOSED = {
    ("ctrl", "x", 0.0): CONTROL["x"],
    ("A", "x", 1.0): CONTROL["x"] + EFFECT["A", "x"],
    ("A", "x", 10.0): CONTROL["x"] + EFFECT["B", "x"],
}


@pytest.mark.parametrize("cls", [bl.MeanEffect, bl.WeightedMeanEffect, bl.NearestNeighbour, bl.Additive, bl.Linear])
def test_doses_are_interpolated(made, fit, effect, cls):
    model = fit(cls, made(DOSED), setup={"dose_key": "dose"})
    low, high = EFFECT["A", "x"], EFFECT["B", "x"]
    between = np.log(3) / np.log(10)
    expected = {
        0.0: 0 * low,
        0.25: low * 0.25,
        1.0: low,
        3.0: (1 - between) * low + between * high,
        10.0: high,
        1000.0: high,
    }
    for dose, value in expected.items():
        close(effect(model, "A", "x", dose=dose), value)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
@pytest.mark.parametrize("cls", [bl.MeanEffect, bl.WeightedMeanEffect, bl.NearestNeighbour, bl.Additive, bl.Linear])
def test_doses_have_no_unit(made, fit, effect, cls, unit):
    means = {
        **DOSED,
        ("B", "x", 3.0): CONTROL["x"] + EFFECT["C", "x"],
        ("C", "x", 3.0): CONTROL["x"] + EFFECT["A", "x"],
    }
    means[("B+C", "x", 10.0)] = CONTROL["x"] + EFFECT["A+B", "x"]
    scaled = {(label, context, dose * unit): mean for (label, context, dose), mean in means.items()}
    model, other = (fit(cls, made(m), setup={"dose_key": "dose"}) for m in (means, scaled))
    for label in ("A", "B+C", "A+B"):
        if cls is bl.NearestNeighbour and label == "A+B":
            continue
        for dose in (0.25, 1.0, 4.0, 40.0):
            expected = effect(model, label, "x", dose=dose)
            np.testing.assert_allclose(effect(other, label, "x", dose=dose * unit), expected, atol=1e-4)
    # an unseen one has the effect of others at this dose
    if cls in (bl.MeanEffect, bl.WeightedMeanEffect):
        close(effect(other, "new", "x", dose=4.0 * unit), effect(model, "new", "x", dose=4.0))


def test_doses_of_each_context_and_of_combinations(made, fit, effect):
    means = {
        **DOSED,
        ("ctrl", "y", 0.0): CONTROL["y"],
        ("A", "y", 3.0): CONTROL["y"] + EFFECT["A", "y"],
        ("B", "x", 10.0): CONTROL["x"] + EFFECT["C", "x"],
        ("A+B", "x", 10.0): CONTROL["x"] + EFFECT["A+B", "x"],
    }
    share = 1 / 3
    model = fit(bl.MeanEffect, made(means), setup={"dose_key": "dose"})
    # y has no dose of 1: its effect there is read off between 0 and 3
    close(effect(model, "A", "x", dose=1), (EFFECT["A", "x"] + share * EFFECT["A", "y"]) / 2)
    close(effect(model, "A+B", "x", dose=1), EFFECT["A+B", "x"] / 10)
    additive = fit(bl.Additive, made(means), setup={"dose_key": "dose"})
    close(effect(additive, "A+B", "x", dose=10), EFFECT["B", "x"] + EFFECT["C", "x"])
    # an unseen one at the dose that is asked; most were measured at 10
    mean = (EFFECT["B", "x"] + EFFECT["C", "x"]) / 2
    close(effect(model, "new", "x", dose=10), mean)
    low = (EFFECT["A", "x"] + EFFECT["C", "x"] / 10) / 2
    close(effect(model, "new", "x", dose=1), low)


def test_doses_of_members(made, fit, effect):
    """Members with doses of their own: the very doses first, then their mean strength."""
    means = {
        ("ctrl", "x", "0"): CONTROL["x"],
        ("A", "x", "1"): CONTROL["x"] + EFFECT["A", "x"],
        ("A+B", "x", "1+7"): CONTROL["x"] + EFFECT["A+B", "x"],
        ("A+B", "x", "7+1"): CONTROL["x"] + EFFECT["A+C", "x"],
    }
    model = fit(bl.MeanEffect, made(means), setup={"dose_key": "dose"})
    conditions = model.module.conditions
    ask = lambda *dose: conditions.ask(np.array([0, 1]), np.array(dose)).at_dose  # noqa: E731
    pairs = np.flatnonzero(conditions.order == 2)
    assert conditions.dose[pairs].tolist() == [[1, 7], [7, 1]]
    close(ask(1.0, 7.0)[pairs], [1, 0])
    close(ask(7.0, 1.0)[pairs], [0, 1])
    # the same mean of the logarithms: both count the same
    close(ask(7**0.5, 7**0.5)[pairs], [0.5, 0.5])
    close(ask(1.0, 0.0), conditions.ask(np.array([0]), np.array([1.0])).at_dose)
