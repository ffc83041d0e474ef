"""Symbols, embeddings of genes, known edges and lists of regulators."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from pertura import priors
from pertura.data import make_grn_splits

SETS = {
    "interferon": ["STAT1", "IRF1", "ISG15"],
    "cycle": ["CDK1", "TP53", "CCNB1"],
    "both": ["STAT1", "TP53", "IRF1"],
    "other": ["CDK1", "CCNB1", "FAR"],
}
MOUSE = ["Stat1", "Irf1", "Isg15", "Cdk1", "Ccnb1", "Trp53", "Xist"]


def genes(names: list[str]) -> AnnData:
    return AnnData(np.zeros((2, len(names)), np.float32), var=pd.DataFrame(index=names))


def cosine(values: np.ndarray) -> np.ndarray:
    unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("STAT1", ["Stat1", "STAT1"], 1),
        ("Stat1", ["STAT1", "IRF1"], 0),
        ("Trp53", ["TP53"], 0),
        ("TP53", ["A", "Trp53"], 1),
        ("nothing", ["STAT1"], -1),
    ],
)
def test_symbols_match_exactly_then_without_case_then_by_other_names(name: str, known: list[str], expected: int):
    assert priors.match_genes([name], known).tolist() == [expected]


def test_aliases_come_first():
    found = priors.match_genes(["Ifnz", "STAT1"], ["STAT1", "IFNA1"], aliases={"Ifnz": "IFNA1"})
    assert found.tolist() == [1, 0]


def test_gene_sets_of_mouse_genes(caplog: pytest.LogCaptureFixture):
    adata = genes(MOUSE)
    with caplog.at_level(logging.WARNING):
        priors.gene_embeddings(adata, SETS)
    assert "1 of 7 genes" in caplog.text and "Xist" in caplog.text
    vectors = adata.varm["gene_embedding"]
    assert vectors.dtype == np.float32
    assert adata.uns["gene_embedding"]["unmatched"].tolist() == ["Xist"]
    assert not vectors[6].any()
    np.testing.assert_allclose(vectors[:6].mean(0), 0, atol=1e-6)
    assert (vectors[:6] ** 2).sum(1).mean() == pytest.approx(1, abs=1e-5)
    like = cosine(vectors)
    assert like[0, 1] > like[0, 2] > like[0, 3]  # Irf1 shares two sets with Stat1, Isg15 one, Cdk1 none


def test_all_components_keep_the_angles_of_scikit_learn_s_tf_idf():
    adata = genes([g for g in MOUSE if g != "Xist"])
    priors.gene_embeddings(adata, SETS, n_components=None)
    upper = [g.upper().replace("TRP53", "TP53") for g in adata.var_names] + ["FAR"]
    documents = [" ".join(s for s, members in SETS.items() if g in members) for g in upper]
    reference = TfidfVectorizer().fit_transform(documents).toarray()[:-1]
    expected = cosine(reference - reference.mean(0))
    np.testing.assert_allclose(cosine(adata.varm["gene_embedding"]), expected, atol=1e-5)


def test_gmt_file_table_and_dictionary_agree(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("".join("\t".join([n, "about", *g]) + "\n" for n, g in SETS.items()))
    table = pd.Series(SETS).explode().rename_axis("source").reset_index(name="target")
    found = []
    for source in (SETS, str(path), path, table):
        adata = genes(MOUSE)
        priors.gene_embeddings(adata, source, n_components=2)
        found.append(adata.varm["gene_embedding"])
    assert found[0].shape == (7, 2)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-6)


def test_vectors_of_one_s_own():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(5, 1, (4, 3)), index=["STAT1", "IRF1", "FAR", "TP53"])
    adata = genes(MOUSE)
    priors.gene_embeddings(adata, table, n_components=None, key_added="own")
    values = adata.varm["own"]
    kept = table.loc[["STAT1", "IRF1", "TP53"]].to_numpy()
    centred = kept - kept.mean(0)
    centred /= np.sqrt((centred**2).sum(1).mean())
    np.testing.assert_allclose(values[[0, 1, 5]], centred, atol=1e-5)
    assert not values[[2, 3, 4, 6]].any()
    array = np.full((7, 3), np.nan)
    array[[0, 1, 5]] = kept
    priors.gene_embeddings(adata, array, n_components=None, key_added="array")
    np.testing.assert_allclose(adata.varm["array"], values, atol=1e-6)


def test_texts():
    adata = genes(MOUSE)
    texts = {"STAT1": "interferon signal", "IRF1": "interferon factor", "CDK1": "cell cycle kinase", "ISG15": ""}
    priors.gene_embeddings(adata, texts)
    assert adata.uns["gene_embedding"]["n_matched"] == 3
    like = cosine(adata.varm["gene_embedding"])
    assert like[0, 1] > like[0, 3]
    assert not adata.varm["gene_embedding"][2].any()


def test_symbols_from_a_column():
    adata = genes([f"ENS{i}" for i in range(7)])
    adata.var["symbol"] = MOUSE
    with pytest.raises(ValueError, match="symbol_key"):
        priors.gene_embeddings(adata, SETS)
    priors.gene_embeddings(adata, SETS, symbol_key="symbol")
    assert adata.uns["gene_embedding"]["unmatched"].tolist() == ["ENS6"]
    with pytest.raises(ValueError, match="no column 'missing'"):
        priors.gene_embeddings(adata, SETS, key_added="b", symbol_key="missing")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing", {}, "neither one of"),
        (3, {}, "`source` is a int"),
        (np.zeros((3, 2)), {}, "shape"),
        (np.ones((7, 2)), {}, "are the same"),
        (pd.DataFrame({"a": ["x"]}, index=["STAT1"]), {}, "must be numbers"),
        (pd.DataFrame({"a": [1.0, 2.0]}, index=["STAT1", "STAT1"]), {}, "twice"),
        (pd.DataFrame({"a": [1.0]}, index=["STAT1"]), {}, "1 of 7 genes"),
        ({"s": ["NONE"]}, {}, "none of its genes"),
        (SETS, {"n_components": 0}, "`n_components`"),
        (SETS, {"max_set_size": 1}, "max_set_size"),
    ],
)
def test_embeddings_refuse(source: object, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        priors.gene_embeddings(genes(MOUSE), source, **options)


EDGES = pd.DataFrame(
    {"source": ["STAT1", "STAT1", "TP53", "FAR", "IRF1"], "target": ["IRF1", "ISG15", "CDK1", "IRF1", "IRF1"]}
)


def test_known_edges_are_source_by_target():
    adata = genes(MOUSE)
    priors.known_edges(adata, EDGES)
    found = adata.varp["known_edges"]
    assert sparse.issparse(found)
    expected = np.zeros((7, 7))
    expected[0, 1] = expected[0, 2] = expected[5, 3] = 1
    np.testing.assert_array_equal(found.toarray(), expected)
    about = adata.uns["known_edges"]
    assert (about["n_edges"], about["n_non_edges"], about["n_of_table"], about["n_regulators"]) == (3, 0, 5, 2)


@pytest.mark.parametrize(
    "columns", [("source_genesymbol", "target_genesymbol"), ("tf", "target"), ("TF", "Target"), ("Gene1", "Gene2")]
)
def test_forms_of_tables(columns: tuple[str, str]):
    first, second = genes(MOUSE), genes(MOUSE)
    priors.known_edges(first, EDGES)
    priors.known_edges(second, EDGES.set_axis(list(columns), axis=1).assign(mor=-1))
    priors.known_edges(second, list(zip(EDGES["source"], EDGES["target"], strict=True)), key_added="pairs")
    for key in ("known_edges", "pairs"):
        assert (first.varp["known_edges"] != second.varp[key]).nnz == 0


def test_omnipath_symbols_go_before_its_identifiers():
    table = EDGES.set_axis(["source_genesymbol", "target_genesymbol"], axis=1)
    adata = genes(MOUSE)
    priors.known_edges(adata, table.assign(source_uniprot="P1", target_uniprot="P2"))
    assert adata.varp["known_edges"].nnz == 3


def test_known_non_edges():
    adata = genes(MOUSE)
    priors.known_edges(adata, EDGES, negatives=[("Stat1", "Cdk1"), ("far", "Cdk1")])
    assert adata.varp["known_edges"][0].toarray().ravel().tolist() == [0, 1, 1, -1, 0, 0, 0]
    priors.known_edges(adata, EDGES, negatives="unlisted", key_added="all")
    full = adata.varp["all"].toarray()
    assert full[0].tolist() == [0, 1, 1, -1, -1, -1, -1]
    assert full[5].tolist() == [-1, -1, -1, 1, -1, 0, -1]
    assert not full[3].any()  # a gene that the table does not list as a source stays unknown


def test_training_pairs_of_a_split_are_known_and_no_others():
    truth = [(a, b) for a in "ABCDEF" for b in "ABCDEFGHIJKL" if (ord(a) * ord(b)) % 3 == 0]
    split = make_grn_splits(truth, kind="unseen_both", genes=list("ABCDEFGHIJKL"))[0]
    adata = genes(list("ABCDEFGHIJKL"))
    priors.known_edges(adata, split.train)
    known = adata.varp["known_edges"].tocoo()
    pairs = dict(zip(zip(adata.var_names[known.row], adata.var_names[known.col], strict=True), known.data, strict=True))
    train = split.train
    expected = {(s, t): 1 if y else -1 for s, t, y in train.itertuples(index=False)}
    assert pairs == expected
    assert not set(pairs) & set(zip(split.test["source"], split.test["target"], strict=True))


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("omnipath", {}, "neither 'trrust'"),
        (pd.DataFrame({"a": [1]}), {}, "needs columns"),
        ([("A", "B")], {}, "none of its genes"),
        ([("A", "B", "C")], {}, r"pairs \(source, target\)"),
        (EDGES, {"negatives": "all"}, "`negatives`"),
        (EDGES, {"negatives": [("STAT1", "IRF1")]}, "both an edge"),
        (EDGES.assign(label=[1, 0, 1, None, 1]), {}, "missing values"),
    ],
)
def test_edges_refuse(table: object, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        priors.known_edges(genes(MOUSE), table, **options)


def test_regulators_from_names_and_tables():
    adata = genes(MOUSE)
    priors.regulators(adata, ["TP53", "STAT1", "OTHER"])
    assert adata.var["regulator"].dtype == bool
    assert adata.var_names[adata.var["regulator"]].tolist() == ["Stat1", "Trp53"]
    priors.regulators(adata, EDGES, key_added="of_table")
    assert adata.var_names[adata.var["of_table"]].tolist() == ["Stat1", "Irf1", "Trp53"]
    with pytest.raises(ValueError, match="none of its genes"):
        priors.regulators(adata, ["A"], key_added="b")
    with pytest.raises(ValueError, match="`source`: .*'trrust'.*'dorothea'"):
        priors.regulators(adata)


def test_nothing_is_overwritten_unasked_and_all_is_saved(tmp_path):
    adata = genes(MOUSE)
    calls = {
        "gene_embedding": lambda **k: priors.gene_embeddings(adata, SETS, **k),
        "known_edges": lambda **k: priors.known_edges(adata, EDGES, **k),
        "regulator": lambda **k: priors.regulators(adata, EDGES, **k),
    }
    for key, call in calls.items():
        call()
        with pytest.raises(ValueError, match=f"'{key}' is in"):
            call()
        call(overwrite=True)
    six = adata[:, :6].copy()
    priors.gene_embeddings(six, SETS, key_added="all_matched")
    six.write_h5ad(tmp_path / "six.h5ad")
    assert len(ad.read_h5ad(tmp_path / "six.h5ad").uns["all_matched"]["unmatched"]) == 0
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(back.varm["gene_embedding"], adata.varm["gene_embedding"])
    np.testing.assert_array_equal(back.varp["known_edges"].toarray(), adata.varp["known_edges"].toarray())
    assert list(back.uns["gene_embedding"]["unmatched"]) == ["Xist"]


def test_mouse_data_and_human_resources(load_dataset):
    adata = load_dataset("beeline_mdc", ground_truth="Specific")
    load_dataset("gene_sets", collection="go_bp")
    priors.gene_embeddings(adata, "go_bp")
    assert adata.uns["gene_embedding"]["n_matched"] > 690  # 680 have the same symbol
    assert adata.varm["gene_embedding"].shape == (821, 64)
    load_dataset("biobert_mesc500")
    priors.gene_embeddings(adata, "biobert", key_added="biobert")
    assert adata.uns["biobert"]["n_matched"] >= 215
    load_dataset("trrust")
    priors.known_edges(adata, "trrust")
    priors.regulators(adata, "dorothea")
    assert adata.uns["known_edges"]["n_edges"] > 300
    assert (adata.var["regulator"] & adata.var["is_regulator"]).sum() > 80
