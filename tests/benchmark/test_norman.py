"""Held-out pairs have members that were seen alone; held-out genes are in no training cell; controls are not shared."""

import numpy as np
import pandas as pd
import pytest

from pertura import baseline
from pertura.benchmark import Dataset, ModelSpec, norman_pairs
from pertura.benchmark._norman import pairs_split, singles_splits


@pytest.fixture
def dataset(screen):
    adata = screen.copy()
    names = sorted({m for label in adata.obs["perturbation"].unique() for m in label.split("+")} - {"control"})
    adata.uns["gene_features"] = pd.DataFrame(np.eye(len(names), 2), index=names)
    return Dataset(adata, "simulated", "perturbation", "control", layer="counts")


def test_pairs_of_seen_members_are_held_out(dataset):
    split = pairs_split(dataset, seed=3)
    train, test = set(dataset.labels[split.train]), set(dataset.labels[split.test])
    pairs = test - {"control"}
    assert pairs and all("+" in p and set(p.split("+")) <= train for p in pairs)
    assert pairs.isdisjoint(train)
    assert not set(split.train) & set(split.test) and "control" in train & test


def test_held_out_genes_are_in_no_training_cell(dataset):
    splits = singles_splits(dataset, n_folds=3)
    held = [set(dataset.labels[s.test]) - {"control"} for s in splits]
    assert sum(len(h) for h in held) == len(set().union(*held)) == 3
    for split, out in zip(splits, held, strict=True):
        members = {m for label in dataset.labels[split.train] for m in label.split("+")}
        assert members.isdisjoint(out)


def test_models_stand_beside_adding_up(dataset):
    table = norman_pairs({"Mean": ModelSpec(baseline.MeanEffect, stochastic=False)}, seeds=2, data=dataset, n_halves=5)
    table = table[table["metric"] == "pearson_effect"].set_index(["pairs", "model"])
    assert table.loc[("all", "Mean"), "n_conditions"] == 2
    assert table.loc[("all", "Mean"), "gain"] == pytest.approx(
        table.loc[("all", "Mean"), "mean"] - table.loc[("all", "Additive"), "mean"]
    )
