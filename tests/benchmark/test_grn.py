"""The benchmark of networks: what is fitted when, what a file keeps, what the summary says."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura import baseline
from pertura.benchmark import GivenNetwork, NetworkModel, Results, _grn, run_grn, summarize_grn
from pertura.benchmark import __main__ as _command
from pertura.metrics import EdgeCandidates, auprc


@pytest.fixture
def data() -> tuple[AnnData, dict[str, pd.DataFrame]]:
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(40)]
    x = rng.normal(size=(60, 40))
    edge = np.zeros((40, 40), bool)
    edge[:9, 9:] = rng.random((9, 31)) < 0.25
    x[:, 9:] += x[:, :9] @ edge[:9, 9:]
    adata = AnnData(x.astype(np.float32), var=pd.DataFrame(index=genes))
    adata.varm["gene_embedding"] = rng.normal(size=(40, 3))
    source, target = np.nonzero(edge)
    table = pd.DataFrame({"source": np.array(genes)[source], "target": np.array(genes)[target]})
    return adata, {"first": table, "second": table.iloc[::2]}


class Counting(baseline.Correlation):
    """Correlation that counts its fits."""

    def __init__(self, uses_labels: bool) -> None:
        super().__init__()
        self.uses_labels = uses_labels
        self.trains_: list[Any] = []

    def fit(self, adata: AnnData, train: pd.DataFrame | None = None) -> Counting:
        self.trains_.append(train)
        return super().fit(adata)


def test_what_uses_labels_is_fitted_per_split_and_the_rest_once(data, tmp_path):
    adata, truths = data
    models = {"once": Counting(False), "often": Counting(True)}
    out = tmp_path / "r.csv"
    found = run_grn(adata, truths, models, splits=("all", "edge", "unseen_both"), seeds=2, dataset="d", out=out)
    assert len(models["once"].trains_) == 1 and models["once"].trains_[0] is None
    assert len(models["often"].trains_) == 2 * 2 * 2
    assert all({"source", "target", "label"} <= set(t.columns) for t in models["often"].trains_)
    assert found.groupby("model").size().to_dict() == {"once": 2 * (1 + 4), "often": 8}
    again = {"once": Counting(False), "often": Counting(True)}
    kept = run_grn(adata, truths, again, splits=("all", "edge", "unseen_both"), seeds=2, dataset="d", out=out)
    assert not again["once"].trains_ and not again["often"].trains_
    pd.testing.assert_frame_equal(kept, found, check_dtype=False)
    run_grn(adata, truths, again, splits=("edge",), seeds=3, dataset="d", out=out)
    assert (len(again["once"].trains_), len(again["often"].trains_)) == (1, 2)
    with pytest.raises(ValueError, match="other settings"):
        run_grn(adata, truths, {"once": baseline.EmbeddingCosine()}, splits=("edge",), seeds=1, dataset="d", out=out)


def test_a_model_may_ask_for_some_splits_alone(data):
    model = Counting(True)
    model.splits = ("unseen_both",)
    found = run_grn(*data, {"often": model}, splits=("edge", "unseen_both"), seeds=1)
    assert len(model.trains_) == 2 and set(found["split"]) == {"unseen_both"}


def test_scores_are_those_of_the_test_pairs(data):
    from pertura.data import make_grn_splits

    adata, truths = data
    found = run_grn(adata, truths, {"r": baseline.Correlation()}, splits=("unseen_both",), seeds=[3])
    row = found.set_index("truth").loc["second"]
    test = make_grn_splits(truths["second"], kind="unseen_both", seed=3)[0].test
    c = EdgeCandidates(test["label"], baseline.Correlation().fit(adata).score(test), test["source"])
    assert row["auprc"] == auprc(c)
    assert row["density"] == c.density and row["n_edges"] == c.label.sum()
    assert row["auprc_ratio"] == pytest.approx(row["auprc"] / c.density)


def test_planted_edges_are_found_from_expression_and_names_do_not_transfer(data):
    adata, truths = data
    models = {"correlation": baseline.Correlation(), "one-hot": baseline.OneHotLogistic()}
    table = summarize_grn(run_grn(adata, truths, models, splits=("all", "unseen_both"), seeds=4), reference="one-hot")
    table = table.set_index(["truth", "split", "model"])
    one = table.loc["first", "unseen_both", "one-hot"]
    assert one["auprc"] == pytest.approx(one["density"]) and np.isnan(one["gain"])
    own = table.loc["first", "unseen_both", "correlation"]
    assert own["auprc_ratio"] > 1.5
    assert own["gain"] == pytest.approx(own["auprc"] / one["auprc"] - 1)
    assert 0 < own["gain_low"] < own["gain"] < own["gain_high"]
    assert own["n_splits"] == 4 and table.loc["first", "all", "correlation"]["n_splits"] == 1
    assert ("first", "all", "one-hot") not in table.index


def test_gains_are_paired():
    rng = np.random.default_rng(0)
    split = rng.normal(1, 0.3, 10)  # splits differ much, the models by 10 % in each
    rows = [
        {
            "dataset": "",
            "truth": "t",
            "split": "edge",
            "seed": s,
            "model": m,
            "auprc": f * v,
            "density": 0.1,
            "seconds": 0,
        }
        for s, v in enumerate(split)
        for m, f in (("a", 1.0), ("b", 1.1))
    ]
    table = pd.DataFrame(rows).assign(**dict.fromkeys(("auprc_ratio", "epr", "hit_at", "auroc", "macro_auprc"), 1.0))
    row = summarize_grn(table, reference="a").set_index("model").loc["b"]
    np.testing.assert_allclose(row[["gain", "gain_low", "gain_high"]].astype(float), 0.1)


def test_a_model_gets_training_pairs_as_known_edges_and_nothing_else(data, monkeypatch):
    adata, truths = data
    seen = {}

    class Fake:
        def __init__(self, adata: AnnData, **options: Any) -> None:
            seen.update(options, known=adata.varp[options["edges_key"]])

        @classmethod
        def setup_anndata(cls, adata: AnnData) -> None:
            pass

        def train(self, **options: Any) -> None:
            seen["train"] = options

        def get_grn(self, key_added: str | None) -> pd.DataFrame:
            return pd.DataFrame({"source": ["g0", "g1"], "target": ["g9", "g9"], "weight": [-2.0, 1.0]})

    monkeypatch.setattr("pertura.model.Fake", Fake, raising=False)
    model = NetworkModel("Fake", edges=True, train={"max_epochs": 3}, prior="embedding+edges")
    train = pd.DataFrame({"source": ["g0", "g1"], "target": ["g9", "g9"], "label": [True, False]})
    model.fit(adata, train)
    assert seen["prior"] == "embedding+edges" and seen["train"]["max_epochs"] == 3
    known = seen["known"].toarray()
    assert known[0, 9] == 1 and known[1, 9] == -1 and np.count_nonzero(known) == 2
    assert not adata.varp.keys()
    asked = pd.DataFrame({"source": ["g0", "g1", "g2"], "target": ["g9", "g9", "g9"]})
    assert model.score(asked).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="`train` is missing"):
        model.fit(adata)


def test_fits_with_other_seeds_are_averaged(data, monkeypatch, tmp_path):
    """Each seed gives another network; the table has the mean of their scores, and how far they differ."""

    def fit(self, adata, train=None):
        fits.append(self.seed)
        self.network_ = networks[self.seed]
        return self

    adata, truths = data
    fits, rng = [], np.random.default_rng(0)
    pairs = pd.MultiIndex.from_product([adata.var_names, adata.var_names], names=["source", "target"])
    networks = [GivenNetwork(pairs.to_frame(index=False).assign(weight=rng.normal(size=len(pairs)))) for _ in range(3)]
    monkeypatch.setattr(NetworkModel, "fit", fit)
    models = {"random": NetworkModel("InfoSEM"), "r": baseline.Correlation()}
    more = {"model_seeds": 3, "splits": ("all", "edge"), "seeds": 2, "out": tmp_path / "fits.csv"}
    found = run_grn(adata, truths, models, **more)
    assert sorted(fits) == [0, 1, 2] and set(found["model"]) == {"random", "r"}
    apart = [run_grn(adata, truths, {"one": n}, splits=("all",))["auprc_ratio"] for n in networks]
    row = found[(found["model"] == "random") & (found["split"] == "all")]
    assert np.allclose(row["auprc_ratio"], np.mean(apart, axis=0)) and np.allclose(
        row["model_sd"], np.std(apart, axis=0, ddof=1)
    )
    table = summarize_grn(found, reference="r").set_index(["truth", "model", "split"])
    assert (
        table.loc[("first", "random", "edge"), "model_sd"] > 0
        and (table.xs("random", level="model")["n_splits"] <= 2).all()
    )
    run_grn(adata, truths, models, **more)
    assert len(fits) == 3  # what is in the file is not run again
    assert "model_sd" not in summarize_grn(run_grn(adata, truths, {"r": baseline.Correlation()}, splits=("all",)))


def test_splits_without_a_known_edge_are_left_out(data, caplog):
    """Few edges: some draws hold out pairs of genes of which none is known."""
    adata, truths = data
    few = {"few": truths["first"].groupby("source").head(1)}
    found = run_grn(adata, few, {"r": baseline.Correlation()}, splits=("unseen_both",), seeds=12)
    assert 0 < len(found) < 12 and (found["n_edges"] > 0).all()
    assert "no known edge among the test pairs" in caplog.text


def test_a_given_network_is_scored_like_the_table(data):
    from pertura.metrics import score_network

    adata, truths = data
    correlation = baseline.Correlation().fit(adata)
    matrix = pd.DataFrame(correlation.weight_, adata.var_names, adata.var_names)
    edges = matrix.rename_axis("source").reset_index().melt("source", var_name="target", value_name="weight")
    edges["weight"] *= np.where(np.arange(len(edges)) % 2, -1, 1)  # signs do not matter
    found = run_grn(adata, truths, {"mine": GivenNetwork(edges)}, splits=("all",)).set_index("truth")
    assert found.loc["first", "auprc"] == pytest.approx(score_network(edges, truths["first"])["auprc"])
    with pytest.raises(ValueError, match="lacks the columns"):
        GivenNetwork(edges.drop(columns="weight"))
    with pytest.raises(ValueError, match="twice"):
        GivenNetwork(pd.concat([edges, edges]))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"splits": ("unseen",)}, "`splits`"), ({"models": {}}, "at least one"), ({"truths": {}}, "at least one")],
)
def test_refuses(data, change: dict, message: str):
    adata, truths = data
    with pytest.raises(ValueError, match=message):
        run_grn(**({"adata": adata, "truths": truths, "models": {"a": baseline.Correlation()}} | change))


def test_a_file_of_something_else_is_refused(data, tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no benchmark result"):
        run_grn(*data, {"a": baseline.Correlation()}, out=path)
    with pytest.raises(ValueError, match="lacks the columns"):
        summarize_grn(pd.DataFrame({"auprc": [1.0]}))


def test_command_line(data, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_command, "network_data", lambda name, embedding: data)
    out = tmp_path / "grn.csv"
    command = ["grn", "--models", "correlation", "one-hot LR", "embedding cosine", "--seeds", "2", "--out", str(out)]
    assert _command.main(command) == 0
    printed = capsys.readouterr().out
    assert "unseen_both" in printed and "embedding cosine" in printed and "gain" in printed
    assert len(Results(out).select(metric="auprc")) == 2 * (2 * (1 + 8) + 8)
    with pytest.raises(SystemExit):
        _command.main(["grn", "--models", "nothing"])
    assert "none of" in capsys.readouterr().err


def test_a_network_is_scored_by_what_orders_it():
    edges = pd.DataFrame({"source": ["a", "b"], "target": "c", "weight": [0.1, -3.0], "proba": [0.9, 0.2]})
    pairs = edges[["source", "target"]]
    assert GivenNetwork(edges).score(pairs).tolist() == [0.9, 0.2]
    assert GivenNetwork(edges.iloc[::-1]).score(pairs).tolist() == [0.1, 3.0]


def test_expression_of_which_the_truth_is_known(load_dataset):
    adata, truths = _grn.network_data("simulated")
    assert "gene_embedding" not in adata.varm and set(truths["planted"]["source"]) <= set(
        adata.var_names[adata.var["is_regulator"]]
    )
    controls, truths = _grn.network_data("simulated_controls")
    assert (
        controls.shape == (1000, 100)
        and set(controls.obs["perturbation"]) == {"control"}
        and len(truths["planted"]) > 100
    )
    scorers = _grn.grn_models()
    assert not _grn.needs_embedding(scorers["InfoSEM none"]) and not _grn.needs_embedding(scorers["CLR"])
    assert _grn.needs_embedding(scorers["InfoSEM B"]) and _grn.needs_embedding(scorers["embedding cosine"])
    with pytest.raises(ValueError, match="`name`"):
        _grn.network_data("unknown")
    load_dataset("trrust"), load_dataset("dorothea"), load_dataset("gene_sets", collection="go_bp")
    adata, truths = _grn.network_data("kang")
    assert set(adata.obs["condition"]) == {"ctrl"} and "gene_embedding" in adata.varm
    for truth in truths.values():
        assert len(truth) > 50 and set(truth["source"]) <= set(adata.var_names[adata.var["is_regulator"]])


def test_the_data_of_the_command_line(load_dataset):
    load_dataset("beeline_mdc"), load_dataset("gene_sets", collection="go_bp"), load_dataset("biobert_mesc500")
    expected = {"STRING": 4815, "Specific": 756, "Non-specific": 3067}
    if find_spec("pyarrow"):
        load_dataset("motif_network")
        expected["motif"] = 14060
    adata, truths = _grn.network_data()
    assert {name: len(t) for name, t in truths.items()} == expected
    assert adata.varm["gene_embedding"].shape == (821, 64)
    regulators = set(adata.var_names[adata.var["is_regulator"]])
    assert all(set(t["source"]) <= regulators for t in truths.values())
    small, fewer = _grn.beeline_data("biobert")
    assert small.n_vars == 216 and small.uns["gene_embedding"]["unmatched"].size == 0
    counts = {name: len(t) for name, t in fewer.items() if name != "motif"}
    assert counts == {"STRING": 1335, "Specific": 126, "Non-specific": 756}
