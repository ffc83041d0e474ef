"""Loaders of networks, gene sets, drugs and embeddings."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pertura import datasets
from pertura.datasets import registry


def _provenance(table: pd.DataFrame, key: str) -> None:
    record = table.attrs["dataset"]
    assert record["url"] == registry()[key].url
    assert record["licence"] == registry()[key].licence
    assert "doi:10." in record["citation"]


@pytest.mark.parametrize(("resource", "pairs", "unmapped"), [("huri", 52548, 0), ("lit_bm", 11711, 1730)])
def test_ppi(load_dataset, resource: str, pairs: int, unmapped: int) -> None:
    table = load_dataset("ppi", resource=resource)
    assert (len(table), table.attrs["n_unmapped"]) == (pairs, unmapped)
    assert list(table.columns[:3]) == ["source", "target", "weight"]
    assert (table["source"] <= table["target"]).all()
    assert not table.duplicated(["source", "target"]).any()
    assert not table[["source", "target"]].isna().any(axis=None)
    assert table["source_ensembl"].str.startswith("ENSG").all()
    _provenance(table, resource)


def test_ppi_keeps_ids_with_their_symbols(load_dataset) -> None:
    table = load_dataset("ppi", resource="lit_bm")
    pair = table[(table["source"] == "NBR1") & (table["target"] == "SQSTM1")].iloc[0]
    assert (pair["source_ensembl"], pair["target_ensembl"]) == ("ENSG00000188554", "ENSG00000161011")
    assert (pair["n_publications"], pair["n_methods"], pair["n_evidences"]) == (9, 5, 9)
    huri = load_dataset("ppi", resource="huri")
    assert huri["n_screens"].between(1, 9).all()


def test_repurposing_hub(load_dataset) -> None:
    table = load_dataset("repurposing_hub")
    assert len(table) == 6798
    assert table.index.name == "perturbation"
    assert table.index.is_unique
    assert list(table.columns) == ["clinical_phase", "moa", "target", "disease_area", "indication"]
    assert table.loc["vorinostat", "moa"] == "HDAC inhibitor"
    assert "HDAC1" in table.loc["vorinostat", "target"].split("|")
    assert not table.isna().any(axis=None)
    _provenance(table, "repurposing_hub")


def test_repurposing_hub_covers_the_l1000_compounds(load_dataset) -> None:
    compounds = load_dataset("lincs_l1000_ht115").obs["perturbation"].cat.categories
    assert compounds.isin(load_dataset("repurposing_hub").index).mean() > 0.5


def test_trrust(load_dataset) -> None:
    table = load_dataset("trrust")
    assert len(table) == 8427
    assert not table.duplicated(["source", "target"]).any()
    assert (table["weight"] == 1).all()
    modes = {"unknown": 3568, "activation": 2937, "repression": 1715, "both": 207}
    assert table["mode"].value_counts().to_dict() == modes
    assert (table["n_references"] >= 1).all()
    _provenance(table, "trrust_human")


def test_trrust_signed(load_dataset) -> None:
    table = load_dataset("trrust", signed=True)
    assert table["weight"].value_counts().to_dict() == {1.0: 2937, -1.0: 1715}
    weight = table.set_index(["source", "target"])["weight"]
    assert weight["AATF", "BAX"] == -1
    assert ("AATF", "CDKN1A") not in weight.index


def test_motif_network(load_dataset) -> None:
    pytest.importorskip("pyarrow")
    table = load_dataset("motif_network")
    assert (len(table), table["source"].nunique(), table["target"].nunique()) == (2678188, 1079, 24541)
    assert not table.duplicated(["source", "target"]).any()
    _provenance(table, "motif_grn_mm10")


@pytest.mark.parametrize(("levels", "edges"), [("A", 5434), ("ABC", 13223), ("ABCDE", 454504)])
def test_dorothea(load_dataset, levels: str, edges: int) -> None:
    table = load_dataset("dorothea", levels=levels)
    assert len(table) == edges
    assert list(table.columns) == ["source", "target", "weight", "confidence"]
    assert set(table["confidence"]) == set(levels)
    assert set(table["weight"]) <= {-1.0, 1.0}
    assert not table.duplicated(["source", "target"]).any()
    _provenance(table, "dorothea_human")


@pytest.mark.parametrize("levels", ["", "F", "AF"])
def test_dorothea_levels(levels: str) -> None:
    with pytest.raises(ValueError, match=f"`levels` is '{levels}'"):
        datasets.dorothea(levels)


@pytest.mark.parametrize(
    ("collection", "sets", "members"),
    [("hallmark", 50, 7324), ("go_bp", 6036, 197596), ("coessential_modules", 1892, 38566)],
)
def test_gene_sets(load_dataset, collection: str, sets: int, members: int) -> None:
    by_name = load_dataset("gene_sets", collection=collection)
    table = load_dataset("gene_sets", collection=collection, as_frame=True)
    assert (len(by_name), sum(map(len, by_name.values()))) == (sets, members)
    assert len(table) == members
    assert table.groupby("source")["target"].agg(list).to_dict() == by_name
    assert not any(gene == "" for genes in by_name.values() for gene in genes)
    _provenance(table, collection)


def test_hallmark_interferon(load_dataset) -> None:
    genes = load_dataset("gene_sets")["HALLMARK_INTERFERON_ALPHA_RESPONSE"]
    assert {"ISG15", "MX1", "IFIT3"} <= set(genes)


def test_biobert_rows_follow_the_genes(load_dataset) -> None:
    table = load_dataset("biobert_mesc500")
    assert table.shape == (1120, 768)
    assert table.index.is_unique
    assert table.index.equals(load_dataset("beeline_labels", cell_line="mESC").genes)
    _provenance(table, "biobert_mesc500")

    # names of families (SOX2, SOX4) are close in the embedding, if and only if the rows are in order
    vectors = table.to_numpy() - table.to_numpy().mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    nearest = similarity.argmax(axis=1)
    family = table.index.str[:3].to_numpy()
    assert (family == family[nearest]).mean() > 0.5
    for shift in (-1, 1):
        shifted = np.roll(family, shift)
        assert (shifted == shifted[nearest]).mean() < 0.01


@pytest.mark.parametrize(("loader", "argument"), [(datasets.ppi, "resource"), (datasets.gene_sets, "collection")])
def test_unknown_choice(loader, argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` is 'string'; choose one of"):
        loader("string")
