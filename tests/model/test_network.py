"""Networks of models: the edge table, what is written to an AnnData, scores; and what may not be touched."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from pertura.model.base import GeneNetwork, GRNModel

WEIGHT = np.array([[0, 3, -4, 0.5], [1, 0, 0, -2]], dtype=np.float32)
GENES = pd.Index(["R1", "R2", "a", "b"])


class Fixed(GRNModel):
    """A model that learned the network above."""

    _model_summary_string = "fixed"
    adata = None  # not registered

    def __init__(self, adata: ad.AnnData | None, **more: np.ndarray) -> None:
        self.adata, self.more, self.is_trained = adata, more, True

    def _check_if_trained(self, warn: bool, message: str) -> None:
        if not self.is_trained:
            raise RuntimeError(message)

    def _gene_network(self) -> GeneNetwork:
        return GeneNetwork(GENES[:2], GENES, WEIGHT, **self.more)


@pytest.fixture
def cells() -> ad.AnnData:
    """Genes in another order, one of them unknown to the model."""
    return ad.AnnData(np.zeros((3, 5), np.float32), var=pd.DataFrame(index=["b", "other", "a", "R2", "R1"]))


def test_edges_come_largest_first(cells):
    edges = Fixed(cells, proba=np.abs(WEIGHT) / 4, prior_mean=WEIGHT / 2).get_grn()
    assert list(edges) == ["source", "target", "weight", "proba", "prior_mean"]
    assert edges["source"].tolist() == ["R1", "R1", "R2", "R2", "R1"]
    assert edges["target"].tolist() == ["a", "R2", "b", "R1", "b"]
    np.testing.assert_array_equal(edges["weight"], [-4, 3, -2, 1, 0.5])
    np.testing.assert_array_equal(edges["proba"], [1, 0.75, 0.5, 0.25, 0.125])
    np.testing.assert_array_equal(edges["prior_mean"], [-2, 1.5, -1, 0.5, 0.25])
    assert list(Fixed(None).get_grn()) == ["source", "target", "weight"]


def test_the_order_is_that_of_the_score(cells):
    proba = 1 - np.abs(WEIGHT) / 5
    edges = Fixed(cells, proba=proba, rank_by="proba", direction="regulators").get_grn(top_k=2)
    assert edges["weight"].tolist() == [0.5, 1] and edges.attrs["direction"] == "regulators"
    assert cells.uns["grn_params"]["direction"] == "regulators"
    truth = [("R1", "b")]
    by_proba, by_weight = (
        Fixed(None, proba=proba, rank_by=by).evaluate_grn(truth, targets=["a", "b"])["auprc"]
        for by in ("proba", "weight")
    )
    assert by_proba > by_weight


def test_few_edges_are_written_unasked(cells, monkeypatch):
    monkeypatch.setattr("pertura.model.base._grn._WRITTEN_PER_GENE", 1)
    edges = Fixed(cells).get_grn()
    assert len(edges) == 5 and len(cells.uns["grn"]) == cells.varp["grn"].nnz == 4
    Fixed(cells).get_grn(min_weight=0.1)
    assert len(cells.uns["grn"]) == 5


def test_kept_edges():
    model = Fixed(None)
    assert model.get_grn(top_k=2)["weight"].tolist() == [-4, 3]
    assert model.get_grn(min_weight=1)["weight"].tolist() == [-4, 3, -2]
    assert model.get_grn(regulators=["R2"])["weight"].tolist() == [-2, 1]
    assert model.get_grn(targets=["b"], top_k=1)["weight"].tolist() == [-2]


def test_written_by_name_source_first(cells):
    edges = Fixed(cells).get_grn()
    matrix = cells.varp["grn"]
    assert matrix.format == "csr" and matrix.nnz == 5
    names = list(cells.var_names)
    assert matrix[names.index("R1"), names.index("a")] == -4
    assert matrix[names.index("a"), names.index("R1")] == 0
    pd.testing.assert_frame_equal(cells.uns["grn"].reset_index(drop=True), edges)
    assert cells.uns["grn_params"]["by"] == "pertura"


def test_written_network_survives_a_file_and_is_replaced(cells, tmp_path):
    Fixed(cells).get_grn()
    cells.write_h5ad(tmp_path / "x.h5ad")
    found = ad.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(found.varp["grn"].toarray(), cells.varp["grn"].toarray())
    pd.testing.assert_frame_equal(found.uns["grn"], cells.uns["grn"], check_dtype=False)
    Fixed(None).get_grn(adata=found, top_k=1)  # still known as pertura's own
    assert found.varp["grn"].nnz == len(found.uns["grn"]) == 1


@pytest.mark.parametrize(("slot", "key"), [("varp", "grn"), ("uns", "grn"), ("uns", "grn_params")])
def test_keys_of_the_user_are_not_overwritten(cells, slot, key):
    mine = np.ones((5, 5)) if slot == "varp" else {"mine": 1}
    getattr(cells, slot)[key] = mine
    with pytest.raises(ValueError, match="`key_added`: .*exists and was not written"):
        Fixed(cells).get_grn()
    assert getattr(cells, slot)[key] is mine or np.array_equal(getattr(cells, slot)[key], mine)
    Fixed(cells).get_grn(key_added=None)
    Fixed(cells).get_grn(key_added="other")
    assert "other" in cells.varp
    Fixed(cells).get_grn(overwrite=True)
    assert cells.varp["grn"].nnz == 5


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("top_k", 0),
        ("min_weight", -1.0),
        ("regulators", ["a"]),
        ("regulators", []),
        ("targets", ["nobody"]),
        ("adata", "file"),
        ("key_added", "a/b"),
        ("overwrite", "yes"),
    ],
)
def test_wrong_arguments(cells, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        Fixed(cells).get_grn(**{argument: value})
    assert not cells.varp and not cells.uns


def test_genes_that_the_data_lack(cells):
    with pytest.raises(ValueError, match="`adata`: 1 of the model's 4 genes are missing, e.g. .*R1"):
        Fixed(None).get_grn(adata=cells[:, :4].copy())


def test_untrained():
    model = Fixed(None)
    model.is_trained = False
    with pytest.raises(RuntimeError, match="not trained"):
        model.get_grn()
    with pytest.raises(RuntimeError, match="not trained"):
        model.evaluate_grn([("R1", "a")])


def test_scores_are_those_of_the_metrics():
    truth = pd.DataFrame({"source": ["R1", "R2", "R2"], "target": ["a", "b", "a"]})
    found = Fixed(None).evaluate_grn(truth)
    # candidates: two regulators x the four genes of the truth, no self pairs
    score, label = [3, 4, 0.5, 1, 0, 2], [0, 1, 0, 0, 1, 1]
    assert found["n_candidates"] == 6 and found["n_edges"] == 3
    assert found["auprc"] == pytest.approx(average_precision_score(label, score))
    only = Fixed(None).evaluate_grn(truth, regulators=["R2"], targets=["a", "b"])
    assert only["n_candidates"] == 2 and only["auprc"] == 1


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="`proba`"):
        GeneNetwork(GENES[:2], GENES, WEIGHT, proba=WEIGHT.T)
