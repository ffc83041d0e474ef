"""InfoSEM: planted and curated networks, orientation, knock-outs, prior knowledge on genes."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from pertura.metrics import score_network
from pertura.model import InfoSEM
from pertura.train import AlternatingPlan

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
QUICK = {**QUIET, "max_epochs": 2}


def fitted(adata: ad.AnnData, train: dict | None = None, **options) -> InfoSEM:
    torch.manual_seed(0)
    model = InfoSEM(adata, **{"hidden": (16, 16), **options})
    model.train(**{**QUIET, **(train or {})})
    return model


def correlation(adata: ad.AnnData) -> pd.DataFrame:
    return pd.DataFrame(np.abs(np.corrcoef(adata.X.T)), adata.var_names, adata.var_names)


def gaussian(weight: np.ndarray, n_cells: int, rng: np.random.Generator, clamped: int | None = None) -> np.ndarray:
    """Cells of a linear structural-equation model, ``[regulator, target]``; one gene may be held at -3."""
    weight, noise = weight.copy(), rng.normal(size=(n_cells, len(weight)))
    if clamped is not None:
        weight[:, clamped] = 0.0
        noise[:, clamped] = -3.0
    return noise @ np.linalg.inv(np.eye(len(weight)) - weight)


@pytest.fixture(scope="module")
def screened_chain() -> ad.AnnData:
    """a -> b -> c (the second represses), control cells and cells in which each gene was knocked out."""
    weight = np.array([[0, 1.0, 0], [0, 0, -1.0], [0, 0, 0]])
    rng = np.random.default_rng(0)
    parts = {"control": gaussian(weight, 300, rng)}
    parts |= {gene: gaussian(weight, 150, rng, clamped=i) for i, gene in enumerate("abc")}
    x = np.concatenate(list(parts.values())).astype(np.float32)
    labels = np.repeat(list(parts), [len(v) for v in parts.values()])
    # the expression of a knocked-out gene is 0, that of others lies around 3
    return ad.AnnData(x + 3.0, obs=pd.DataFrame({"gene": labels}), var=pd.DataFrame(index=list("abc")))


@pytest.fixture(scope="module")
def chain_model(screened_chain) -> InfoSEM:
    adata = screened_chain.copy()
    InfoSEM.setup_anndata(adata, perturbation_key="gene", control="control")
    return fitted(adata, {"max_epochs": 40, "lr": 3e-3}, n_ensemble=2, augmentation=0.0)


# -- networks -------------------------------------------------------------------------------------------------------


def test_a_chain_is_recovered_with_its_direction(chain_model):
    weight = chain_model._gene_network().frame()
    size = weight.abs()
    wrong = max(size.loc[i, j] for i, j in (("b", "a"), ("c", "b"), ("c", "a"), ("a", "c")))
    assert size.loc["a", "b"] > 2 * wrong
    assert size.loc["b", "c"] > 2 * wrong
    assert weight.loc["a", "b"] > 0 > weight.loc["b", "c"]
    edges = chain_model.get_grn(top_k=2, key_added=None)
    assert set(zip(edges["source"], edges["target"], strict=True)) == {("a", "b"), ("b", "c")}


@pytest.mark.parametrize("name", ["GSD", pytest.param("HSC", marks=pytest.mark.slow)])
def test_curated_networks(load_dataset, name):
    adata = load_dataset("beeline_curated", model=name)
    InfoSEM.setup_anndata(adata)
    train = {"max_epochs": 30, "batch_size": 256, "lr": 2e-3}
    model = fitted(adata, train, n_ensemble=4, hidden=(32, 32), likelihood="normal", combine=False)
    truth = adata.uns["ground_truth"]
    found, baseline = model.evaluate_grn(truth), score_network(correlation(adata), truth)
    assert found["auprc"] > baseline["auprc"]


def test_edges_without_knock_outs_are_ordered_by_what_predicts_left_out_cells(screened_chain, tmp_path):
    """Of weights that were hardly trained, and networks in closed form; with knock-outs the weights alone count."""
    rng = np.random.default_rng(0)
    adata = ad.AnnData(gaussian(np.diag(np.full(11, 0.9), 1), 300, rng).astype(np.float32))
    adata.var_names = [f"g{i}" for i in range(12)]
    InfoSEM.setup_anndata(adata)
    truth = [(f"g{i}", f"g{i + 1}") for i in range(11)]
    model, alone = (fitted(adata, QUICK, combine=combine) for combine in (True, False))
    shares = model.network_shares_
    assert shares["weights"] < min(shares["clr"], shares["whitening"])
    assert model.evaluate_grn(truth)["auprc"] > 1.5 * alone.evaluate_grn(truth)["auprc"]
    assert model.get_grn(key_added=None)["proba"].is_monotonic_decreasing
    assert "proba" not in alone.get_grn(key_added=None)
    with torch.no_grad():  # each gene by one far away
        alone.module.network_weight.copy_(torch.eye(12).roll(6, 0))
    with pytest.warns(UserWarning, match="plain correlations"):
        alone._warn_of_weights(np.arange(300))
    model.save(tmp_path / "model")
    again = InfoSEM.load(tmp_path / "model", adata=adata)
    assert again.evaluate_grn(truth)["auprc"] == model.evaluate_grn(truth)["auprc"] and again.network_shares_ == shares
    perturbed = screened_chain.copy()
    InfoSEM.setup_anndata(perturbed, perturbation_key="gene", control="control")
    assert not InfoSEM(perturbed)._combines and InfoSEM(perturbed, controls_only=True)._combines


def test_planted_network():
    from pertura import datasets

    adata = datasets.simulate(
        n_genes=60,
        n_regulators=8,
        n_perturbations=8,
        n_cells_per_condition=20,
        n_control_cells=60,
        n_truth_cells=20,
        seed=0,
    )
    InfoSEM.setup_anndata(adata, perturbation_key="perturbation", control="control", layer="counts")
    truth = datasets.true_network(adata)
    regulators = list(truth["source"].unique())
    model = fitted(
        adata, {"max_epochs": 20, "lr": 2e-3}, n_ensemble=2, regulators=regulators, augmentation=0.0, alpha=1.0
    )
    dense = adata.copy()
    dense.X = np.asarray(adata.X.todense())
    found, baseline = model.evaluate_grn(truth), score_network(correlation(dense).loc[regulators], truth)
    assert found["auprc"] > 1.3 * baseline["auprc"]


@pytest.fixture(scope="module")
def counts_model() -> InfoSEM:
    """Counts with doses, two batches and size factors that are not the total counts."""
    from pertura import datasets

    adata = datasets.simulate(
        n_genes=30,
        n_regulators=5,
        n_perturbations=3,
        doses=[1.0, 10.0],
        combinations=0,
        n_cells_per_condition=12,
        n_control_cells=40,
        n_truth_cells=10,
        n_batches=2,
        seed=1,
    )
    total = np.asarray(adata.layers["counts"].sum(1)).ravel()
    adata.obs["size"] = total * np.random.default_rng(0).uniform(1.0, 1.4, adata.n_obs)
    keys = {"dose_key": "dose", "batch_key": "batch", "size_factor_key": "size"}
    InfoSEM.setup_anndata(adata, perturbation_key="perturbation", control="control", layer="counts", **keys)
    return fitted(adata, {"max_epochs": 10, "lr": 2e-3}, n_ensemble=2)


# -- knock-outs -----------------------------------------------------------------------------------------------------


def test_knock_outs_move_what_is_downstream(chain_model, screened_chain):
    effects = {}
    for gene in "abc":
        table = chain_model.get_perturbation_effect(gene, n_samples=4).set_index("gene")["lfc_mean"]
        measured = screened_chain[screened_chain.obs["gene"] == gene].X.mean(0)
        measured = measured - screened_chain[screened_chain.obs["gene"] == "control"].X.mean(0)
        effects[gene] = pd.DataFrame({"model": table, "measured": pd.Series(measured, list("abc"))})
    both = pd.concat(effects)
    assert np.corrcoef(both["model"], both["measured"])[0, 1] > 0.85
    assert effects["c"].loc["a", "model"] == pytest.approx(0.0, abs=0.5)


def test_own_perturbation_gives_the_own_expression(counts_model, chain_model):
    """Knocked-out cells and controls, at their own dose: counts to rounding, log1p of them exactly."""
    adata = counts_model.adata
    counts = np.asarray(adata.layers["counts"].todense())
    library = adata.obs["size"].to_numpy()[:, None]
    log = np.log1p(1e4 * counts / library)
    for label, dose in adata.obs[["perturbation", "dose"]].drop_duplicates().itertuples(index=False):
        rows = np.flatnonzero((adata.obs["perturbation"] == label) & (adata.obs["dose"] == dose))
        asked = {"indices": rows, "return_anndata": True} | ({} if label == "control" else {"dose": float(dose)})
        found = counts_model.predict_perturbation(label, scale="counts", **asked).X
        np.testing.assert_array_equal(np.rint(found), counts[rows])
        np.testing.assert_allclose(found, counts[rows], atol=2e-3)
        np.testing.assert_allclose(counts_model.predict_perturbation(label, **asked).X, log[rows], atol=1e-4)
    rows = np.flatnonzero(chain_model.adata.obs["gene"] == "b")
    found = chain_model.predict_perturbation("b", indices=rows, return_anndata=True)
    np.testing.assert_allclose(found.X, chain_model.adata.X[rows], atol=1e-4)


def test_dose_and_batch_matter(counts_model):
    name = counts_model.vocabulary.names[0]
    control = np.flatnonzero(counts_model.adata.obs["perturbation"] == "control")[:10]
    low, high = (
        counts_model.predict_perturbation(name, dose=dose, indices=control, return_anndata=True).X
        for dose in (1.0, 10.0)
    )
    own = counts_model.predict_perturbation("control", indices=control, return_anndata=True).X
    target = counts_model.gene_names.get_loc(name)
    assert (np.abs(high - own) >= np.abs(low - own))[:, target].all()
    assert np.abs(high - own)[:, target].mean() > 2 * np.abs(low - own)[:, target].mean()
    other = counts_model.adata.copy()
    other.obs["batch"] = np.roll(np.unique(other.obs["batch"]), 1)[pd.factorize(other.obs["batch"], sort=True)[0]]
    asked = {"indices": control, "return_anndata": True}
    moved = counts_model.predict_perturbation(name, dose=10.0, adata=other, **asked).X
    assert np.abs(moved - high).max() > 1e-3
    assert np.abs(counts_model.get_marginal_ll(other) - counts_model.get_marginal_ll()).max() > 0.1


@pytest.fixture(scope="module")
def undosed() -> dict[str, InfoSEM]:
    """The same cells as counts, as log1p of them, and centered: no dose was registered."""
    from pertura import datasets

    sizes = {"n_cells_per_condition": 20, "n_control_cells": 40, "n_truth_cells": 10}
    adata = datasets.simulate(n_genes=30, n_regulators=5, n_perturbations=3, seed=1, **sizes)
    counts = np.asarray(adata.layers["counts"].todense())
    log = np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32)
    models = {}
    for name, x in (("counts", counts), ("log1p", log), ("centered", log - log.mean(0))):
        own = ad.AnnData(x, obs=adata.obs.copy(), var=adata.var.copy())
        InfoSEM.setup_anndata(own, perturbation_key="perturbation", control="control")
        models[name] = fitted(own, {"max_epochs": 10, "lr": 2e-3}, n_ensemble=2)
    return models


@pytest.mark.parametrize("data", ["counts", "log1p", "centered"])
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("noise", ["own", "none"])
def test_a_knocked_out_gene_has_no_expression_left(undosed, data, seen, noise):
    """By default and at a dose of 1; a dose below leaves the other share. What is not on the gene goes along the network."""
    model = undosed[data]
    genes, known = model.gene_names, set(model.vocabulary.names)
    name = next(g for g in genes if (g in known) == seen and model.adata.X[:, genes.get_loc(g)].std() > 0.1)
    at, scale = genes.get_loc(name), "counts" if data == "counts" else "layer"
    rows = np.flatnonzero(model.adata.obs["perturbation"] == "control")
    asked = {"indices": rows, "return_anndata": True, "scale": scale, "noise": noise, "n_samples": 4}
    control = model.predict_perturbation("control", **asked)
    own = control.X
    none = model.adata.X[:, at].min() if data == "centered" else 0.0
    for options in ({}, {"dose": 1.0}, {"dose": 2.0}):
        found = model.predict_perturbation(name, **asked, **options)
        np.testing.assert_allclose(found.X[:, at], none, atol=1e-5)
        assert ("dose" in found.obs) == (options.get("dose", 1.0) != 1.0)
    less = model.predict_perturbation(name, dose=[0.3, 0.6], **asked)
    assert less.obs["dose"].tolist() == ["0.3"] * len(rows) + ["0.6"] * len(rows)
    assert set(less.obs["novelty"]) == {"new dose" if seen else "unseen with features"}
    third, two = np.split(less.X, 2)
    np.testing.assert_allclose(third[:, at] - none, 0.7 * (own[:, at] - none), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(two[:, at] - none, 0.4 * (own[:, at] - none), rtol=1e-4, atol=1e-4)
    others = np.arange(len(genes)) != at
    full = model.predict_perturbation(name, **asked)
    assert (np.abs(full.X - own)[:, others] > 1e-4).mean() > 0.5
    moved = full.obsm["X_latent"] - control.obsm["X_latent"]
    np.testing.assert_allclose(less.obsm["X_latent"][: len(rows)] - control.obsm["X_latent"], 0.3 * moved, atol=1e-4)


def test_no_expression_is_in_the_effect_table(undosed):
    """Its interval too."""
    model = undosed["counts"]
    name = model.vocabulary.names[0]
    tables = model.get_perturbation_effect(name, dose=[0.5, 1.0], n_samples=4).set_index("gene").loc[name]
    assert tables["dose"].tolist() == ["0.5", "1"]
    np.testing.assert_allclose(tables["mean_perturbed"].iloc[1], 0.0, atol=1e-5)
    assert 0.2 < tables["mean_perturbed"].iloc[0] / tables["mean_control"].iloc[0] < 1.0
    low, high = (model.predict_perturbation(name, indices=[0], return_anndata=True).layers[e] for e in ("low", "high"))
    assert low[0, model.gene_names.get_loc(name)] == 0.0 <= high[0, model.gene_names.get_loc(name)]


def test_a_knock_out_keeps_nothing_of_a_knock_down(counts_model):
    """Cells at a tenth of the dose, asked for all of it, and cells at all of it, asked for a tenth: between none and what they had."""
    adata, name = counts_model.adata, counts_model.vocabulary.names[0]
    at = counts_model.gene_names.get_loc(name)
    counts = np.asarray(adata.layers["counts"].todense())[:, at]
    for own, asked in ((1.0, 10.0), (10.0, 1.0)):
        rows = np.flatnonzero((adata.obs["perturbation"] == name) & (adata.obs["dose"] == own))
        options = {"indices": rows, "dose": asked, "scale": "counts", "return_anndata": True}
        found = counts_model.predict_perturbation(name, **options).X[:, at]
        if asked > own:
            np.testing.assert_allclose(found, 0.0, atol=1e-5)
        else:
            assert found.mean() > counts[rows].mean()


def test_effects_are_means_over_controls(counts_model):
    name = counts_model.vocabulary.names[1]
    control = np.flatnonzero(counts_model.adata.obs["perturbation"] == "control")
    asked = {"indices": control, "dose": 10.0, "n_samples": 8}
    cells = counts_model.predict_perturbation(name, return_anndata=True, **asked).X
    own = counts_model.predict_perturbation("control", return_anndata=True, indices=control, n_samples=8).X
    table = counts_model.get_perturbation_effect(name, **asked).set_index("gene")["lfc_mean"]
    np.testing.assert_allclose((cells - own).mean(0), table[counts_model.gene_names], atol=1e-4)
    # without the noise of the cell, expression is the mean of the distribution
    smooth = counts_model.predict_perturbation(name, return_anndata=True, noise="none", **asked).X
    others = counts_model.gene_names != name
    assert (smooth.std(0) < cells.std(0))[others].all() and not smooth[:, ~others].any()


def test_log_likelihood_depends_on_the_perturbation(chain_model):
    own = chain_model.get_marginal_ll(n_samples=50)
    as_controls = chain_model.adata.copy()
    as_controls.obs["gene"] = "control"
    other = chain_model.get_marginal_ll(as_controls, n_samples=50)
    treated = (chain_model.adata.obs["gene"] != "control").to_numpy()
    assert own.shape == (chain_model.adata.n_obs,) and np.isfinite(own).all()
    np.testing.assert_array_equal(own[~treated], other[~treated])
    assert np.abs(own - other)[treated].mean() > 0.5


def test_any_gene_can_be_knocked_out(screened_chain):
    adata = screened_chain[screened_chain.obs["gene"] == "control"].copy()
    InfoSEM.setup_anndata(adata)
    model = fitted(adata, QUICK)
    assert model.vocabulary.names == ()
    answer = model.predict_perturbation("b", return_anndata=True, n_samples=4)
    assert set(answer.obs["novelty"]) == {"unseen with features"}
    assert answer.obs["perturbation"].unique().tolist() == ["b"]
    assert np.abs(answer[:, "b"].X).mean() < np.abs(adata[:, "b"].X).mean()
    model.predict_perturbation("b+c", key_added="both", n_samples=4)
    assert "both" in adata.layers
    with pytest.raises(ValueError, match="'x' was not seen in training.*knocks out genes"):
        model.predict_perturbation("x")


def test_perturbations_that_are_no_genes(screened_chain):
    adata = screened_chain.copy()
    adata.obs["drug"] = adata.obs["gene"].replace({"a": "aspirin"})
    InfoSEM.setup_anndata(adata, perturbation_key="drug", control="control")
    model = fitted(adata, QUICK)
    with pytest.raises(ValueError, match="`perturbation`: 'aspirin' is not a gene of the model"):
        model.predict_perturbation("aspirin")
    model.predict_perturbation("a", indices=np.flatnonzero(adata.obs["drug"] == "control"), n_samples=4)


def test_controls_alone(screened_chain):
    """What is perturbed plays no part in the network."""
    networks = []
    for changed in (False, True):
        adata = screened_chain.copy()
        if changed:
            adata.X[(adata.obs["gene"] == "a").to_numpy()] += 5.0
        InfoSEM.setup_anndata(adata, perturbation_key="gene", control="control")
        networks.append(fitted(adata, QUICK, controls_only=True)._gene_network().weight)
    np.testing.assert_array_equal(*networks)


# -- prior knowledge on genes ---------------------------------------------------------------------------------------


@pytest.fixture
def informed(screened_chain) -> ad.AnnData:
    adata = screened_chain[screened_chain.obs["gene"] == "control"].copy()
    adata.var["regulator"] = [True, True, False]
    adata.varm["gene_embedding"] = np.array([[1.0, 0.1], [0.9, 0.0], [-1.0, 0.3]])
    adata.varp["known_edges"] = sparse.csr_matrix(([1.0, -1.0], ([0, 1], [1, 0])), shape=(3, 3))
    InfoSEM.setup_anndata(adata)
    return adata


def test_keys_and_tables_say_the_same(informed):
    by_key = fitted(informed, QUICK, prior="embedding+edges", regulators="regulator")
    edges = pd.DataFrame({"source": ["a", "b"], "target": ["b", "a"], "weight": [1, -1]})
    table = pd.DataFrame(informed.varm["gene_embedding"], informed.var_names)
    options = {"embedding_key": table.iloc[::-1], "edges_key": edges, "regulators": ["b", "a"]}
    by_table = fitted(informed, QUICK, prior="embedding+edges", **options)
    for name, value in by_key.module.state_dict().items():
        torch.testing.assert_close(by_table.module.state_dict()[name], value)
    edges = by_key.get_grn(key_added=None)
    assert list(edges) == ["source", "target", "weight", "proba"]
    assert edges["proba"].is_monotonic_decreasing
    assert set(edges["source"]) == {"a", "b"} and edges.attrs["direction"] == "regulators"
    odds = edges.set_index(["source", "target"])["proba"].map(lambda p: p / (1 - p))
    assert odds["a", "b"] > 8 * odds["a", "c"] > 8 * 8 * odds["b", "a"]
    paper = fitted(informed, QUICK, prior="embedding+edges", preset="paper").get_grn(key_added=None)
    assert list(paper) == ["source", "target", "weight", "proba", "prior_mean"]
    proba = paper.set_index(["source", "target"])["proba"]
    assert proba["a", "b"] > 0.9 and proba["b", "a"] < 0.1 and proba["a", "c"] == pytest.approx(0.5, abs=0.1)


def test_loaded_without_the_tables(informed, tmp_path):
    model = fitted(informed, QUICK, prior="embedding+edges", regulators="regulator", n_ensemble=2)
    model.save(tmp_path / "model")
    bare = ad.AnnData(informed.X.copy(), var=pd.DataFrame(index=informed.var_names))
    for data in (False, bare):
        loaded = InfoSEM.load(tmp_path / "model", adata=data, accelerator="cpu")
        pd.testing.assert_frame_equal(loaded.get_grn(key_added=None), model.get_grn(key_added=None))
    assert set(bare.varp) == set()
    loaded.get_grn()
    assert bare.varp["grn"].shape == (3, 3)
    before = loaded.module.network_weight.clone()
    loaded.train(**QUICK)
    assert not torch.equal(before, loaded.module.network_weight)


def test_saved_and_loaded_predicts_the_same(counts_model, tmp_path):
    counts_model.save(tmp_path / "model")
    loaded = InfoSEM.load(tmp_path / "model", adata=counts_model.adata.copy(), accelerator="cpu")
    answers = [
        model.get_perturbation_effect("TF1", n_samples=4, seed=1).select_dtypes("number")
        for model in (counts_model, loaded)
    ]
    pd.testing.assert_frame_equal(*answers)


def test_prior_summary(informed):
    table = fitted(informed, QUICK, prior="embedding").get_prior_summary()
    assert list(table) == ["coefficient", "se", "kept"] and list(table.index) == ["similarity"]
    for options in ({}, {"prior": "embedding", "preset": "paper"}):
        with pytest.raises(ValueError, match="no prior of the size"):
            fitted(informed, QUICK, **options).get_prior_summary()


@pytest.fixture(scope="module")
def families() -> tuple[ad.AnnData, pd.DataFrame]:
    """Genes regulate others of their family, as often down as up; embeddings say who belongs together."""
    rng = np.random.default_rng(0)
    n, family = 60, np.arange(60) % 10
    same = family[:, None] == family
    edge = np.triu(same, 1) & (rng.random((n, n)) < 0.7)
    x = gaussian(edge * rng.choice([-0.7, 0.7], (n, n)), 150, rng)
    x += 1.5 * rng.normal(size=x.shape)
    adata = ad.AnnData(x.astype(np.float32), var=pd.DataFrame(index=[f"g{i}" for i in range(n)]))
    adata.varm["gene_embedding"] = np.eye(10)[family] + 0.05 * rng.normal(size=(n, 10))
    source, target = np.nonzero(edge | edge.T)
    InfoSEM.setup_anndata(adata)
    return adata, pd.DataFrame({"source": adata.var_names[source], "target": adata.var_names[target]})


@pytest.mark.parametrize("signs", ["as they are", "flipped"])
def test_embeddings_help_whatever_the_sign_and_wrong_ones_do_no_harm(families, signs):
    adata, truth = families
    if signs == "flipped":  # half of the genes are measured with the opposite sign
        adata = adata.copy()
        adata.X[:, ::2] *= -1
        InfoSEM.setup_anndata(adata)
    wrong = adata.varm["gene_embedding"][np.random.default_rng(1).permutation(adata.n_vars)]
    wrong = pd.DataFrame(wrong, index=adata.var_names)
    train = {"max_epochs": 100, "batch_size": 50, "lr": 2e-3}
    right = fitted(adata, train, prior="embedding", combine=False)
    assert right.get_prior_summary().loc["similarity", "kept"] > 0.3
    permuted = fitted(adata, train, prior="embedding", embedding_key=wrong)
    assert permuted.get_prior_summary().loc["similarity", "kept"] < 0.3
    none = fitted(adata, {**train, "max_epochs": 50}).evaluate_grn(truth)["auprc"]
    assert right.evaluate_grn(truth)["auprc"] > 1.2 * none
    by_weight = score_network(right._gene_network().frame(), truth)["auprc"]
    assert by_weight > 1.1 * none, "the prior is one of the weights as well"
    assert permuted.evaluate_grn(truth)["auprc"] > 0.9 * none


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("regulators", "nobody", "not a column"),
        ("regulators", "text", "must be boolean"),
        ("regulators", ["x"], "none of them is a gene"),
        ("regulators", [1], "names of genes"),
        ("embedding_key", "nothing", "not in `adata.varm`"),
        ("embedding_key", pd.DataFrame({"d": ["x"]}, index=["a"]), "must be numbers"),
        ("embedding_key", pd.DataFrame({"d": [1.0, 2.0]}, index=["a", "a"]), "several rows"),
        ("embedding_key", pd.DataFrame({"d": [1.0, 2.0]}, index=["x", "y"]), "fewer than two"),
        ("embedding_key", pd.DataFrame({"d": [1.0, np.inf]}, index=["a", "b"]), "infinite"),
        ("edges_key", "nothing", "not in `adata.varp`"),
        ("edges_key", pd.DataFrame({"from": ["a"]}), "lacks the column"),
        ("edges_key", pd.DataFrame({"source": ["x"], "target": ["a"]}), "no known edge"),
    ],
)
def test_what_can_not_be_used(informed, argument, value, match):
    informed.var["text"] = "yes"
    with pytest.raises(ValueError, match=f"`{argument}.*{match}"):
        InfoSEM(informed, prior="embedding+edges", **{argument: value})


# -- settings -------------------------------------------------------------------------------------------------------


def test_presets_are_those_of_the_papers(informed):
    """Equations and schedule: one epoch of encoder and decoder, two of A, with RMSprop at 1e-4 and 2e-5 for 821 genes."""
    for preset in ("paper", "deepsem"):
        model = InfoSEM(informed, preset=preset, prior="embedding")
        module, plan = model.module, AlternatingPlan(model.module, **model._plan_defaults())
        assert module.pairs is None and module.additive and module.prior_shrinkage == 0
        assert module.alpha == pytest.approx(100 * 3 / 821), "100 for the genes that DeepSEM has"
        assert (module.noise_mean is None) == module.heteroscedastic == (preset == "paper")
        assert [plan.waits(epoch) for epoch in range(4)] == ["grn", "networks", "networks", "grn"]
        assert plan.optim is torch.optim.RMSprop and plan.optim_kwargs["lr"] == 1e-4
        rate = 1e-4 * plan.grn_lr_factor * module.lr_factors["network_"] / module.unit / 820
        assert rate == pytest.approx(2e-5, rel=0.01)
        assert model._default_max_epochs(50) == 90 and model._default_batch_size(1000) == 64
        assert model._default_max_epochs(2) == 1000, "few cells: 2,000 steps"
    assert InfoSEM(informed, preset="paper", n_steps=1, n_epochs=3)._default_max_epochs(7) == 3
    assert InfoSEM(informed)._default_max_epochs(6) == 90
    assert InfoSEM(informed, prior="embedding")._default_max_epochs(6) == 180


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper"},
        {"preset": "deepsem"},
        {"posterior": "variational"},
        {"likelihood": "normal"},
        {"z_prior": "learned"},
    ],
)
def test_settings_train_and_predict(informed, options):
    model = fitted(informed, QUICK, **options)
    assert np.isfinite(model.get_grn(key_added=None)["weight"]).all()
    assert np.isfinite(model.predict_perturbation("a", return_anndata=True, n_samples=4).X).all()
    assert np.isfinite(model.posterior_predictive_sample(n_samples=2).todense()).all()
    assert ("proba" in model.get_grn(key_added=None)) == ("preset" not in options)


def test_noise_of_its_own_size_does_not_replace_the_state():
    """Signs that cancel over the targets: noise of all of the variance is as likely as a state, until the weights are learned."""
    rng = np.random.default_rng(0)
    weight = np.triu(rng.choice([-0.5, 0, 0.5], p=[0.15, 0.7, 0.15], size=(12, 12)), 1)
    x = gaussian(weight, 256, rng).astype(np.float32)
    adata = ad.AnnData(x - x.min(0), var=pd.DataFrame(index=[f"g{i}" for i in range(12)]))
    InfoSEM.setup_anndata(adata)
    model = fitted(adata, {"max_epochs": 25, "lr": 3e-3}, preset="paper")
    assert model.module.residual_sd.mean() < 0.7 and model.module.moved()[1] > 1


def test_weights_that_hardly_moved_are_warned_of(informed):
    with pytest.warns(UserWarning, match="moved by 1"):
        fitted(informed, {"max_epochs": 1, "lr": 1e-6}, combine=False)
    with pytest.warns(UserWarning, match="shrunk to nearly 0"):
        fitted(informed, {"max_epochs": 40, "lr": 1e-2}, alpha=1e4, combine=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The weights of the network")
        fitted(informed, {"max_epochs": 40, "lr": 1e-2}, combine=False)


@pytest.mark.parametrize(("combine", "advice"), [(True, "network_shares_"), (False, "Train longer")])
def test_weights_that_explain_little_are_warned_of(informed, monkeypatch, combine, advice):
    shares = iter([0.1, 0.9])
    monkeypatch.setattr("pertura.model._infosem.explained", lambda *_: next(shares))
    with pytest.warns(UserWarning, match=f"explain 10% .* correlations 90%.*{advice}"):
        fitted(informed, {"max_epochs": 40, "lr": 1e-2}, combine=combine)


def test_direction(chain_model, informed):
    assert chain_model.get_grn(key_added=None).attrs["direction"] == "perturbations"
    model = fitted(informed, QUICK)
    assert model.get_grn().attrs["direction"] == "none"
    assert informed.uns["grn_params"]["direction"] == "none"


def test_simulated_cells_resemble_the_data(chain_model, screened_chain):
    made = chain_model.simulate(500, seed=1)
    assert made.shape == (500, 3) and list(made.var_names) == list("abc")
    again = chain_model.simulate(500, seed=1)
    np.testing.assert_array_equal(made.X, again.X)
    np.testing.assert_allclose(made.X.mean(0), screened_chain.X.mean(0), atol=1.0)
    found, expected = np.corrcoef(made.X.T), np.corrcoef(screened_chain.X.T)
    assert np.corrcoef(found[np.triu_indices(3, 1)], expected[np.triu_indices(3, 1)])[0, 1] > 0.8


def test_batches_are_taken_away(screened_chain):
    adata = screened_chain[screened_chain.obs["gene"] == "control"].copy()
    adata.obs["batch"] = np.where(np.arange(adata.n_obs) % 2, "one", "two")
    shifted = adata.copy()
    shifted.X[::2] += 4.0
    networks = []
    for data in (adata, shifted):
        InfoSEM.setup_anndata(data, batch_key="batch")
        networks.append(fitted(data, QUICK, augmentation=0.0)._gene_network().weight)
    np.testing.assert_allclose(*networks, atol=1e-4)
