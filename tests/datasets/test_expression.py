"""Loaders of expression data, on the very files that users download."""

from __future__ import annotations

import hashlib
from importlib import resources

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from scipy import sparse
from scipy.stats import norm

from pertura import datasets
from pertura.datasets import _drugs, _signatures, _stimulation, registry
from pertura.datasets._catalog import CATALOG
from pertura.datasets._common import edges_to_csr
from pertura.datasets._crispr import _combination

COUNTS = ["papalexi_2021", "kang_2018_mini", "kang_2018_wide"]
NO_COUNTS = {
    "norman_mcfaline_mini": "log1p",
    "lincs_l1000_ht115": "log2",
    "tggates_hepatocytes": "log2",
    "beeline_mdc": "log",
    "beeline_curated": "arbitrary",
    "sachs_2005": "log",
}
SHAPES = {
    "papalexi_2021": (20729, 299),
    "kang_2018_mini": (1556, 1267),
    "kang_2018_wide": (2000, 9015),
    "norman_mcfaline_mini": (5961, 500),
    "lincs_l1000_ht115": (681, 978),
    "tggates_hepatocytes": (2382, 196),
    "beeline_mdc": (383, 821),
    "beeline_curated": (2000, 19),
    "sachs_2005": (7466, 11),
}


def _dense(x) -> np.ndarray:
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


@pytest.mark.parametrize("name", SHAPES)
def test_common_structure(load_dataset, name: str) -> None:
    adata = load_dataset(name)
    assert adata.shape == SHAPES[name]
    assert adata.X.dtype == np.float32
    assert np.isfinite(_dense(adata.X)).all()
    for names in (adata.obs_names, adata.var_names):
        assert names.is_unique
        assert names.name is None
    record = adata.uns["dataset"]
    main = next(entry for entry in registry().values() if entry.url == record["url"])
    assert (record["licence"], record["origin"]) == (main.licence, main.origin)
    assert "doi:10." in record["citation"]
    assert record["scale"] == NO_COUNTS.get(name, "counts")
    if "perturbation_key" in record:
        labels = adata.obs[record["perturbation_key"]]
        assert labels.notna().all()
        assert record["control"] in labels.cat.categories
    for key in ("dose_key", "context_key"):
        if key in record:
            assert adata.obs[record[key]].notna().all()


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_normalised_x(load_dataset, name: str) -> None:
    adata = load_dataset(name)
    counts = adata.layers["counts"]
    assert isinstance(counts, sparse.csr_matrix)
    assert isinstance(adata.X, sparse.csr_matrix)
    assert counts.data.min() >= 1
    assert np.array_equal(counts.data, np.round(counts.data))
    total = np.asarray(counts.sum(axis=1)).ravel()
    row = 17
    expected = np.log1p(1e4 * counts[row].toarray() / total[row])
    np.testing.assert_allclose(adata.X[row].toarray(), expected, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(adata.X.expm1().sum(axis=1)).ravel(), 1e4, rtol=1e-4)


@pytest.mark.parametrize("name", NO_COUNTS)
def test_sources_without_counts_pretend_none(load_dataset, name: str) -> None:
    adata = load_dataset(name)
    assert [layer for layer in adata.layers if layer is not None] == []
    assert not np.array_equal(_dense(adata.X), np.round(_dense(adata.X)))


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(load_dataset, name: str, tmp_path) -> None:
    adata = load_dataset(name)
    adata.write_h5ad(tmp_path / "data.h5ad")
    read = read_h5ad(tmp_path / "data.h5ad")
    np.testing.assert_array_equal(_dense(read.X), _dense(adata.X))
    pd.testing.assert_frame_equal(
        read.obs, adata.obs, check_dtype=False, check_categorical=False, check_index_type=False
    )
    pd.testing.assert_frame_equal(
        read.var, adata.var, check_dtype=False, check_categorical=False, check_index_type=False
    )
    assert dict(read.uns["dataset"]) == adata.uns["dataset"]
    for layer in (layer for layer in adata.layers if layer is not None):
        assert (read.layers[layer] != adata.layers[layer]).nnz == 0
    for key in adata.varp:
        assert (read.varp[key] != adata.varp[key]).nnz == 0
    if "ground_truth" in adata.uns:
        truth = read.uns["ground_truth"].reset_index(drop=True)
        pd.testing.assert_frame_equal(truth, adata.uns["ground_truth"], check_dtype=False)


# Papalexi


def test_papalexi_labels(load_dataset) -> None:
    adata = load_dataset("papalexi_2021")
    assert adata.obs["confident"].sum() == 16093
    assert set(adata.obs["confident"].unique()) == {True, False}
    # 25 targets and control; the study left out the cells with a gRNA against CD274
    assert len(adata.obs["perturbation"].cat.categories) == adata.obs["perturbation"].nunique() == 26
    assert len(adata.obs["gRNA"].cat.categories) == adata.obs["gRNA"].nunique() == 110 - 3
    assert adata.obs["replicate"].value_counts().to_dict() == {"rep_1": 9428, "rep_2": 6001, "rep_3": 5300}
    is_control = adata.obs["perturbation"] == "control"
    pd.testing.assert_series_equal(is_control, adata.obs["gRNA"].str.startswith("NTg"), check_names=False)
    assert (adata.obs.loc[adata.obs["gRNA"] == "STAT2g2", "perturbation"] == "STAT2").all()


def test_papalexi_knock_outs_lower_their_targets(load_dataset) -> None:
    adata = load_dataset("papalexi_2021")
    adata = adata[adata.obs["confident"]]
    label, x = adata.obs["perturbation"].to_numpy(), adata.X
    # genes that are both targeted and measured; a shift of the labels by one cell would break this
    targets = [gene for gene in adata.obs["perturbation"].cat.categories if gene in adata.var_names]
    fold = {
        gene: x[label == gene, adata.var_names.get_loc(gene)].mean()
        / x[label == "control", adata.var_names.get_loc(gene)].mean()
        for gene in targets
    }
    assert len(fold) == 9
    assert max(fold.values()) < 0.9
    assert min(fold, key=fold.get) == "JAK2" and fold["JAK2"] < 0.4


@pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning")  # mudata 0.3 announces what 0.4 does
def test_papalexi_mudata(load_dataset, tmp_path) -> None:
    import mudata

    mdata = load_dataset("papalexi_2021", as_mudata=True)
    rna, grna = mdata["rna"], mdata["grna"]
    assert (rna.shape, grna.shape) == ((20729, 299), (20729, 110))
    assert sparse.issparse(grna.X) and grna.X.data.min() >= 1
    assert (grna.var["target"] == "control").sum() == 9
    assert set(grna.var["target"]) - set(rna.obs["perturbation"]) == {"CD274"}
    assert mdata.obs["perturbation"].tolist() == rna.obs["perturbation"].tolist()
    mdata.write_h5mu(tmp_path / "data.h5mu")
    read = mudata.read_h5mu(tmp_path / "data.h5mu")
    assert (read["grna"].X != grna.X).nnz == 0
    assert read.obs["gRNA"].tolist() == mdata.obs["gRNA"].tolist()
    assert dict(read.uns["dataset"]) == mdata.uns["dataset"] == rna.uns["dataset"]


# Norman and McFaline-Figueroa


def test_norman_labels(load_dataset) -> None:
    obs = load_dataset("norman_mcfaline_mini").obs
    norman = obs[obs["study"] == "norman19"]
    double = norman["perturbation"].str.contains("+", regex=False)
    assert (norman.loc[double, "perturbation"].nunique(), double.sum()) == (15, 1480)
    assert norman.loc[~double, "perturbation"].nunique() == 18 + 1
    assert set(norman["cell_type"]) == {"K562"}
    other = obs[obs["study"] == "mcfaline23"]
    assert set(other["cell_type"]) == {"A172", "T98G", "U87MG"}
    assert other["perturbation"].nunique() == 9 + 1
    assert (obs["perturbation"] == "control").sum() == 400
    assert not obs["perturbation"].str.contains("ctrl").any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("A+ctrl", "A"), ("ctrl+A", "A"), ("ctrl", "control"), ("control", "control"), ("B+A", "B+A")],
)
def test_combination_names(name: str, expected: str) -> None:
    assert _combination(name) == expected


# Kang


def test_kang_mini_labels(load_dataset) -> None:
    adata = load_dataset("kang_2018_mini")
    assert list(adata.obs["condition"].cat.categories) == ["ctrl", "stim"]
    assert adata.obs["condition"].value_counts().to_dict() == {"stim": 806, "ctrl": 750}
    assert set(adata.obs["donor"]) == {"101", "107"}
    assert adata.obs["cell_type"].nunique() == 5
    table = adata.obs.groupby(["cell_type", "donor", "condition"], observed=True).size()
    assert table["CD8 T cells", "107", "stim"] == 15
    assert adata.var["ensembl"].str.fullmatch(r"ENSG\d{11}").all()
    assert adata.obsm["X_tsne"].shape == (1556, 2)


def test_kang_mini_needs_neither_cache_nor_network(offline) -> None:
    first, second = datasets.kang_2018_mini(), datasets.kang_2018_mini()
    assert first.shape == SHAPES["kang_2018_mini"]
    first.X.data[:] = 0
    first.uns["dataset"]["name"] = "x"
    assert second.X.max() > 3
    assert second.uns["dataset"]["name"] == "kang_2018_mini"


def test_kang_mini_is_the_file_it_was() -> None:
    """The bytes are those that were compared with the source, and what is said of them lies beside them."""
    folder = resources.files("pertura.datasets") / "_files"
    content, about = (folder / "kang_2018_mini.h5ad").read_bytes(), (folder / "kang_2018_mini.md").read_text()
    source = registry()["kang_2018_mini"]
    assert hashlib.sha256(content).hexdigest() in about
    assert len(content) < 1_500_000
    assert (
        source.sha256 in about and source.url.split("/")[5] in about and "GPL-3" in source.licence and "GPL-3" in about
    )


def test_kang_mini_is_what_the_source_gives(load_dataset, without_data, tmp_path) -> None:
    try:
        source = _stimulation.read_kang_2018_mini()
    except datasets.DataNotAvailable as error:
        without_data(error)
    shipped = load_dataset("kang_2018_mini")
    pd.testing.assert_frame_equal(shipped.obs, source.obs)
    pd.testing.assert_frame_equal(shipped.var, source.var)
    for found, expected in ((shipped.X, source.X), (shipped.layers["counts"], source.layers["counts"])):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(found, part), getattr(expected, part), strict=True)
    np.testing.assert_array_equal(shipped.obsm["X_tsne"], source.obsm["X_tsne"], strict=True)
    assert shipped.uns == source.uns
    _stimulation.write_kang_2018_mini(tmp_path / "again.h5ad")
    again = read_h5ad(tmp_path / "again.h5ad")
    np.testing.assert_array_equal(again.X, source.layers["counts"].toarray())


@pytest.mark.parametrize("name", ["kang_2018_mini", "kang_2018_wide"])
def test_interferon_response_is_there(load_dataset, name: str) -> None:
    adata = load_dataset(name)
    isg15 = adata[:, "ISG15"].X.toarray().ravel()
    stimulated = (adata.obs["condition"] == "stim").to_numpy()
    assert isg15[stimulated].mean() - isg15[~stimulated].mean() > 2


def test_kang_wide_labels(load_dataset) -> None:
    adata = load_dataset("kang_2018_wide")
    assert adata.obs["condition"].value_counts().to_dict() == {"ctrl": 1000, "stim": 1000}


# Drugs


def test_lincs_labels(load_dataset) -> None:
    adata = load_dataset("lincs_l1000_ht115")
    obs = adata.obs
    control = obs["perturbation"] == "control"
    assert control.sum() == 20
    assert obs.loc[~control, "perturbation"].nunique() == 349
    assert (obs.loc[control, "dose"] == 0).all()
    assert (obs.loc[~control, "dose"] > 0).all()
    assert (obs.loc[~control, "dose"].min(), obs["dose"].max()) == (0.04, 177.6)
    assert (obs.loc[control, "smiles"] == "CS(=O)C").all()
    assert (obs.loc[control, "paired_control_index"] == obs.index[control]).all()
    assert obs["paired_control_index"].isin(obs.index[control]).all()
    assert {"DDR1", "PAX8"} <= set(adata.var_names)
    assert adata.uns["dataset"]["dose_unit"] == "uM"


def test_tggates_labels(load_dataset) -> None:
    adata = load_dataset("tggates_hepatocytes")
    obs = adata.obs
    control = obs["perturbation"] == "control"
    assert list(obs["dose_level"].cat.categories) == ["Control", "Low", "Middle", "High"]
    counts = {"Control": 670, "Low": 376, "Middle": 670, "High": 666}
    assert obs["dose_level"].value_counts().to_dict() == counts
    assert (control == (obs["dose_level"] == "Control")).all()
    assert obs["compound"].nunique() == obs.loc[~control, "perturbation"].nunique() == 146
    assert set(obs["time"]) == {2.0, 8.0, 24.0}
    assert set(obs["replicate"]) == {"1", "2"}
    assert (obs.loc[control, "dose"] == 0).all() and (obs.loc[~control, "dose"] > 0).all()
    matched = obs.loc[obs["paired_control_index"]]
    assert (matched["perturbation"] == "control").all()
    for key in ("exp_id", "time", "replicate", "compound", "batch"):
        assert matched[key].tolist() == obs[key].tolist()
    assert adata.var["probe"].str.startswith("ENSG").all()
    assert "CREBBP" in adata.var_names


def test_tggates_doses_rise_with_the_level(load_dataset) -> None:
    obs = load_dataset("tggates_hepatocytes").obs
    dose = obs.groupby(["compound", "dose_level"], observed=True)["dose"].first().unstack()
    assert (dose["Middle"] > dose["Control"]).all()
    assert (dose["High"] > dose["Middle"]).all()
    assert (dose["Middle"] > dose["Low"])[dose["Low"].notna()].all()


def test_pairs_must_name_controls() -> None:
    obs = pd.DataFrame(
        {"perturbation": ["control", "drug", "drug"], "paired_control_index": ["a", "a", "b"]},
        index=["a", "b", "c"],
    )
    with pytest.raises(ValueError, match="of 1 profiles names no control profile of the data, e.g. of 'c'"):
        _drugs._check_pairs(obs)


# BEELINE


@pytest.mark.parametrize(
    ("ground_truth", "regulators", "genes", "edges", "density"),
    [
        ("STRING", 264, 487, 4815, 0.038),
        ("Specific", 20, 448, 756, 0.085),
        ("Non-specific", 250, 643, 3067, 0.019),
    ],
)
def test_beeline_mdc(load_dataset, ground_truth, regulators, genes, edges, density) -> None:
    adata = load_dataset("beeline_mdc", ground_truth=ground_truth)
    truth = adata.uns["ground_truth"]
    assert len(truth) == edges
    assert truth["source"].nunique() == regulators
    assert len(set(truth["source"]) | set(truth["target"])) == genes
    assert edges / (regulators * genes - regulators) == pytest.approx(density, abs=5e-4)
    assert not truth.duplicated(["source", "target"]).any()
    assert (truth["source"] != truth["target"]).all()
    assert ("score" in truth) == (ground_truth == "Specific")
    assert adata.uns["dataset"]["ground_truth"] == ground_truth
    matrix = adata.varp["true_grn"]
    assert matrix.nnz == edges
    first = truth.iloc[0]
    position = adata.var_names.get_loc(first["source"]), adata.var_names.get_loc(first["target"])
    assert matrix[position] == 1
    assert adata.var.loc[truth["source"], "is_regulator"].all()
    assert set(adata.obs["time"]) == {1.0, 2.0, 4.0, 6.0}
    assert (_dense(adata.X) == 0).mean() == pytest.approx(0.217, abs=5e-4)
    assert adata.X.max() == pytest.approx(11.567, abs=1e-3)


def test_beeline_mdc_argument(load_dataset) -> None:
    assert len(load_dataset("beeline_mdc", ground_truth="NON-SPECIFIC").uns["ground_truth"]) == 3067
    with pytest.raises(ValueError, match="`ground_truth` is 'chip'; choose one of 'STRING', 'Specific'"):
        datasets.beeline_mdc("chip")


@pytest.mark.parametrize(
    ("model", "n_genes", "edges", "repressing", "trajectories"),
    [("GSD", 19, 76, 27, 2), ("HSC", 11, 26, 15, 4)],
)
def test_beeline_curated(load_dataset, model, n_genes, edges, repressing, trajectories) -> None:
    adata = load_dataset("beeline_curated", model=model)
    truth = adata.uns["ground_truth"]
    assert adata.shape == (2000, n_genes)
    assert (len(truth), (truth["weight"] == -1).sum()) == (edges, repressing)
    assert set(truth["weight"]) == {-1.0, 1.0}
    assert adata.obs["trajectory"].nunique() == trajectories
    assert adata.obs["pseudotime"].between(0, 1).all()
    assert adata.X.min() >= 0
    matrix = adata.varp["true_grn"]
    assert (matrix.nnz, matrix.sum()) == (edges, edges - 2 * repressing)


def test_beeline_curated_orientation(load_dataset) -> None:
    adata = load_dataset("beeline_curated", model="GSD")
    source, target = adata.var_names.get_loc("SOX9"), adata.var_names.get_loc("AMH")
    matrix = adata.varp["true_grn"]
    assert (matrix[source, target], matrix[target, source]) == (1, 0)


def test_sachs(load_dataset) -> None:
    """Numbers of the source; MEK is upstream of ERK, and its inhibitor raises its own phosphorylation."""
    adata = load_dataset("sachs_2005")
    n = adata.obs["perturbation"].value_counts()
    expected = {
        "control": 853,
        "akt": 911,
        "ICAM-2": 902,
        "PMA": 913,
        "b2cAMP": 707,
        "pkc": 723,
        "pip2": 810,
        "mek": 799,
    }
    assert n.to_dict() == {**expected, "LY294002": 848}
    assert set(adata.obs.loc[adata.obs["stimulus"] == "none", "perturbation"]) == {"PMA", "b2cAMP"}
    assert len(adata.uns["ground_truth"]) == adata.varp["true_grn"].nnz == 20
    at = adata.var_names.get_loc
    assert adata.varp["true_grn"][at("mek"), at("erk")] == 1 and adata.varp["true_grn"][at("erk"), at("mek")] == 0
    mean = adata.to_df().groupby(adata.obs["perturbation"], observed=True).mean()
    assert mean.loc["mek", "mek"] > mean.loc["control", "mek"] + 0.5
    assert adata.X.min() == 0.0 and adata[0, "raf"].X[0, 0] == pytest.approx(np.log(26.4))


def test_edges_of_unknown_genes_are_refused() -> None:
    edges = pd.DataFrame({"source": ["a"], "target": ["z"], "weight": [1.0]})
    with pytest.raises(ValueError, match="genes that are not in"):
        edges_to_csr(edges, pd.Index(["a", "b"]))


@pytest.mark.parametrize(
    ("cell_line", "genes", "regulators", "edges", "density"),
    [("hESC", 910, 34, 4545, 0.164), ("mESC", 1120, 88, 29613, 0.345), ("hHEP", 948, 30, 9939, 0.379)],
)
def test_beeline_labels(load_dataset, cell_line, genes, regulators, edges, density) -> None:
    labels = load_dataset("beeline_labels", cell_line=cell_line)
    assert (len(labels.genes), len(labels.edges)) == (genes, edges)
    assert labels.edges["source"].nunique() == regulators
    assert labels.density == pytest.approx(density, abs=6e-4)
    assert labels.edges["source"].isin(labels.regulators).all()
    assert labels.edges["target"].isin(labels.genes).all()
    assert labels.edges.attrs["dataset"]["cell_line"] == cell_line


@pytest.mark.parametrize("loader", [datasets.beeline_labels, datasets.beeline_curated])
def test_beeline_unknown_set(loader) -> None:
    with pytest.raises(ValueError, match="is 'mDC'; choose one of"):
        loader("mDC")


def test_loaders_give_new_objects(load_dataset) -> None:
    load_dataset("beeline_curated")  # skips without the file
    first, second = datasets.beeline_curated(), datasets.beeline_curated()
    first.X[:] = 0
    first.uns["dataset"]["name"] = "x"
    assert isinstance(second, AnnData)
    assert second.X.max() > 3
    assert second.uns["dataset"]["name"] == "beeline_curated"


SIGNATURES = ["op3_2023", "tahoe_2025", "sciplex_2020"]  # read in ten seconds to two minutes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SIGNATURES else ()) for name in CATALOG]
)
def test_the_catalog_is_true(load_dataset, name: str) -> None:
    entry, adata = CATALOG[name], load_dataset(name)
    assert adata.shape == (entry.rows, entry.genes)
    keys = dict(entry.keys)
    assert keys.pop("layer", "counts") in {*adata.layers, "counts"}
    if keys:
        about = {name: keys.pop(name) for name in ("control", "values", "delimiter") if name in keys}
        if "control" in about:
            assert about["control"] in set(adata.obs[keys["perturbation_key"]])
        else:
            assert about["values"] == "effects" and not adata.obs[keys["perturbation_key"]].str.contains(r"\|").any()
        assert set(keys.values()) <= set(adata.obs)
        record = adata.uns["dataset"]
        assert {key: record[key] for key in keys if key in record} == {k: v for k, v in keys.items() if k in record}


def test_rankings_become_normal_scores(tmp_path, monkeypatch) -> None:
    """Files of ranked genes: the first is the most up, genes without a rank are 0, rare genes are left out."""
    rankings = {
        ("x", "A"): np.array(["g1", "g2", "g3", "g4"]),
        ("x", "(+)-B"): np.array(["g4", "g3", "g2", "g1"]),
        ("y", "A"): np.array(["g2", "g1", "rare"]),
        ("y", "C"): np.array(["g3", "g1", "g2"]),
        ("y", "D"): np.array(["g3", "g1", "g2", "g4"]),
    }
    adata = _signatures._normal_scores(rankings, {"name": "made"})
    assert list(adata.var_names) == ["g1", "g2", "g3", "g4"][: adata.n_vars] and "rare" not in adata.var_names
    assert list(adata.obs["perturbation"]) == ["A", "(+)-B", "A", "C", "D"]
    assert list(adata.obs["cell_type"]) == ["x", "x", "y", "y", "y"]
    quarter = norm.isf([0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(adata[:, ["g1", "g2", "g3"]].X[:2], [quarter[:3], quarter[::-1][:3]], rtol=1e-5)
    third = norm.isf(np.array([0.5, 1.5, 2.5]) / 3)
    np.testing.assert_allclose(adata[2, ["g2", "g1", "g3"]].X.ravel(), [third[0], third[1], 0.0], rtol=1e-5)


@pytest.mark.slow
def test_op3_is_what_the_source_ranks(load_dataset) -> None:
    adata = load_dataset("op3_2023")
    assert adata.obs["cell_type"].value_counts().to_dict() == dict.fromkeys(["B cells", "NK cells", "T cells"], 135)
    x = np.sort(adata.X, axis=1)
    np.testing.assert_allclose(x, np.repeat(x[:1], len(x), axis=0))  # every condition ranks all genes
    profiles = {c: adata.X[adata.obs["cell_type"] == c] for c in ("B cells", "T cells")}
    r = [np.corrcoef(*one)[0, 1] for one in zip(*profiles.values(), strict=True)]
    assert np.mean(r) == pytest.approx(0.285, abs=0.005)
    again = datasets.op3_2023()  # from the cache
    np.testing.assert_array_equal(again.X, adata.X)
    assert dict(again.uns["dataset"]) == dict(adata.uns["dataset"])
