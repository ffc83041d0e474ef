"""Distances from the data: the same answers as asking the vocabulary, fast, and sizes learned from measurements."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from pertura.data._perturbation import Perturbation, encode
from pertura.data._vocabulary import Vocabulary
from pertura.effects import Discrepancy, calibrate, fit_discrepancy, widened
from pertura.effects._discrepancy import UNINFORMED, perturbations_of

VOCABULARY = Vocabulary(
    names=("A", "B", "C"),
    control="ctrl",
    combinations=(("A", "B"),),
    max_dose=(10.0, 10.0, 10.0),
    reference_dose=(10.0, 10.0, 10.0),
    doses=((1.0, 10.0), (10.0,), (10.0,)),
    has_dose=True,
    features=pd.DataFrame(np.ones((2, 1)), index=["A", "described"]),
)
CALIBRATION = {
    "scale": "log1p",
    "observed": {"A": ["x", "y"], "B": ["x"], "A+B": ["x"]},
    "doses": {"A": [1.0, 10.0], "B": [10.0]},
    "noise": 0.01,
    "seen": (0.1, 0.2),
    "new dose": (0.2, 0.3),
    "new context": (0.3, 0.4),
    "new combination": (0.4, 0.5),
    "unseen with features": (0.5, 0.6),
}


@pytest.fixture
def trained():
    return Discrepancy(CALIBRATION, VOCABULARY, ["x", "y"])


@pytest.mark.parametrize(
    ("label", "dose", "context", "expected"),
    [
        ("ctrl", (), "z", "control"),
        ("A", (0.0,), "x", "control"),
        ("A", (10.0,), "x", "seen"),
        ("A", (3.0,), "x", "new dose"),
        ("A", (10.0,), "z", "new context"),
        ("B", (10.0,), "y", "new context"),
        ("A+B", (1.0, 10.0), "x", "seen"),
        ("A+B", (1.0, 10.0), "y", "new context"),
        ("A+B", (1.0, 3.0), "x", "new dose"),
        # registered, but held out of training
        ("C", (10.0,), "x", "unseen"),
        ("A+C", (10.0, 10.0), "x", "unseen"),
        ("described", (10.0,), "x", "unseen with features"),
        ("A+described", (10.0, 10.0), "z", "unseen with features, new context"),
        ("nothing", (10.0,), "x", "unseen"),
    ],
)
def test_novelty(trained, label, dose, context, expected):
    assert trained.novelty(Perturbation(label, dose), context) == expected
    assert trained.novelty(Perturbation(label, dose), context) == expected  # what is kept is the same


def test_new_combinations_of_what_was_trained():
    calibration = {**CALIBRATION, "observed": {"A": ["x", "y"], "B": ["x"]}}
    found = Discrepancy(calibration, VOCABULARY, ["x", "y"])
    assert found.novelty(Perturbation("A+B", (10.0, 10.0)), "x") == "new combination"
    assert found.novelty(Perturbation("A+B", (10.0, 10.0)), "y") == "new combination, new context"
    assert found.trained == ["A", "B"]


def test_without_training_the_vocabulary_decides():
    found = Discrepancy(None, VOCABULARY, ["x"])
    for label, dose in [("A", (10.0,)), ("A", (2.0,)), ("A+C", (10.0, 10.0)), ("A+B", (1.0, 10.0)), ("q", (1.0,))]:
        assert found.step(Perturbation(label, dose)) == VOCABULARY.novelty(label, dose)
    assert found.parameters(Perturbation("A", (2.0,)), "z") == (0.0, 0.0)
    assert found.trained == ["A", "B", "C"] and found.noise == 0


def test_each_step_adds_an_error(trained):
    assert trained.parameters(Perturbation("A", (10.0,)), "x") == pytest.approx((0.1, 0.2))
    a, k = trained.parameters(Perturbation("A", (3.0,)), "z")
    rng = np.random.default_rng(0)
    effect = 2.0
    total = np.full(400_000, effect)
    for own_a, own_k in (CALIBRATION["seen"], CALIBRATION["new dose"], CALIBRATION["new context"]):
        total = total + np.sqrt(own_a**2 + (own_k * total) ** 2) * rng.normal(size=len(total))
    assert np.sqrt(a**2 + (k * effect) ** 2) == pytest.approx(total.std(), rel=0.01)
    assert trained.parameters(Perturbation("ctrl"), "z") == (0.0, 0.0)
    asked = [Perturbation("A", (3.0,)), Perturbation("ctrl")]
    np.testing.assert_allclose(trained.table(asked, ["x", "z"])[0, 1], (a, k), rtol=1e-6)
    variance = trained.variance(asked[0], "z", np.array([0.0, 2.0]), 3.0)
    np.testing.assert_allclose(variance, (a**2 + 0.01) * 9 + np.array([0, (2 * k) ** 2]))


def test_ends_are_widened_by_an_independent_error():
    low, high = widened(torch.tensor(0.0), torch.tensor(-3.0), torch.tensor(1.0), torch.tensor(4.0))
    assert low == -5 and high == pytest.approx(17**0.5)


def test_cost_is_linear_in_the_perturbations():
    names = tuple(sorted(f"gene{i}" for i in range(2000)))
    contexts = list("abcde")
    vocabulary = Vocabulary(
        names, "ctrl", max_dose=(1.0,) * 2000, reference_dose=(1.0,) * 2000, doses=((1.0,),) * 2000, has_dose=True
    )
    calibration = {
        **CALIBRATION,
        "observed": {n: contexts[: 1 + i % 5] for i, n in enumerate(names)},
        "doses": {n: [1.0] for n in names},
    }
    asked = [Perturbation(n, (1.0,)) for n in names]
    start = time.process_time()
    found = Discrepancy(calibration, vocabulary, contexts)
    words = [found.novelty(p, c) for p in asked for c in contexts]
    found.table(asked, contexts)
    spent = time.process_time() - start
    assert words.count("new context") == 4000 and words.count("seen") == 6000
    assert spent < 0.2


def test_sizes_are_recovered():
    rng = np.random.default_rng(1)
    effect = rng.normal(size=20_000)
    se = rng.uniform(0.05, 0.2, effect.shape)
    difference = rng.normal(size=effect.shape) * np.sqrt(0.1**2 + (0.3 * effect) ** 2 + se**2)
    a, k = fit_discrepancy(difference, se, effect)
    assert a == pytest.approx(0.1, abs=0.02) and k == pytest.approx(0.3, abs=0.03)


@pytest.fixture
def planted(measure, registered):
    """Effects that differ by 0.5 between contexts, by 1 between perturbations; pairs are sums."""
    rng = np.random.default_rng(2)
    n_genes = 200
    single = {p: rng.normal(size=n_genes) for p in "ABCDEFGH"}
    rows, x = [], []
    for c in "xyz":
        own = {p: e + 0.5 * rng.normal(size=n_genes) for p, e in single.items()}
        own |= {"A+B": own["A"] + own["B"], "C+D": own["C"] + own["D"], "ctrl": np.zeros(n_genes)}
        own["few"] = np.zeros(n_genes)
        for label, effect in own.items():
            n = 4 if label == "few" else 40
            rows += [(label, c)] * n
            x.append(effect + 0.3 * rng.normal(size=(n, n_genes)))
    obs = pd.DataFrame(rows, columns=["perturbation", "context"], index=[f"c{i}" for i in range(len(rows))])
    adata = AnnData(np.concatenate(x).astype(np.float32), obs=obs)
    setup = {"layer": None, "dose_key": None, "batch_key": None}
    return measure(adata, setup=setup), registered(adata, **setup).vocabulary


def test_calibration_on_planted_differences(planted):
    table, vocabulary = planted
    done = perturbations_of(table, vocabulary)
    where = {(p, c): i for i, (p, c) in enumerate(zip(done, table.context[table.treated], strict=True))}
    effect = table.effects().effect
    asked = []

    def predict(context, perturbations):
        asked.extend(perturbations)
        wrong = 0.2 * np.random.default_rng(len(asked)).normal(size=(len(perturbations), table.n_genes))
        return np.stack([effect[where[p, context]] for p in perturbations]) + wrong

    found = calibrate(table, predict, vocabulary, ["x", "y", "z"], scale="layer")
    assert found["scale"] == "layer" and found["observed"]["A+B"] == ["x", "y", "z"] and found["doses"]["A"] == [1.0]
    assert "few" in found["observed"] and all(p.label != "few" for p in asked) and len(asked) == 30
    a, k = found["seen"]
    assert np.hypot(a, k) == pytest.approx(0.2, abs=0.05)
    size = {key: np.sqrt(found[key][0] ** 2 + found[key][1] ** 2) for key in found if isinstance(found[key], tuple)}
    # the mean of two other contexts: a sd of 0.5 sqrt(1 + 1/2)
    assert size["new context"] == pytest.approx(0.61, rel=0.2)
    assert size["unseen with features"] > 1.0 and size["new combination"] < 0.1
    assert found["new dose"] == UNINFORMED
    assert (found["noise"] == 0).all()
    shared = calibrate(table, predict, vocabulary, ["x", "y", "z"], scale="layer", noise_share=0.5)
    chosen = [where[p, c] for (p, c) in where if p.label != "few"]
    np.testing.assert_allclose(shared["noise"], 0.5 * (table.effects().se[chosen] ** 2).mean(0), rtol=1e-6)


def test_nothing_to_compare_with(planted):
    table, vocabulary = planted
    found = calibrate(table, None, vocabulary, ["x", "y", "z"], scale="layer", min_cells=1000)
    assert found["seen"] == (0.0, 0.0) and found["new context"] == UNINFORMED


def test_perturbations_are_encoded_for_modules():
    codes, dose, features = encode(VOCABULARY, Perturbation("A+described", (5.0, 10.0)))
    assert codes.tolist() == [0, -2] and dose.tolist() == [0.5, 1.0] and features.tolist() == [[1.0], [1.0]]
    codes, dose, _ = encode(VOCABULARY, Perturbation("ctrl"))
    assert codes.tolist() == [-1] and dose.tolist() == [0.0]
    assert Perturbation("A+B", (1.0, 0.25)).dose_text == "1+0.25"
