"""Measured effects as a distribution: which rows an effect is made of, and how certain it is."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from pertura.data._constants import CONTROL_ONLY, UNKNOWN
from pertura.effects import MeasuredEffect, fit_measured

N_GENES = 25
NAMES = ["A", "B", "C", "D", "E", "F"]
PAIRS = [("A", "B"), ("A", "C"), ("B", "C"), ("C", "D"), ("D", "E")]


@pytest.fixture(scope="module")
def planted():
    """Singles and pairs with interactions; A+F has few cells."""
    rng = np.random.default_rng(0)
    effect = {(n,): rng.normal(0, 1.0, N_GENES) * (rng.random(N_GENES) < 0.6) for n in NAMES}
    for a, b in PAIRS:
        effect[a, b] = effect[a,] + effect[b,] + 0.4 * rng.normal(size=N_GENES)
    effect["A", "F"] = effect["A",] + effect["F",] + 0.4 * rng.normal(size=N_GENES)
    number = {key: 30 if len(key) == 1 else 200 for key in effect} | {("A", "F"): 3}
    labels = ["ctrl"] * 400 + ["+".join(key) for key, n in number.items() for _ in range(n)]
    mean = np.concatenate([np.zeros((400, N_GENES)), *[np.tile(effect[k], (n, 1)) for k, n in number.items()]])
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    adata = AnnData((mean + rng.normal(size=mean.shape)).astype(np.float32), obs=obs)
    return adata, effect


PLAIN = {"layer": None, "dose_key": None, "batch_key": None, "context_key": None}


@pytest.fixture
def fitted(planted, measure):
    table = measure(planted[0].copy(), setup=PLAIN)
    return table, fit_measured(table, len(NAMES))


def codes(*members):
    return torch.tensor([[NAMES.index(m) for m in members]])


def ask(found, *members, dose=None):
    one = torch.ones(1, len(members)) if dose is None else torch.tensor([dose])
    return found.offset(codes(*members), one)[0].numpy(), found.variance(codes(*members), one)[0].sqrt().numpy()


def test_effects_are_close_to_the_planted_ones(planted, fitted):
    table, found = fitted
    raw = table.effects().effect
    truth = np.array([planted[1][tuple(NAMES[c] for c in m)] for m in table.members])
    own = np.array([ask(found, *[NAMES[c] for c in m])[0] for m in table.members])
    assert ((own - truth) ** 2).mean() < 0.9 * ((raw - truth) ** 2).mean()
    sd = np.array([ask(found, *[NAMES[c] for c in m])[1] for m in table.members])
    z = (own - truth) / sd
    assert 0.8 < np.sqrt((z**2).mean()) < 1.25


def test_a_measured_combination_is_at_least_as_certain_as_its_measurement(fitted):
    table, found = fitted
    noise = dict(zip(table.members, table.effects().noise, strict=True))
    for row, members in enumerate(found.combinations.tolist()):
        sd = found.sd[len(NAMES) + row].numpy()
        assert (sd <= np.sqrt(noise[tuple(members)]) * table.spread * 1.0001).all()


def test_a_measured_combination_is_at_least_as_certain_as_the_sum(fitted):
    """Also one with few cells, of which the sum says most."""
    _, found = fitted
    for row, (a, b) in enumerate(found.combinations.tolist()):
        own = found.sd[len(NAMES) + row]
        whole = (found.sd[a] ** 2 + found.sd[b] ** 2 + found.tau**2).sqrt()
        assert (own <= whole * 1.0001).all()
    np.testing.assert_allclose(ask(found, "A", "B")[1], found.sd[len(NAMES)], rtol=1e-6)
    few = found.sd[found._row([0, 5])].numpy()
    assert few.mean() > 1.5 * found.sd[len(NAMES)].numpy().mean()


def test_a_combination_without_cells_is_as_uncertain_as_the_sum(fitted):
    table, _ = fitted
    found = fit_measured(table, len(NAMES), combinations=[(0, 1), (1, 5)])
    row = found._row([1, 5])
    assert not found.measured[row]
    expected = (found.sd[1] ** 2 + found.sd[5] ** 2 + found.tau**2).sqrt()
    torch.testing.assert_close(found.sd[row], expected)
    torch.testing.assert_close(found.mean[row], found.mean[1] + found.mean[5])


def test_an_unmeasured_combination_is_wider(planted, fitted):
    _, found = fitted
    mean, sd = ask(found, "B", "E")
    np.testing.assert_allclose(mean, (found.mean[1] + found.mean[4]).numpy(), atol=1e-6)
    expected = (found.sd[1] ** 2 + found.sd[4] ** 2 + found.tau**2).sqrt()
    np.testing.assert_allclose(sd, expected, rtol=1e-5)
    assert (sd > ask(found, "B", "C")[1]).all()
    # what was planted: interactions of sd 0.4
    assert 0.3 < float(found.tau.square().mean().sqrt()) < 0.55


def test_each_row_has_its_own_noise(fitted):
    _, found = fitted
    torch.manual_seed(0)
    eps = torch.randn(2000, len(found.mean) + 2, found.mean.shape[1])
    asked = torch.tensor([[0, -1], [1, -1], [0, 1], [1, 4], [3, 5]])
    draws = found.offset(asked, torch.ones(asked.shape), lambda rows: eps[:, rows])
    assert draws.shape == (2000, 5, N_GENES)
    np.testing.assert_allclose(draws.mean(0), found.offset(asked, torch.ones(asked.shape)), atol=0.08)
    np.testing.assert_allclose(draws.std(0), found.variance(asked, torch.ones(asked.shape)).sqrt(), rtol=0.1)
    correlation = np.corrcoef(draws[..., 0].T.numpy())
    # A and B say nothing about one another, nor about the measured A+B; B+E holds B
    assert np.abs(correlation[0, 1]) < 0.1 and np.abs(correlation[0, 2]) < 0.1 and correlation[1, 3] > 0.15


def test_single_perturbations_are_read_the_same_way_beside_combinations(fitted):
    """One slot per cell, and two slots of which one is empty: a known perturbation, control, one outside the vocabulary."""
    _, found = fitted
    one, dose = (
        torch.tensor([[1], [CONTROL_ONLY], [UNKNOWN], [0], [1]]),
        torch.tensor([[1.0], [0.0], [0.5], [0.3], [0.0]]),
    )
    two = torch.cat([one, torch.full_like(one, CONTROL_ONLY)], 1)
    beside = torch.cat([dose, torch.zeros_like(dose)], 1)
    noise = torch.randn(len(found.mean) + 2, found.mean.shape[1])
    for given in (None, lambda rows: noise[rows]):
        torch.testing.assert_close(found.offset(one, dose, given), found.offset(two, beside, given))
    torch.testing.assert_close(found.variance(one, dose), found.variance(two, beside))
    assert (found.variance(one, dose).sum(1) > 0).tolist() == [True, False, True, True, False]


def test_doses_in_between(fitted):
    _, found = fitted
    row = found._row([0, 1])
    np.testing.assert_allclose(ask(found, "A", "B", dose=[0.5, 0.5])[0], 0.5 * found.mean[row], atol=1e-6)
    mean, sd = ask(found, "A", "B", dose=[1.0, 0.5])
    np.testing.assert_allclose(mean, 0.5 * found.mean[row] + 0.5 * found.mean[0], atol=1e-6)
    np.testing.assert_allclose(sd**2, 0.25 * (found.sd[row] ** 2 + found.sd[0] ** 2), rtol=1e-5)
    # without the other member it is a single one
    for part in ([1.0, 0.0], [0.3, 0.0]):
        mean, sd = ask(found, "A", "B", dose=part)
        np.testing.assert_allclose(mean, part[0] * found.mean[0], atol=1e-6)
        np.testing.assert_allclose(sd, part[0] * found.sd[0], rtol=1e-5)
    assert (ask(found, "B", "E", dose=[0.0, 0.0])[1] == 0).all()
    above, _ = ask(found, "A", "B", dose=[2.0, 1.5])
    np.testing.assert_allclose(above, found.mean[row] + found.mean[0] + 0.5 * found.mean[1], atol=1e-5)


def test_dose_response_is_the_caller_s(measure):
    """Half of the response, half of the effect: conditions at both doses tell of the same row."""
    rng = np.random.default_rng(1)
    effect = rng.normal(0, 1, N_GENES)
    obs = pd.DataFrame({"perturbation": ["ctrl"] * 300 + ["A"] * 600, "dose": [0.0] * 300 + [1.0] * 300 + [10.0] * 300})
    obs.index = [f"c{i}" for i in range(900)]
    factor = np.array([0.0] * 300 + [0.5] * 300 + [1.0] * 300)
    adata = AnnData((factor[:, None] * effect + 0.3 * rng.normal(size=(900, N_GENES))).astype(np.float32), obs=obs)
    table = measure(adata, setup={**PLAIN, "dose_key": "dose"})
    found = fit_measured(table, 1, strength=lambda codes, dose: np.where(dose > 5, 1.0, 0.5))
    np.testing.assert_allclose(found.mean[0], effect, atol=0.12)
    ignored = fit_measured(table, 1)
    assert np.abs(ignored.mean[0].numpy() - effect).max() > 0.3


def test_perturbations_that_were_not_measured_alone(planted, measure):
    adata = planted[0][(planted[0].obs["perturbation"] != "F").to_numpy()].copy()
    found = fit_measured(measure(adata, setup=PLAIN), len(NAMES))
    assert found.measured[: len(NAMES)].tolist() == [True] * 5 + [False]
    assert (found.mean[5] == 0).all() and (found.sd[5] > found.sd[:5].max(0).values).all()
    assert found.measured[found._row([0, 5])]


def test_without_combinations_nothing_is_said_of_interactions(planted, measure):
    single = ~planted[0].obs["perturbation"].str.contains("+", regex=False).to_numpy()
    found = fit_measured(measure(planted[0][single].copy(), setup=PLAIN), len(NAMES))
    assert (found.tau == 0).all() and len(found.combinations) == 0
    np.testing.assert_allclose(ask(found, "A", "B")[0], found.mean[0] + found.mean[1], atol=1e-6)


def test_unseen_perturbations_by_their_features(measure):
    rng = np.random.default_rng(4)
    features, loading = rng.normal(size=(31, 3)), rng.normal(size=(3, N_GENES))
    effect = features @ loading + 0.1 * rng.normal(size=(31, N_GENES))
    label = np.repeat(np.arange(-1, 30), 40)
    names = np.array(["ctrl", *[f"p{i:02d}" for i in range(30)]])
    obs = pd.DataFrame({"perturbation": names[label + 1]}, index=[f"c{i}" for i in range(len(label))])
    x = np.where(label[:, None] >= 0, effect[label], 0) + rng.normal(size=(len(label), N_GENES))
    found = fit_measured(measure(AnnData(x.astype(np.float32), obs=obs), setup=PLAIN), 30, features=features[:30])
    new = torch.tensor([[-2]])
    given = torch.as_tensor(features[30:, None], dtype=torch.float32)
    predicted = found.offset(new, torch.ones(1, 1), features=given)[0].numpy()
    assert ((predicted - effect[30]) ** 2).mean() < 0.1 * (effect[30] ** 2).mean()
    sd = found.variance(new, torch.ones(1, 1)).sqrt()[0]
    np.testing.assert_allclose(sd, found.unseen_sd, rtol=1e-6)
    assert (np.abs(predicted - effect[30]) < 4 * sd.numpy()).all()
    # a source that is missing is taken as average
    two = fit_measured(
        measure(AnnData(x.astype(np.float32), obs=obs), setup=PLAIN),
        30,
        features=features[:30] + 3.0,
        feature_blocks=[[0], [1, 2]],
    )
    absent, average = (
        torch.tensor([[[v, 3.5, 2.0]]], dtype=torch.float32) for v in (0.0, features[:30, 0].mean() + 3.0)
    )
    moved = (two.offset(new, torch.ones(1, 1), features=f)[0].numpy() for f in (absent, average))
    np.testing.assert_allclose(*moved, atol=1e-4)
    # with nothing but their names, all unseen ones are the mean perturbation
    table = measure(AnnData(x.astype(np.float32), obs=obs), setup=PLAIN)
    plain = fit_measured(table, 30)
    np.testing.assert_allclose(plain.offset(new, torch.ones(1, 1))[0], table.effects().effect.mean(0), atol=1e-5)


def test_saved_and_loaded(fitted):
    _, found = fitted
    other = MeasuredEffect(len(NAMES), N_GENES)
    other.load_state_dict(found.state_dict())
    np.testing.assert_array_equal(ask(other, "A", "B")[0], ask(found, "A", "B")[0])
    assert len(other.combinations) == len(found.combinations)
