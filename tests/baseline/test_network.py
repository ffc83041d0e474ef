"""Scores of pairs from expression, labels and embeddings, each with what it can and cannot know."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from pertura import baseline
from pertura.data import candidate_pairs, make_grn_splits
from pertura.metrics import EdgeCandidates, auprc, auroc

GENES = [f"g{i}" for i in range(12)]


@pytest.fixture
def chain() -> AnnData:
    """g0 and g1 drive g2; g3 follows g2; the rest is noise. g11 does not vary."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12))
    x[:, 2] = x[:, 0] - x[:, 1] + 0.3 * x[:, 2]
    x[:, 3] = x[:, 2] + 0.3 * x[:, 3]
    x[:, 11] = 1
    adata = AnnData(x.astype(np.float32), var=pd.DataFrame(index=GENES))
    adata.var["tf"] = np.arange(12) < 4
    adata.varm["h"] = rng.normal(size=(12, 4))
    return adata


def every(adata: AnnData) -> pd.DataFrame:
    return candidate_pairs([("g0", "g2"), ("g1", "g2"), ("g2", "g3")], genes=GENES)


def test_correlation_is_numpy_s(chain: AnnData):
    pairs = every(chain)
    found = baseline.Correlation().fit(chain).score(pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        reference = np.nan_to_num(np.abs(np.corrcoef(chain.X.T)))
    at = [pairs[c].str[1:].astype(int) for c in ("source", "target")]
    np.testing.assert_allclose(found, reference[at[0], at[1]], atol=1e-5)
    chain.layers["s"] = sparse.csr_matrix(chain.X)
    np.testing.assert_allclose(baseline.Correlation(layer="s").fit(chain).score(pairs), found, atol=1e-6)


def test_other_correlations(chain: AnnData):
    """Given the rest, g0 and g3 are not correlated; what all genes of a cell share is taken away; CLR is symmetric."""
    plain, partial = (baseline.Correlation(kind=k).fit(chain).weight_ for k in ("pearson", "partial"))
    assert plain[0, 3] > 0.5 and partial[0, 3] < 0.6 * plain[0, 3] and partial[2, 3] > 0.5
    clr = baseline.Correlation(kind="clr").fit(chain).weight_
    np.testing.assert_allclose(clr, clr.T)
    assert clr[2, 3] == clr.max() and not clr[:, 11].any()
    shifted = chain.copy()
    shifted.X += 20 * np.random.default_rng(0).normal(size=(400, 1)).astype(np.float32) * chain.X.std(0)
    found = [baseline.Correlation(center_cells=c).fit(shifted).weight_[4:11, 4:11] for c in (False, True)]
    off = ~np.eye(7, dtype=bool)
    assert found[0][off].min() > 0.9 and found[1][off].max() < 0.5
    assert not baseline.Correlation(center_cells=True).fit(shifted).weight_[11].any(), "what does not vary stays so"
    with pytest.raises(ValueError, match="`kind`"):
        baseline.Correlation(kind="other")


@pytest.mark.parametrize("method", ["extra_trees", "random_forest"])
def test_trees_find_direct_regulators(chain: AnnData, method: str):
    model = baseline.TreeEnsemble(regulators=["g0", "g1", "g4"], method=method, n_estimators=20).fit(chain)
    pairs = pd.DataFrame({"source": ["g0", "g1", "g4"], "target": ["g2", "g2", "g2"]})
    found = model.score(pairs)
    assert found[:2].min() > 3 * found[2]
    again = baseline.TreeEnsemble(regulators=["g0", "g1", "g4"], method=method, n_estimators=20).fit(chain)
    np.testing.assert_array_equal(again.score(pairs), found)
    # a gene does not explain itself; together the regulators explain the variance, which is 1 (about that of a bootstrap sample)
    assert model.score(pd.DataFrame({"source": ["g0"], "target": ["g0"]})) == 0
    assert 0.9 < model.weight_.sum(0)[:11].min() and model.weight_.sum(0).max() < 1.1


def test_regulators_of_trees_from_a_column(chain: AnnData):
    model = baseline.TreeEnsemble(regulators="tf", n_estimators=2).fit(chain)
    assert list(model.regulators_) == GENES[:4]
    with pytest.raises(ValueError, match="1 genes in 'source' are unknown"):
        model.score(pd.DataFrame({"source": ["g7"], "target": ["g0"]}))


def test_rates_of_seen_and_unseen_regulators():
    train = pd.DataFrame(
        {"source": list("aaab"), "target": list("wxyw"), "label": [True, False, False, True]},
    )
    model = baseline.RegulatorRate().fit(None, train)
    asked = pd.DataFrame({"source": list("abz"), "target": list("www")})
    np.testing.assert_allclose(model.score(asked), [1 / 3, 1, 1 / 2])


@pytest.fixture
def hubs() -> list[tuple[str, str]]:
    """Edges that are nothing but how many each gene has."""
    rng = np.random.default_rng(0)
    out, into = rng.normal(-1, 2, 30), rng.normal(-1, 1.5, 80)
    edge = rng.random((30, 80)) < 1 / (1 + np.exp(-(out[:, None] + into)))
    return [(f"r{i}", f"t{j}") for i, j in zip(*np.nonzero(edge), strict=True)]


def test_names_alone_explain_hubs_until_genes_are_new(hubs: list[tuple[str, str]]):
    def score(kind: str) -> tuple[float, float]:
        split = make_grn_splits(hubs, kind=kind)[0]
        test = split.test
        c = EdgeCandidates(test["label"], baseline.OneHotLogistic().fit(None, split.train).score(test))
        return auroc(c), auprc(c) / c.density

    assert score("edge")[0] > 0.8
    assert score("unseen_both") == (0.5, pytest.approx(1))


def test_embeddings_transfer_what_depends_on_them():
    rng = np.random.default_rng(1)
    names = [f"r{i}" for i in range(40)] + [f"t{i}" for i in range(80)]
    h = rng.normal(size=(120, 5))
    adata = AnnData(np.zeros((2, 120), np.float32), var=pd.DataFrame(index=names))
    adata.varm["h"] = h
    additive = h[:40, :1] + h[None, 40:, 1] > 1.5
    product = (h[:40, None] * h[None, 40:]).sum(2) > 2
    aurocs = {}
    for name, edge in (("additive", additive), ("product", product)):
        truth = [(f"r{i}", f"t{j}") for i, j in zip(*np.nonzero(edge), strict=True)]
        split = make_grn_splits(truth, kind="unseen_both", genes=names[40:] + names[:40])[0]
        test = split.test[split.test["target"].str.startswith("t")]
        for products in (False, True):
            model = baseline.EmbeddingLogistic(embedding_key="h", products=products).fit(adata, split.train)
            aurocs[name, products] = auroc(EdgeCandidates(test["label"], model.score(test)))
        cosine = baseline.EmbeddingCosine(embedding_key="h").fit(adata)
        aurocs[name, "cosine"] = auroc(EdgeCandidates(test["label"], cosine.score(test)))
    assert aurocs["additive", False] > 0.9
    assert aurocs["product", False] < 0.65 and aurocs["product", True] > 0.9 and aurocs["product", "cosine"] > 0.9


def test_cosine_is_symmetric_and_zero_without_a_vector(chain: AnnData):
    chain.varm["h"][4] = 0
    model = baseline.EmbeddingCosine(embedding_key="h").fit(chain)
    a, b, none = model.score(pd.DataFrame({"source": ["g0", "g1", "g0"], "target": ["g1", "g0", "g4"]}))
    assert a == pytest.approx(b)
    assert none == 0
    h = chain.varm["h"]
    assert a == pytest.approx(h[0] @ h[1] / np.linalg.norm(h[0]) / np.linalg.norm(h[1]))


def test_settings_are_in_the_name(chain: AnnData):
    model = baseline.EmbeddingLogistic(embedding_key="h", C=0.5)
    before = repr(model)
    assert before == "EmbeddingLogistic(C=0.5, embedding_key='h', products=False)"
    model.fit(chain, every(chain))
    assert repr(model) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a: baseline.TreeEnsemble(method="boosting"), "`method`"),
        (lambda a: baseline.TreeEnsemble(regulators="no").fit(a), "`regulators`"),
        (lambda a: baseline.TreeEnsemble(regulators=["no"]).fit(a), "`regulators`"),
        (lambda a: baseline.Correlation(layer="no").fit(a), "`layer`"),
        (lambda a: baseline.EmbeddingCosine(embedding_key="no").fit(a), "`embedding_key`"),
        (lambda a: baseline.OneHotLogistic().fit(a, None), "`train` must be"),
        (lambda a: baseline.RegulatorRate().fit(a, every(a).query("label")), "`train` needs"),
        (lambda a: baseline.Correlation().fit(a).score(pd.DataFrame({"source": ["x"], "target": ["g1"]})), "`pairs`"),
    ],
)
def test_refuses(chain: AnnData, make, message: str):
    with pytest.raises(ValueError, match=message):
        make(chain)


def test_the_labels_only_result_of_hesc(load_dataset):
    """Gene names predict seen edges as well as published deep models, and edges among new genes not at all."""
    known = load_dataset("beeline_labels", cell_line="hESC")
    found = {}
    for kind in ("edge", "unseen_both"):
        values = []
        for split in make_grn_splits(known.edges, kind=kind, genes=known.genes, n_splits=5):
            test = split.test
            score = baseline.OneHotLogistic().fit(None, split.train).score(test)
            c = EdgeCandidates(test["label"], score)
            values.append((auprc(c), auroc(c), c.density))
        found[kind] = np.mean(values, axis=0)
    assert found["edge"] == pytest.approx([0.613, 0.878, 0.149], abs=0.015)
    score, chance, prevalence = found["unseen_both"]
    assert score == pytest.approx(prevalence, abs=1e-9)
    assert chance == 0.5
