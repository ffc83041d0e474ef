"""Draws, scales, quantiles, discrepancies: against closed forms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from pertura.data import build_vocabulary
from pertura.model._arguments import as_rows
from pertura.model._calibration import Measured
from pertura.model._discrepancy import UNINFORMED, Discrepancy, fit_discrepancy, widened
from pertura.model._effects import EffectSums, effect_table, log2_fold_change
from pertura.model._engine import Question, encode, quantiles, rescale, seeded
from pertura.model._writeback import ranked_effects, reserve

CPU = torch.device("cpu")


def vocabulary(**arguments):
    labels = pd.Series(["ctrl", "A", "B", "A+B", "C"])
    return build_vocabulary(labels, "ctrl", **arguments)


# -- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 25])
@pytest.mark.parametrize("level", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_quantiles_are_those_of_torch(n, level):
    x = torch.randn(n, 7, 3, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    (found,) = quantiles(x, [level])
    torch.testing.assert_close(found, torch.quantile(x, level, dim=0))
    assert torch.equal(x, before)


def test_quantiles_of_more_than_torch_takes():
    """torch.quantile stopped at 16 million numbers until torch 2.15."""
    x = torch.arange(17_000_000, dtype=torch.float32).reshape(17, -1)
    assert torch.equal(quantiles(x, [0.5])[0], x[8])


def test_seeded_draws():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draws = []
    for seed in (3, 3, 4, [3, 1]):
        with seeded(seed, CPU):
            draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(KeyError), seeded(3, CPU):
        raise KeyError
    assert torch.equal(before, torch.get_rng_state())


def test_rescale():
    counts = torch.tensor([[[2.0, 6.0, 0.0], [0.0, 0.0, 0.0]]])
    library = torch.tensor([[16.0], [5.0]])
    log1p = rescale(counts, "counts", "log1p", library, None)
    torch.testing.assert_close(log1p[0, 0], torch.log1p(torch.tensor([2500.0, 7500.0, 0.0])))
    assert (log1p[0, 1] == 0).all()
    relative = rescale(counts, "counts", "log1p", library, library)
    torch.testing.assert_close(relative[0, 0], torch.log1p(torch.tensor([1250.0, 3750.0, 0.0])))
    torch.testing.assert_close(rescale(relative, "log1p", "counts", library, None), counts)
    for scale in ("counts", "log1p", "layer"):
        assert rescale(counts, scale, scale, library, None) is counts
    assert rescale(counts, "layer", "log1p", library, None) is counts
    with pytest.raises(ValueError, match="no way from the scale 'log1p' to 'layer'"):
        rescale(counts, "log1p", "layer", library, None)


def test_encoded_questions():
    doses = pd.Series([0.0, 5.0, 2.0, 5.0, 1.0])
    table = pd.DataFrame({"f": [1.0, 2.0]}, index=["A", "new"])
    known = vocabulary(doses=doses, features=table)
    action = encode(known, Question("A+new", (2.5, 3.0)))
    assert action.codes.tolist() == [[0, -2]]
    # the new one in units of what is usual: the median of the highest doses
    np.testing.assert_allclose(action.dose, [[0.5, 3.0 / 5.0]], rtol=1e-6)
    assert action.features.tolist() == [[[1.0], [2.0]]]
    control = encode(known, Question("ctrl"))
    assert control.codes.tolist() == [[-1]] and not control.present.any()
    assert Question("A+B", (1.0, 0.25)).dose_text == "1+0.25"


def test_rows():
    np.testing.assert_array_equal(as_rows(4, None), np.arange(4))
    np.testing.assert_array_equal(as_rows(4, [False, True, False, True]), [1, 3])
    np.testing.assert_array_equal(as_rows(4, pd.Series([3, 0], index=["x", "y"])), [3, 0])
    assert as_rows(4, np.array([1], dtype=np.uint8)).dtype == np.int64


# -- discrepancies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "k"), [(0.1, 0.5), (0.0, 0.8), (0.2, 0.0), (0.05, 0.2)])
def test_planted_discrepancies_are_found(a, k):
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(30, 1000)) * np.exp(rng.normal(size=1000)) * 0.3
    se = rng.uniform(0.01, 0.1, size=effect.shape)
    difference = rng.normal(size=effect.shape) * np.sqrt(a**2 + (k * effect) ** 2 + se**2)
    found = fit_discrepancy(difference, se, effect)
    assert abs(found[0] - a) < 0.02
    assert abs(found[1] - k) < 0.06


def test_no_discrepancy_where_errors_explain_everything():
    rng = np.random.default_rng(1)
    effect, se = rng.normal(size=(5, 400)), np.full((5, 400), 0.2)
    assert max(fit_discrepancy(rng.normal(size=effect.shape) * se, se, effect)) < 0.06


def measured(effect, conditions, se=1e-3):
    table = pd.DataFrame(conditions, columns=["label", "dose", "context"])
    table["n_members"] = table["dose"].map(len)
    return Measured(table, np.asarray(effect), np.full_like(np.asarray(effect, dtype=float), se))


def test_each_condition_is_predicted_from_others():
    """A perturbation twice as strong in one context as in the other: each predicts the other with an error of its size."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=2000)
    conditions = [("A", (1.0,), 0), ("A", (1.0,), 1), ("B", (1.0,), 0)]
    data = measured([base, 2 * base, rng.normal(size=2000)], conditions)
    every = np.ones(3, bool)
    a, k = data.others(every, ["label", "dose"], "context")
    # error 0.5 m where m = 2 base predicts base, and -1 m where m = base predicts 2 base
    assert a < 0.1 and 0.5 < k < 1.0
    assert data.others(every, ["label", "context"], "dose") is None
    assert data.others(np.zeros(3, bool), ["context"], "label") is None
    # B is predicted by A in context 0 and the other way round: unrelated effects, of variance 1
    a, k = data.others(every, ["context"], "label")
    assert abs(a**2 + k**2 - 2) < 0.3


def test_combinations_are_predicted_by_their_members_at_their_doses():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 2000))
    surprise = 0.3 * rng.normal(size=2000)
    conditions = [("A", (1.0,), 0), ("A", (2.0,), 0), ("B", (3.0,), 0), ("A+B", (2.0, 3.0), 0), ("A+C", (1.0, 1.0), 0)]
    data = measured([5 * one, one, two, one + two + surprise, one], conditions)
    a, k = data.additive("+")
    assert abs(a - 0.3) < 0.03 and k < 0.1
    assert measured([one], conditions[:1]).additive("+") is None


@pytest.fixture
def discrepancy():
    calibration = {
        "scale": "log1p",
        "observed": {"A": ["x", "y"], "B": ["x"], "A+B": ["x"], "C": ["y"]},
        "doses": {"A": [1.0], "B": [1.0], "C": [1.0]},
        "seen": (0.3, 0.0),
        "new dose": (0.0, 0.5),
        "new context": (0.4, 0.0),
        "new combination": (0.0, 1.0),
        "unseen with features": (1.0, 0.0),
    }
    table = pd.DataFrame({"f": [1.0]}, index=["new"])
    known = vocabulary(doses=pd.Series([0.0, 1.0, 1.0, 1.0, 1.0]), features=table)
    return Discrepancy(calibration, known, ["x", "y"])


@pytest.mark.parametrize(
    ("label", "dose", "context", "novelty", "a", "k"),
    [
        ("ctrl", (), "x", "control", 0, 0),
        ("A", (1.0,), "x", "seen", 0.3, 0),
        ("A", (0.0,), "z", "control", 0, 0),
        ("A", (1.0,), "z", "new context", 0.5, 0),
        ("B", (1.0,), "y", "new context", 0.5, 0),
        ("A", (2.0,), "x", "new dose", 0.3 * 1.25**0.5, 0.5),
        ("A+B", (1.0, 1.0), "x", "seen", 0.3, 0),
        ("A+B", (1.0, 1.0), "y", "new context", 0.5, 0),
        ("A+C", (1.0, 1.0), "y", "new combination", 0.3 * 2**0.5, 1),
        ("A+C", (1.0, 1.0), "x", "new combination, new context", (0.18 + 0.16) ** 0.5, 1),
        ("new", (1.0,), "x", "unseen with features", 1.09**0.5, 0),
        ("new", (1.0,), "z", "unseen with features, new context", 1.25**0.5, 0),
    ],
)
def test_steps_away_from_the_data(discrepancy, label, dose, context, novelty, a, k):
    question = Question(label, dose)
    assert discrepancy.novelty(question, context) == novelty
    np.testing.assert_allclose(discrepancy.parameters(question, context), (a, k), atol=1e-12)
    table = discrepancy.table([question], ["y", context])
    np.testing.assert_allclose(table[0, 1], (a, k), rtol=1e-6, atol=1e-7)


def test_registered_but_not_trained(discrepancy):
    """A split may leave labels, contexts and doses out of the training cells."""
    observed = {"A": ["x"], "B": ["x"]}
    discrepancy = Discrepancy(
        {**discrepancy.calibration, "observed": observed, "doses": {"A": [2.0], "B": [1.0]}},
        discrepancy.vocabulary,
        discrepancy.contexts,
    )
    steps = {
        ("A", (1.0,)): "new dose",
        ("A", (2.0,)): "seen",
        ("A+B", (2.0, 1.0)): "new combination",
        ("C", (1.0,)): "unseen",
        ("A+C", (1.0, 1.0)): "unseen",
        ("new", (1.0,)): "unseen with features",
        ("ctrl", ()): "control",
    }
    assert {key: discrepancy.step(Question(*key)) for key in steps} == steps
    assert discrepancy.trained == ["A", "B"]
    assert discrepancy.is_new_context("A", "y")


def test_without_calibration():
    none = Discrepancy(None, vocabulary(), ["x"])
    assert none.parameters(Question("A", (1.0,)), "z") == (0.0, 0.0)
    assert none.novelty(Question("A", (1.0,)), "z") == "new context"
    assert none.novelty(Question("A", (1.0,)), "x") == "seen"


def test_uninformed_covers_an_absent_and_a_doubled_effect():
    a, k = UNINFORMED
    assert a > 0 and k >= 1


def test_units(discrepancy):
    assert discrepancy.unit("log1p", 3.0, 2000.0) == 1.0
    # counts x at a library: x = library / 1e4 expm1(log1p value)
    library, value = 2000.0, 1.5
    counts = library / 1e4 * np.expm1(value)
    step = library / 1e4 * (np.expm1(value + 1e-6) - np.expm1(value)) / 1e-6
    np.testing.assert_allclose(discrepancy.unit("counts", counts, library), step, rtol=1e-5)


def test_widened_intervals():
    mean, low, high, half = (torch.tensor([v]) for v in (1.0, 0.4, 1.3, 0.8))
    found = widened(mean, low, high, half)
    torch.testing.assert_close(torch.stack(found), torch.tensor([[1 - 1.0], [1 + (0.09 + 0.64) ** 0.5]]))
    # a mean outside its interval, as that of a skewed distribution
    found = widened(mean, torch.tensor([1.1]), torch.tensor([1.2]), torch.tensor([0.0]))
    torch.testing.assert_close(torch.stack(found), torch.tensor([[1.0], [1.2]]))


# -- effects --------------------------------------------------------------------------------------------------------


def test_sums_and_table_in_closed_form():
    """Two contexts of three cells each, one of which does not count; two draws."""
    rng = np.random.default_rng(0)
    control, perturbed = (torch.as_tensor(rng.uniform(1, 2, size=(2, 6, 4)).astype(np.float32)) for _ in "ab")
    context = np.array([2, 2, 2, 5, 5, 5])
    counted = np.array([True, True, False, True, True, True])
    sums = EffectSums(1, 2, 4, np.array([2, 5]))
    for part in (slice(0, 4), slice(4, 6)):
        weights = sums.weights(context[part], counted[part], control)
        sums.add_cells(weights, torch.full((part.stop - part.start, 1), 10.0))
        sums.add_control(weights, control[:, part])
        sums.add(0, weights, perturbed[:, part])
    names = ["a", "b", "c", "d", "e", "f"]
    table = effect_table(
        sums,
        [Question("A", (1.0,))],
        contexts=names,
        genes=pd.Index(list("wxyz")),
        discrepancy=Discrepancy(None, vocabulary(), names),
        has_dose=False,
        ci=0.9,
        delta=0.1,
        scale="layer",
    )
    assert table["context"].tolist() == ["c"] * 4 + ["f"] * 4
    for name, rows in (("c", [0, 1]), ("f", [3, 4, 5])):
        own = table[table["context"] == name]
        change = (perturbed - control)[:, rows].mean(1).numpy()
        np.testing.assert_allclose(own["lfc_mean"], change.mean(0), rtol=1e-5)
        np.testing.assert_allclose(own["lfc_sd"], change.std(0, ddof=1), rtol=1e-4)
        np.testing.assert_allclose(own["mean_control"], control[:, rows].mean((0, 1)), rtol=1e-5)
    assert "dose" not in table


def test_fold_changes_are_those_of_scanpy():
    import scanpy as sc
    from anndata import AnnData

    rng = np.random.default_rng(0)
    values = np.log1p(rng.poisson(3.0, size=(60, 5))).astype(np.float32)
    values[:30, 2] += 1
    adata = AnnData(values, obs=pd.DataFrame({"g": pd.Categorical(["p"] * 30 + ["c"] * 30)}))
    adata.uns["log1p"] = {"base": None}
    sc.tl.rank_genes_groups(adata, "g", groups=["p"], reference="c", method="t-test")
    table = sc.get.rank_genes_groups_df(adata, "p").set_index("names").loc[adata.var_names]
    found = log2_fold_change(values[30:].mean(0), values[:30].mean(0), "log1p")
    np.testing.assert_allclose(found, table["logfoldchanges"], rtol=1e-3)


def test_ranked_effects():
    table = pd.DataFrame(
        {
            "gene": ["a", "b", "c"] * 2,
            "context": ["x"] * 3 + ["y"] * 3,
            "lfc_mean": [1.0, -2.0, 0.1, 0.0, 3.0, 1.0],
            "lfc_sd": [1.0, 1.0, 0.1, 0.0, 1.0, 2.0],
            "log2fc": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        }
    )
    found = ranked_effects(table, "context", {"groupby": "g"})
    assert found["names"]["x"].tolist() == ["a", "c", "b"]
    assert found["names"]["y"].tolist() == ["b", "c", "a"]
    np.testing.assert_allclose(found["scores"]["x"], [1.0, 1.0, -2.0])
    assert found["logfoldchanges"]["y"].tolist() == [5.0, 6.0, 4.0]
    from scipy import stats

    p = dict(zip(found["names"]["x"], found["pvals"]["x"], strict=True))
    np.testing.assert_allclose([p["a"], p["b"]], stats.norm.sf([1, 2]))
    adjusted = dict(zip(found["names"]["x"], found["pvals_adj"]["x"], strict=True))
    np.testing.assert_allclose(adjusted["b"], p["b"])
    np.testing.assert_allclose(max(adjusted.values()), np.mean(list(p.values())))


def test_reserve_knows_what_pertura_wrote():
    from anndata import AnnData

    adata = AnnData(np.ones((2, 2), np.float32), layers={"a": np.ones((2, 2)), "b": np.ones((2, 2))})
    adata.uns["mine"] = {"by": "someone", "wrote": ["layers/a"]}
    adata.uns["result"] = {"by": "pertura", "wrote": np.array(["layers/b"])}
    reserve(adata, {"layers": ["b", "c"]}, overwrite=False)
    with pytest.raises(ValueError, match=r"adata.layers\['a'\] exists"):
        reserve(adata, {"layers": ["a", "b"]}, overwrite=False)
    reserve(adata, {"layers": ["a"]}, overwrite=True)
