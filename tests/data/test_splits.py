"""Splits: what is held out, that it does not leak, and that planted leaks are found."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from sklearn.metrics import average_precision_score

from pertura.data._grn_splits import GRNSplit, candidate_pairs, make_grn_splits
from pertura.data._splits import (
    Split,
    as_obs,
    few_shot_context,
    held_out_cells,
    leave_context_out,
    unseen_combination,
    unseen_dose,
    unseen_perturbation,
)

KEYS = {"perturbation_key": "perturbation", "control": "ctrl"}


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    names = ["ctrl", "A", "B", "C", "D", "E", "A+B", "B+A", "C+D", "A+E", "D+ctrl"]
    obs = pd.DataFrame(
        {
            "perturbation": rng.choice(names, 2000),
            # The name of one context is a part of the other's.
            "cell_type": rng.choice(["CD14", "CD14+ Monocytes", "B cells"], 2000),
            "dose": rng.choice([0.1, 1.0, 10.0], 2000),
        },
        index=[f"cell{i}" for i in range(2000)],
    )
    obs.loc[obs["perturbation"] == "ctrl", "dose"] = 0.0
    return AnnData(np.zeros((2000, 1), dtype=np.float32), obs=obs)


def covers(split, n):
    return sorted(np.concatenate([split.train, split.val, split.test])) == list(range(n))


def test_leave_context_out(adata):
    splits = leave_context_out(adata, context_key="cell_type", **KEYS)
    assert [s.held_out[0] for s in splits] == ["B cells", "CD14", "CD14+ Monocytes"]
    for split in splits:
        train, test = adata.obs.iloc[split.train], adata.obs.iloc[split.test]
        assert (test["cell_type"] == split.held_out[0]).all()
        assert "ctrl" not in set(test["perturbation"])
        inside = train[train["cell_type"] == split.held_out[0]]
        assert set(inside["perturbation"]) == {"ctrl"}
        assert covers(split, 2000)
    tested = np.concatenate([s.test for s in splits])
    assert sorted(tested) == list(np.flatnonzero(adata.obs["perturbation"] != "ctrl"))


def test_validation_rows_follow_the_seed(adata):
    chosen = [
        leave_context_out(adata, context_key="cell_type", contexts=["CD14"], val_fraction=0.1, seed=seed, **KEYS)[0].val
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(chosen[0], chosen[1])
    assert len(np.intersect1d(chosen[0], chosen[2])) < 0.3 * len(chosen[0])


def test_leave_context_out_for_one_perturbation(adata):
    (split,) = leave_context_out(
        adata, context_key="cell_type", perturbations="A", contexts=["B cells"], val_fraction=0.1, **KEYS
    )
    assert set(adata.obs["perturbation"].iloc[split.test]) == {"A"}
    train = adata.obs.iloc[split.train]
    assert {"B", "A+B"} <= set(train.loc[train["cell_type"] == "B cells", "perturbation"])
    assert len(split.val) == pytest.approx(0.1 * (2000 - len(split.test)), rel=0.1)
    assert covers(split, 2000)


def test_context_without_controls_cannot_be_held_out(adata):
    adata = adata[~((adata.obs["cell_type"] == "B cells") & (adata.obs["perturbation"] == "ctrl"))].copy()
    assert len(leave_context_out(adata, context_key="cell_type", **KEYS)) == 2
    with pytest.raises(ValueError, match="`contexts`"):
        leave_context_out(adata, context_key="cell_type", contexts=["B cells"], **KEYS)


@pytest.mark.parametrize("include", [True, False])
def test_unseen_perturbation_takes_its_combinations_along(adata, include):
    splits = unseen_perturbation(adata, n_folds=3, include_combinations=include, seed=4, **KEYS)
    held = [h for s in splits for h in s.held_out]
    assert sorted(held) == list("ABCDE")
    for split in splits:
        train, test = (set(adata.obs["perturbation"].iloc[rows]) for rows in (split.train, split.test))
        assert "ctrl" in train
        out = set(split.held_out)
        assert not any(out & set(name.split("+")) for name in train)
        assert all(out & set(name.split("+")) for name in test)
        # D+ctrl is the single perturbation D.
        assert any(len(set(name.split("+")) - {"ctrl"}) > 1 for name in test) == include
        assert covers(split, 2000) == include


def test_unseen_combination_keeps_singles_and_both_spellings_together(adata):
    splits = unseen_combination(adata, fraction=0.3, n_splits=12, **KEYS)
    seen = set()
    for split in splits:
        train, test = (set(adata.obs["perturbation"].iloc[rows]) for rows in (split.train, split.test))
        assert {"ctrl", "A", "B", "C", "D", "E", "D+ctrl"} <= train
        assert test in ({"A+B", "B+A"}, {"C+D"}, {"A+E"})
        assert set(split.held_out) == test
        seen.add(frozenset(test))
        assert covers(split, 2000)
    assert len(seen) == 3
    again = unseen_combination(adata, fraction=0.3, n_splits=12, **KEYS)
    assert all((a.test == b.test).all() for a, b in zip(splits, again, strict=True))


@pytest.fixture
def merged(adata):
    """Labels with one spelling, of treated cells."""
    names = adata.obs["perturbation"].replace({"B+A": "A+B", "D+ctrl": "D"})
    return names.where(names != "ctrl").to_numpy(dtype=object)


def test_few_cells_of_a_context_train(adata, merged):
    splits = few_shot_context(adata, context_key="cell_type", shots=[0, 3, 8], **KEYS)
    assert len(splits) == 9 and len({s.kind for s in splits}) == 3
    for name in adata.obs["cell_type"].unique():
        few = [s for s in splits if s.name.startswith(f"context={name}, ")]
        own = (adata.obs["cell_type"] == name).to_numpy() & pd.notna(merged)
        n = pd.Series(merged[own]).value_counts().sort_index()
        for split, number in zip(few, [0, 3, 8], strict=True):
            known = pd.Series(merged[np.intersect1d(split.train, np.flatnonzero(own))]).value_counts()
            assert (known == number).all() and len(known) == (len(n) if number else 0)
            # all that is not of the context trains, and the truth is the same for all numbers
            assert set(np.flatnonzero(~own)) <= set(split.train)
            assert np.array_equal(split.test, few[0].test)
            assert (pd.Series(merged[split.test]).value_counts().sort_index() == n - 8).all()
        assert set(few[1].train) < set(few[2].train)
    again = few_shot_context(adata, context_key="cell_type", shots=[3], contexts=["CD14"], n_splits=2, **KEYS)
    assert len({s.name for s in again}) == 2 and not np.array_equal(again[0].train, again[1].train)


def test_some_perturbations_of_a_context_train(adata, merged):
    few = few_shot_context(adata, context_key="cell_type", shots=[0.1, 0.5], contexts=["B cells"], **KEYS)
    context = adata.obs["cell_type"].to_numpy(str)
    for split, number in zip(few, [1, 4], strict=True):
        inside = set(pd.Series(merged[split.train[context[split.train] == "B cells"]]).dropna())
        test = set(merged[split.test])
        assert len(inside) == number and len(test) == 4 and not inside & test
        assert set(context[split.test]) == {"B cells"}
    assert set(few[0].train) < set(few[1].train) and np.array_equal(few[0].test, few[1].test)


def test_shares_of_the_rows_of_effects():
    """Without controls: one row for each perturbation of each context."""
    obs = pd.DataFrame([(f"d{i}", c) for c in "xyz" for i in range(10)], columns=["drug", "line"])
    adata = AnnData(np.zeros((30, 1)), obs=obs.set_index("drug" + obs.index.astype(str)))
    keys = {"perturbation_key": "drug", "context_key": "line", "control": None}
    few, more = few_shot_context(adata, shots=[0.2, 0.5], contexts=["y"], **keys)
    assert len(few.train) == 20 + 2 and len(more.train) == 20 + 5 and set(few.train) < set(more.train)
    np.testing.assert_array_equal(few.test, more.test)
    assert (obs["line"].to_numpy()[few.test] == "y").all() and len(few.test) == 5


def test_few_shots_need_enough_cells(adata):
    rare = np.flatnonzero((adata.obs["perturbation"] == "A") & (adata.obs["cell_type"] == "CD14"))
    adata = adata[np.setdiff1d(np.arange(2000), rare[9:])].copy()
    (split,) = few_shot_context(adata, context_key="cell_type", shots=[5], contexts=["CD14"], **KEYS)
    used = adata.obs.iloc[np.concatenate([split.train, split.test])]
    assert "A" not in set(used.loc[used["cell_type"] == "CD14", "perturbation"])
    for shots, message in (([900], "no context"), ([0.5, 3], "shares below 1"), ([], "numbers"), ([-1], "numbers")):
        with pytest.raises(ValueError, match=f"`shots`.*{message}"):
            few_shot_context(adata, context_key="cell_type", shots=shots, **KEYS)


def test_unseen_dose(adata):
    splits = unseen_dose(adata, dose_key="dose", **KEYS)
    assert [s.name for s in splits] == ["dose=0.1", "dose=1.0", "dose=10.0"]
    for split in splits:
        train, test = adata.obs.iloc[split.train], adata.obs.iloc[split.test]
        assert test["dose"].nunique() == 1
        assert not set(test["dose"]) & set(train["dose"])
        assert (train["perturbation"] == "ctrl").any() and not (test["perturbation"] == "ctrl").any()
    (split,) = unseen_dose(adata, dose_key="dose", doses=[10], perturbations=["A"], **KEYS)
    assert set(adata.obs["perturbation"].iloc[split.test]) == {"A"}
    assert (adata.obs["dose"].iloc[split.train] == 10.0).any()
    with pytest.raises(ValueError, match="`doses`"):
        unseen_dose(adata, dose_key="dose", doses=[0.0], **KEYS)


def test_held_out_cells_are_stratified(adata):
    adata.obs.loc["cell0", "perturbation"] = "rare"
    splits = held_out_cells(adata, perturbation_key="perturbation", context_key="cell_type", fraction=0.25, n_splits=2)
    for split in splits:
        assert 0 in split.train
        share = as_obs(split, adata).eq("test").groupby([adata.obs["perturbation"], adata.obs["cell_type"]]).mean()
        np.testing.assert_allclose(share.drop("rare"), 0.25, atol=0.02)
        assert covers(split, 2000)
    assert not np.array_equal(splits[0].test, splits[1].test)
    (split,) = held_out_cells(
        adata, perturbation_key="perturbation", context_key="cell_type", fraction=0.99, val_fraction=0.9
    )
    # A stratum of one cell is never held out, neither for test nor for validation.
    assert 0 in split.train


def test_split_refuses_leaks():
    with pytest.raises(ValueError, match="Leak.*share 1 rows"):
        Split([0, 1], [1, 2])
    with pytest.raises(ValueError, match="Leak.*`train` and `val`"):
        Split([0, 1], [2], [0])
    with pytest.raises(ValueError, match="Leak.*`val` and `test`"):
        Split([0, 1], [2, 3], [3])
    for train, test in (([], [1]), ([1], []), ([0, 0], [1]), ([-1], [1]), ([0.5], [1])):
        with pytest.raises(ValueError, match="`t"):
            Split(train, test)


def test_planted_label_leak_is_found():
    labels = ["ctrl", "A", "B", "A+B"]
    clean = Split([0, 2], [1, 3], held_out=("A",))
    clean.check_held_out(labels)
    for leaky in (Split([0, 1], [2, 3], held_out=("A",)), Split([0, 3], [1], held_out=("A",))):
        with pytest.raises(ValueError, match="Leak.*'A'"):
            leaky.check_held_out(labels)
    with pytest.raises(ValueError, match="Leak"):
        Split([0, 2], [1], [3], held_out=("A",)).check_held_out(labels)
    Split([0, 3], [1], held_out=("A",)).check_held_out(labels, separator=None)


def test_as_obs(adata):
    split = Split([0, 3], [1], [2])
    column = as_obs(split, adata, key_added="split")
    assert list(column[:5]) == ["train", "test", "val", "train", "unused"]
    assert adata.obs["split"].equals(column)
    with pytest.raises(ValueError, match="`key_added`"):
        as_obs(split, adata, key_added="split")
    as_obs(Split([0], [1]), adata, key_added="split", overwrite=True)
    assert adata.obs["split"].iloc[2] == "unused"
    with pytest.raises(ValueError, match="view"):
        as_obs(split, adata[:5], key_added="other")
    with pytest.raises(ValueError, match="`adata`"):
        as_obs(split, adata.obs_names[:3])
    with pytest.raises(ValueError, match="`key_added`"):
        as_obs(split, adata.obs_names, key_added="split")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (
            lambda a: leave_context_out(a, perturbation_key="drug", control="x", context_key="cell_type"),
            "perturbation_key",
        ),
        (
            lambda a: leave_context_out(a, perturbation_key="perturbation", control="x", context_key="cell_type"),
            "control",
        ),
        (lambda a: leave_context_out(a, context_key="line", **KEYS), "context_key"),
        (
            lambda a: leave_context_out(a, context_key="cell_type", perturbations=["Q"], **KEYS),
            "perturbations",
        ),
        (lambda a: leave_context_out(a, context_key="cell_type", val_fraction=1, **KEYS), "val_fraction"),
        (lambda a: unseen_perturbation(a, n_folds=6, **KEYS), "n_folds"),
        (lambda a: unseen_combination(a, fraction=0, **KEYS), "fraction"),
        (
            lambda a: unseen_combination(a[a.obs["perturbation"].isin(["ctrl", "A"])], **KEYS),
            "no combination",
        ),
        (lambda a: unseen_dose(a, dose_key="mg", **KEYS), "dose_key"),
        (lambda a: held_out_cells(a, perturbation_key="perturbation", fraction=2), "fraction"),
    ],
)
def test_errors_name_the_argument(call, word, adata):
    with pytest.raises(ValueError, match=word):
        call(adata)


def test_missing_labels_are_refused(adata):
    adata.obs.loc["cell0", "cell_type"] = np.nan
    with pytest.raises(ValueError, match="missing values"):
        leave_context_out(adata, context_key="cell_type", **KEYS)


@pytest.fixture
def network():
    rng = np.random.default_rng(0)
    genes = [f"g{i:03d}" for i in range(200)]
    edges = [
        (genes[i], genes[j])
        for i, degree in enumerate([1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 60, 80])
        for j in rng.choice(200, degree, replace=False)
    ]
    return pd.DataFrame(edges, columns=["source", "target"]), genes


def pair_set(table):
    return set(zip(table["source"], table["target"], strict=True))


def test_candidate_pairs(network):
    truth, genes = network
    truth = pd.concat([truth, truth.iloc[:3], pd.DataFrame({"source": ["g003"], "target": ["g003"]})])
    pairs = candidate_pairs(truth, genes=genes)
    assert len(pairs) == 12 * 199
    assert (pairs["source"] != pairs["target"]).all()
    known = pair_set(truth[truth["source"] != truth["target"]])
    assert pair_set(pairs[pairs["label"]]) == known
    assert set(candidate_pairs(truth)["target"]) == set(truth.to_numpy().ravel())
    with pytest.raises(ValueError, match="`truth`"):
        candidate_pairs(truth, genes=["x"])
    with pytest.raises(ValueError, match="`truth`"):
        candidate_pairs(truth.rename(columns={"target": "gene"}))


def test_edge_split(network):
    truth, genes = network
    splits = make_grn_splits(truth, kind="edge", genes=genes, regulators=genes[:13], n_splits=20)
    sides = []
    for s in splits:
        table = s.pairs.assign(part=as_obs(s.split, s.pairs.index.astype(str)).to_numpy())
        positive = table[table["label"]].groupby("source")["part"].value_counts().unstack(fill_value=0)
        known = table[table["label"]].groupby("source").size()
        for name, n in known[known > 2].items():
            n_train, n_val = int(0.67 * n), int(0.77 * n) - int(0.67 * n)
            assert tuple(positive.loc[name, ["train", "val", "test"]]) == (
                n_train,
                n_val,
                n - n_train - n_val,
            )
        two = known.index[known == 2][0]
        assert tuple(positive.loc[two, ["train", "val", "test"]]) == (1, 0, 1)
        sides.append(positive.loc[known.index[known == 1][0], "train"])
        negative = table[~table["label"] & (table["source"] == "g011")]["part"].value_counts(normalize=True)
        assert negative["train"] == pytest.approx(0.67, abs=0.02)
        # The thirteenth candidate regulator has no known edge.
        assert set(table.loc[table["source"] == "g012", "part"]) == {"unused"}
    assert 0 < sum(sides) < 20


def test_edge_balanced_split(network):
    truth, genes = network
    (s,) = make_grn_splits(truth, kind="edge_balanced", genes=genes, seed=3)
    n_positive = s.pairs["label"].sum()
    assert s.train["label"].mean() == s.val["label"].mean() == 0.5
    assert s.train["label"].sum() + s.val["label"].sum() == pytest.approx(2 / 3 * n_positive, rel=0.05)
    assert s.val["label"].sum() == pytest.approx(2 / 15 * n_positive, rel=0.1)
    assert s.test["label"].mean() == pytest.approx(s.pairs["label"].mean(), rel=0.02)
    per_tf = s.train.groupby("source")["label"].mean()
    assert (per_tf == 0.5).all()


@pytest.mark.parametrize("kind", ["unseen_tf", "unseen_target", "unseen_both"])
@pytest.mark.parametrize("disjoint", [True, False])
def test_unseen_gene_splits(network, kind, disjoint):
    truth, genes = network
    splits = make_grn_splits(truth, kind=kind, genes=genes, disjoint_genes=disjoint, n_splits=5)
    for s in splits:
        tf_shared = set(s.train["source"]) & set(s.test["source"])
        target_shared = set(s.train["target"]) & set(s.test["target"])
        assert bool(tf_shared) == (kind == "unseen_target")
        assert bool(target_shared) == (kind == "unseen_tf")
        if kind != "unseen_target":
            assert len(s.regulators) == 4
            degree = truth.groupby("source").size().sort_values()
            thirds = [set(degree.index[i : i + 4]) for i in (0, 4, 8)]
            assert [len(third & set(s.regulators)) for third in thirds] == pytest.approx([4 / 3] * 3, abs=0.7)
        if kind != "unseen_tf":
            assert len(s.targets) == pytest.approx(200 / 3, abs=2)
        if kind == "unseen_both" and disjoint:
            assert not set(s.train[["source", "target"]].to_numpy().ravel()) & {
                *s.test["source"], *s.test["target"]
            }  # fmt: skip
        if kind != "unseen_both":
            assert len(s.train) + len(s.test) == len(s.pairs)
    assert len({s.regulators + s.targets for s in splits}) == 5


def test_grn_split_refuses_a_planted_leak(network):
    pairs = candidate_pairs(network[0])
    leaked = pairs["source"].iloc[0]
    with pytest.raises(ValueError, match="Leak.*source"):
        GRNSplit(pairs, Split([0], [1]), regulators=(leaked,))
    with pytest.raises(ValueError, match="Leak.*target"):
        GRNSplit(pairs, Split([0], [1], [2]), targets=(pairs["target"].iloc[2],))


def test_grn_split_errors_and_seeds(network):
    truth, _ = network
    with pytest.raises(ValueError, match="`kind`"):
        make_grn_splits(truth, kind="random")
    with pytest.raises(ValueError, match="`fraction`"):
        make_grn_splits(truth, kind="unseen_tf", fraction=1.5)
    with pytest.raises(ValueError, match="`fraction`"):
        make_grn_splits([("A", "B")], kind="unseen_tf")
    for kind in ("edge", "edge_balanced", "unseen_both"):
        a, b = (
            make_grn_splits(truth, kind=kind, seed=7)[0],
            make_grn_splits(truth, kind=kind, seed=6, n_splits=2)[1],
        )
        assert np.array_equal(a.split.train, b.split.train) and np.array_equal(a.split.test, b.split.test)


def test_rate_of_the_regulator_predicts_seen_but_not_unseen_genes(load_dataset):
    """Regulators of a ChIP-seq network differ so much that their rate alone predicts edges of seen genes."""
    labels = load_dataset("beeline_labels", cell_line="hESC")
    area = {}
    for kind in ("edge", "unseen_target", "unseen_both"):
        ratios = []
        for s in make_grn_splits(labels.edges, kind=kind, genes=list(labels.genes), n_splits=3):
            rate = s.test["source"].map(s.train.groupby("source")["label"].mean()).fillna(0.0)
            ratios.append(average_precision_score(s.test["label"], rate) / s.test["label"].mean())
        area[kind] = np.mean(ratios)
    assert area["edge"] == pytest.approx(0.481 / 0.149, rel=0.03)
    assert area["unseen_target"] == pytest.approx(0.486 / 0.147, rel=0.05)
    assert area["unseen_both"] == pytest.approx(1.0)
