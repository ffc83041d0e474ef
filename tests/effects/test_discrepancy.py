"""Distances from the data: the same answers as asking the vocabulary, fast, and sizes learned from measurements."""

import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import stats

from pertura.data._perturbation import Perturbation, encode
from pertura.data._vocabulary import Vocabulary
from pertura.effects import Discrepancy, Error, Spread, calibrate, fit_discrepancy, fit_error, widened
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
    "seen": asdict(Error(0.1, 0.2, 0.1)),
    "new dose": asdict(Error(0.2, 0.3)),
    "higher dose": asdict(Error(0.7, 0.3)),
    "new context": asdict(Error(0.3, 0.2, 0.4)),
    "new combination": asdict(Error(0.4, 0.5)),
    "unseen with features": asdict(Error(0.5, 0.6)),
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
    assert found.spread(Perturbation("A", (2.0,)), "z") == Spread()
    assert found.trained == ["A", "B", "C"] and found.noise == 0


def test_each_step_adds_an_error(trained):
    seen = trained.spread(Perturbation("A", (10.0,)), "x")
    assert (seen.gene, seen.effect, seen.response) == pytest.approx((0.01, 0.04, 0.01))
    found = trained.spread(Perturbation("A", (3.0,)), "z")
    rng = np.random.default_rng(0)
    effect = 2.0
    total = np.full(400_000, effect)
    for name in ("new context", "new dose"):
        own = Error(**CALIBRATION[name])
        sd = np.sqrt(own.gene**2 + (own.effect**2 + own.response**2) * total**2)
        total = total + sd * rng.normal(size=len(total))
    assert np.sqrt(found.gene + (found.effect + found.response) * effect**2) == pytest.approx(total.std(), rel=0.01)
    assert found.response == pytest.approx(0.16)
    assert trained.spread(Perturbation("ctrl"), "z") == Spread()
    variance = trained.variance(Perturbation("A", (3.0,)), "z", np.array([0.0, 2.0]), 3.0)
    proportional = (found.effect + found.response) * 4
    np.testing.assert_allclose(variance, (found.gene + 0.01) * 9 + np.array([0, proportional]))


def test_extrapolated_doses_have_an_error_of_their_own(trained):
    gene = [trained.spread(Perturbation(*asked), "x").gene for asked in (("A", (3.0,)), ("A", (30.0,)), ("B", (30.0,)))]
    assert gene == pytest.approx([0.0509, 0.5009, 0.5009])
    assert trained.novelty(Perturbation("A", (30.0,)), "x") == "new dose"


def test_what_is_not_fitted_is_not_counted_twice():
    """A model that misses what contexts differ by misses it in contexts that were trained, too."""
    calibration = {**CALIBRATION, "seen": asdict(Error(0.5, 0.0, 0.0)), "new context": asdict(Error(0.4, 0.3, 0.2))}
    found = Discrepancy(calibration, VOCABULARY, ["x", "y"]).spread(Perturbation("A", (10.0,)), "z")
    assert (found.gene, found.effect, found.response) == pytest.approx((0.25, 0.09, 0.04))


def test_intervals_reach_as_far_as_they_must():
    """Half-widths are learned at some levels, interpolated between them, and in proportion to a normal beyond."""
    heavy = Error(1.0, reach=(0.2, 0.5, 1.0, 1.5, 2.5, 4.0, 6.0))
    assert heavy.half_width(0.9) == pytest.approx(2.5) and heavy.half_width(0.5) == pytest.approx(0.5)
    assert 2.5 < heavy.half_width(0.92) < 4.0
    z = stats.norm.ppf([0.99, 0.999])
    assert heavy.half_width(0.998) == pytest.approx(6.0 * z[1] / z[0])
    for level in (0.1, 0.5, 0.66, 0.9, 0.999):
        assert Error().half_width(level) == pytest.approx(stats.norm.ppf((1 + level) / 2), rel=0.02)
    assert heavy.spread(0.9).gene == pytest.approx((2.5 / 1.6449) ** 2, rel=1e-3)


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
    for p in asked:
        for c in contexts:
            found.spread(p, c)
    spent = time.process_time() - start
    assert words.count("new context") == 4000 and words.count("seen") == 6000
    assert spent < 1  # second: nothing is searched or built anew per question


def test_sizes_are_recovered():
    rng = np.random.default_rng(1)
    effect = rng.normal(size=20_000)
    se = rng.uniform(0.05, 0.2, effect.shape)
    difference = rng.normal(size=effect.shape) * np.sqrt(0.1**2 + (0.3 * effect) ** 2 + se**2)
    a, k = fit_discrepancy(difference, se, effect)
    assert a == pytest.approx(0.1, abs=0.02) and k == pytest.approx(0.3, abs=0.03)


def left_out(rng, groups, n_genes, *, gene, response=0.0, effect=0.0, each=2, tails=False):
    """Differences, standard errors, predicted effects and groups of conditions that were left out."""
    predicted = rng.normal(size=n_genes) * (rng.random(n_genes) < 0.3) * np.ones((groups * each, 1))
    group = np.repeat(np.arange(groups), each)
    amplitude = response * rng.normal(size=groups)[group][:, None]
    noise = rng.standard_t(2.5, size=predicted.shape) if tails else rng.normal(size=predicted.shape)
    se = np.full(predicted.shape, 0.05)
    difference = amplitude * predicted + np.sqrt(gene**2 + (effect * predicted) ** 2) * noise
    return difference + se * rng.normal(size=se.shape), se, predicted, group


def test_shared_amplitude_apart_from_errors_of_genes():
    rng = np.random.default_rng(3)
    gene = np.where(np.arange(500) < 250, 0.05, 0.4)
    alone = fit_error(*left_out(rng, 20, 500, gene=gene, effect=0.2))
    together = fit_error(*left_out(rng, 20, 500, gene=gene, response=0.6))
    assert alone.response < 0.1 and alone.effect > 0.1
    assert together.response == pytest.approx(0.6, rel=0.35) and together.effect < 0.15
    # genes that differ more are less certain
    for found in (alone, together):
        assert np.mean(found.gene[250:]) == pytest.approx(0.4, rel=0.15) and np.mean(found.gene[:250]) < 0.15


@pytest.mark.parametrize("groups", [4, 12])
@pytest.mark.parametrize("tails", [False, True])
def test_intervals_hold_errors_of_further_groups(groups, tails):
    """What was left out to learn from says how far errors of other groups reach, few groups and heavy tails included."""
    rng = np.random.default_rng(4)
    gene = np.exp(rng.normal(-2.0, 0.7, size=300))
    held: dict[float, list[bool]] = {0.5: [], 0.9: []}
    strong: dict[float, list[bool]] = {0.5: [], 0.9: []}
    for _ in range(20):
        options = {"gene": gene, "response": 0.3, "effect": 0.1, "tails": tails}
        difference, se, predicted, group = left_out(rng, groups + 4, 300, **options)
        new = group >= groups
        found = fit_error(difference[~new], se[~new], predicted[~new], group[~new])
        for level in held:
            own = found.spread(level)
            variance = own.gene + (own.effect + own.response) * predicted[new] ** 2 + se[new] ** 2
            inside = np.abs(difference[new]) <= stats.norm.ppf((1 + level) / 2) * np.sqrt(variance)
            held[level] += inside.ravel().tolist()
            strong[level] += inside[np.abs(predicted[new]) > 1.0].tolist()
    for level in held:
        assert np.mean(held[level]) == pytest.approx(level, abs=0.04)
        assert np.mean(strong[level]) == pytest.approx(level, abs=0.2 if tails else 0.1)


def test_intervals_hold_the_strong_genes_too():
    """One gene in ten responds, which one is not known: an interval that holds 90 % of all genes would hold none of them."""
    rng = np.random.default_rng(5)
    true = np.where(rng.random((20, 400)) < 0.1, 1.0, 0.0) * rng.choice([-1.0, 1.0], size=(20, 400))
    true += 0.02 * rng.normal(size=true.shape)
    se, none = np.full(true.shape, 0.01), np.zeros(true.shape)
    plain = fit_error(-true, se, none, np.arange(20))
    careful = fit_error(-true, se, none, np.arange(20), (np.abs(true) > 0.5, -true, se))
    ends = [1.645 * np.sqrt(e.spread(0.9).gene) for e in (plain, careful)]
    shares = [(np.abs(true) <= end).mean() for end in ends]
    assert shares[0] == pytest.approx(0.9, abs=0.02) and shares[1] == pytest.approx(0.95, abs=0.02)


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
    kinds = ("seen", "new dose", "new context", "new combination", "unseen with features")
    spreads = {kind: Error(**found[kind]).spread(0.9) for kind in kinds}
    size = {kind: np.sqrt(np.mean(s.gene) + s.effect + s.response) for kind, s in spreads.items()}
    assert size["seen"] == pytest.approx(0.2, abs=0.05)
    # the mean of two other contexts: a sd of 0.5 sqrt(1 + 1/2), and more, as three contexts do not say it well
    assert size["new context"] == pytest.approx(0.61, rel=0.3)
    assert size["unseen with features"] > 1.0 and size["new combination"] < 0.1
    assert found["new dose"] == asdict(UNINFORMED)
    assert (found["noise"] == 0).all()
    shared = calibrate(table, predict, vocabulary, ["x", "y", "z"], scale="layer", noise_share=0.5)
    chosen = [where[p, c] for (p, c) in where if p.label != "few"]
    np.testing.assert_allclose(shared["noise"], 0.5 * (table.effects().se[chosen] ** 2).mean(0), rtol=1e-6)


def test_nothing_to_compare_with(planted):
    table, vocabulary = planted
    found = calibrate(table, None, vocabulary, ["x", "y", "z"], scale="layer", min_cells=1000)
    assert found["seen"] == asdict(Error()) and found["new context"] == asdict(UNINFORMED)


def test_perturbations_are_encoded_for_modules():
    codes, dose, features = encode(VOCABULARY, Perturbation("A+described", (5.0, 10.0)))
    assert codes.tolist() == [0, -2] and dose.tolist() == [0.5, 1.0] and features.tolist() == [[1.0], [1.0]]
    codes, dose, _ = encode(VOCABULARY, Perturbation("ctrl"))
    assert codes.tolist() == [-1] and dose.tolist() == [0.0]
    assert Perturbation("A+B", (1.0, 0.25)).dose_text == "1+0.25"
