"""Where results go, what may not be touched, and that scanpy reads them."""

from __future__ import annotations

import warnings
from functools import partial

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from pertura import metrics

# sums may be rounded one way or the other, depending on where in memory their terms are
equal = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


N = {"n_samples": 4}


@pytest.fixture
def written(trained, screen):
    """A foreign AnnData with one prediction, its name and the model."""
    adata, name = screen(), trained.vocabulary.names[0]
    assert trained.predict_perturbation(name, adata=adata, key_added="x", **N) is None
    return adata, name, trained


# -- slots ----------------------------------------------------------------------------------------------------------


def test_slots(written):
    adata, name, model = written
    n, n_genes = adata.shape
    for key in ("x", "x_low", "x_high"):
        assert adata.layers[key].shape == (n, n_genes)
        assert adata.layers[key].dtype == np.float32
        assert np.isfinite(adata.layers[key]).all()
    assert (adata.layers["x_low"] >= 0).all()
    assert (adata.layers["x_low"] <= adata.layers["x"] + 1e-5).all()
    assert (adata.layers["x"] <= adata.layers["x_high"] + 1e-5).all()
    answer = model.predict_perturbation(name, adata=adata, return_anndata=True, **N)
    equal(adata.layers["x"], answer.X)
    equal(adata.layers["x_low"], answer.layers["low"])
    equal(adata.obsm["X_x"], answer.obsm["X_latent"])
    basal = model.get_latent_representation(adata, **N)
    assert basal.shape == (n, adata.obsm["X_basal"].shape[1])
    equal(adata.obsm["X_basal"], basal)


def test_provenance(written):
    adata, name, model = written
    entry = adata.uns["x"]
    assert entry["by"] == "pertura"
    assert entry["model"] == type(model).__name__
    assert list(entry["perturbation"]) == [name]
    assert list(entry["novelty"]) == ["seen"]
    assert (entry["ci"], entry["n_samples"], entry["scale"], entry["seed"]) == (0.9, 4, "log1p", 0)
    assert {"pertura", "scvi-tools", "torch", "pyro-ppl", "anndata"} == set(entry["versions"])


def test_effect_table_is_the_one_asked_for(trained, screen):
    """The effects in `uns`, computed beside the cells, are those of `get_perturbation_effect`."""
    adata, name = screen(), trained.vocabulary.names[0]
    rows = np.flatnonzero(adata.obs["perturbation"] == "control")
    trained.predict_perturbation(name, adata=adata, indices=rows, key_added="x", **N)
    alone = trained.get_perturbation_effect(name, adata=adata, **N)
    assert set(alone["context"]) == set(adata.obs["cell_type"])
    for context, table in alone.groupby("context"):
        stored = sc.get.rank_genes_groups_df(adata, group=context, key="x_effect").set_index("names")
        own = table.set_index("gene").loc[stored.index]
        np.testing.assert_allclose(stored["scores"], own["lfc_mean"] / own["gene_sd"], rtol=1e-4, atol=1e-5)
        assert (own["gene_sd"] <= own["lfc_sd"] * (1 + 1e-9)).all()
        np.testing.assert_allclose(stored["logfoldchanges"], own["log2fc"], rtol=1e-4, atol=1e-4)
        assert (np.diff(stored["scores"]) <= 0).all()


def test_latent_states(trained, screen):
    adata = screen()
    basal, perturbed = (trained.get_latent_representation(adata, kind=k, **N) for k in ("basal", "perturbed"))
    control = (adata.obs["perturbation"] == "control").to_numpy()
    equal(basal[control], perturbed[control])
    assert not np.array_equal(basal[~control], perturbed[~control])


def test_rows_that_were_not_asked_are_nan(trained, screen):
    adata = screen()
    rows = [4, 2, 9]
    trained.predict_perturbation(trained.vocabulary.names[0], adata=adata, indices=rows, key_added="x", **N)
    answer = trained.predict_perturbation(
        trained.vocabulary.names[0], adata=adata, indices=rows, return_anndata=True, **N
    )
    others = np.setdiff1d(np.arange(adata.n_obs), rows)
    for slot, key, values in (
        ("layers", "x", answer.X),
        ("layers", "x_high", answer.layers["high"]),
        ("obsm", "X_x", answer.obsm["X_latent"]),
        ("obsm", "X_basal", answer.obsm["X_basal"]),
    ):
        stored = getattr(adata, slot)[key]
        assert np.isnan(stored[others]).all()
        equal(stored[rows], values)


def test_default_key_and_interval_on_request(trained, screen):
    adata, name = screen(), trained.vocabulary.names[0]
    trained.predict_perturbation(name, adata=adata, ci=None, **N)
    key = f"predicted_{name}"
    assert {key} == {k for k in adata.layers if k is not None} - {"counts"}
    assert adata.uns[key]["ci"] == ""
    assert f"{key}_effect" in adata.uns


# -- what may not be touched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slot", "key"),
    [
        ("layers", "x"),
        ("layers", "x_low"),
        ("layers", "x_high"),
        ("obsm", "X_x"),
        ("obsm", "X_basal"),
        ("uns", "x"),
        ("uns", "x_effect"),
    ],
)
def test_keys_of_the_user_are_not_overwritten(trained, screen, unchanged, slot, key):
    adata, name = screen(), trained.vocabulary.names[0]
    mine = {"by": "me"} if slot == "uns" else np.zeros((adata.n_obs, adata.n_vars))
    getattr(adata, slot)[key] = mine
    with unchanged(adata), pytest.raises(ValueError, match="`key_added`: .*exists and was not written") as raised:
        trained.predict_perturbation(name, adata=adata, key_added="x", **N)
    assert f"adata.{slot}[{key!r}]" in str(raised.value)
    assert "overwrite=True" in str(raised.value)
    trained.predict_perturbation(name, adata=adata, key_added="x", overwrite=True, **N)
    assert adata.uns["x"]["by"] == "pertura"


def test_own_results_are_replaced(written):
    """Also after the file was written and read, and without leaving what is not asked any more."""
    adata, name, model = written
    first = adata.layers["x"].copy()
    model.predict_perturbation(name, adata=adata, key_added="x", ci=None, seed=1, **N)
    assert not np.array_equal(first, adata.layers["x"])
    assert "x_low" not in adata.layers and "x_high" not in adata.layers
    model.predict_perturbation("control", adata=adata, key_added="y", **N)
    model.predict_perturbation(name, adata=adata, key_added="x", **N)
    assert {"x", "y", "x_low", "y_low"} <= set(adata.layers)
    assert "X_basal" in adata.obsm
    equal(first, adata.layers["x"])


def test_views_become_copies(trained, screen):
    """As with scanpy's functions: a view turns into data of its own, its parent is not touched."""
    adata = screen()
    before = set(adata.layers)
    view = adata[:30]
    with pytest.warns(ad.ImplicitModificationWarning):
        trained.predict_perturbation(trained.vocabulary.names[0], adata=view, key_added="x", **N)
    assert not view.is_view and "x" in view.layers
    assert set(adata.layers) == before


# -- scanpy ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_back(written, tmp_path):
    adata, name, model = written
    adata.write_h5ad(tmp_path / "x.h5ad")
    return ad.read_h5ad(tmp_path / "x.h5ad"), adata, model


def test_results_survive_a_file(read_back):
    found, adata, model = read_back
    for key in ("x", "x_low", "x_high"):
        equal(found.layers[key], adata.layers[key])
    for key in ("X_x", "X_basal"):
        equal(found.obsm[key], adata.obsm[key])
    assert found.uns["x"]["by"] == "pertura"
    assert found.uns["x"]["versions"] == adata.uns["x"]["versions"]
    for context in adata.obs["cell_type"].unique():
        tables = [sc.get.rank_genes_groups_df(a, group=context, key="x_effect") for a in (found, adata)]
        pd.testing.assert_frame_equal(*tables, check_dtype=False)
    model.predict_perturbation("control", adata=found, key_added="x", **N)  # they are still known as pertura's own


def test_table_of_scanpy(written):
    adata, *_ = written
    table = sc.get.rank_genes_groups_df(adata, group=None, key="x_effect")
    assert set(table["group"]) == set(adata.obs["cell_type"])
    assert table.groupby("group", observed=True).size().eq(adata.n_vars).all()
    assert table["pvals"].between(0, 0.5).all() and table["pvals_adj"].between(0, 0.5).all()
    for _, own in table.groupby("group", observed=True):
        by_p = own.sort_values("pvals")
        assert (np.diff(by_p["pvals_adj"]) >= -1e-9).all(), "the mean rate among the most certain rises"


@pytest.mark.parametrize(
    "plot",
    [
        "rank_genes_groups",
        "rank_genes_groups_dotplot",
        "rank_genes_groups_matrixplot",
        "rank_genes_groups_stacked_violin",
        "rank_genes_groups_heatmap",
        "rank_genes_groups_tracksplot",
        "rank_genes_groups_violin",
    ],
)
def test_plots_of_scanpy(read_back, plot):
    found, *_ = read_back
    options = {"n_genes": 3, "key": "x_effect", "show": False}
    if plot not in ("rank_genes_groups", "rank_genes_groups_violin"):
        options |= {"dendrogram": False}
    getattr(sc.pl, plot)(found, **options)
    assert plt.get_fignums()
    plt.close("all")


def test_violin_of_a_layer(read_back):
    found, *_ = read_back
    sc.pl.violin(found, found.var_names[0], groupby="cell_type", layer="x", show=False)
    assert plt.get_fignums()
    plt.close("all")


def test_without_contexts_the_perturbation_is_the_group(spec, screen):
    adata = screen()
    spec.setup(adata, context_key=None)
    model = spec.fit(spec.make(adata))
    name = model.vocabulary.names[0]
    model.predict_perturbation(name, key_added="x", **N)
    assert adata.uns["x_effect"]["names"].dtype.names == (name,)
    assert len(sc.get.rank_genes_groups_df(adata, group=name, key="x_effect")) == adata.n_vars
    assert set(model.get_perturbation_effect(name, **N)["context"]) == {"all"}
    sc.pl.rank_genes_groups_dotplot(adata, key="x_effect", n_genes=2, show=False, dendrogram=False)
    plt.close("all")


# -- lists ----------------------------------------------------------------------------------------------------------


def test_a_list_gives_one_row_per_cell_and_perturbation(trained, screen):
    adata = screen()
    names = [*trained.vocabulary.names[:2], "control"]
    rows = [3, 1, 8]
    found = trained.predict_perturbation(names, adata=adata, indices=rows, **N)
    assert found.shape == (9, adata.n_vars)
    assert found.var.equals(adata.var) and found.obs_names.is_unique
    cells = adata.obs_names[rows].to_list()
    assert found.obs["cell"].to_list() == cells * 3
    assert found.obs["perturbation"].to_list() == np.repeat(names, 3).tolist()
    assert found.obs["perturbation_measured"].to_list() == adata.obs["perturbation"].iloc[rows].to_list() * 3
    assert found.obs["novelty"].to_list() == ["seen"] * 6 + ["control"] * 3
    assert found.obs["cell_type"].to_list() == adata.obs["cell_type"].iloc[rows].to_list() * 3
    assert not [c for c in found.obs if c.startswith("_")]
    assert set(found.layers) - {None} == {"low", "high"}
    assert set(found.obsm) == {"X_latent", "X_basal"}
    for i, name in enumerate(names):
        one = trained.predict_perturbation(name, adata=adata, indices=rows, return_anndata=True, **N)
        part = found[3 * i : 3 * i + 3]
        equal(one.X, part.X)
        equal(one.layers["high"], part.layers["high"])
        equal(one.obsm["X_latent"], part.obsm["X_latent"])
        assert one.obs_names.to_list() == cells
    equal(found[:3].obsm["X_basal"], found[3:6].obsm["X_basal"])


def test_a_list_survives_a_file(trained, screen, tmp_path):
    found = trained.predict_perturbation(
        list(trained.vocabulary.names), adata=screen(), indices=[0, 1], return_anndata=True, **N
    )
    found.write_h5ad(tmp_path / "list.h5ad")
    read = ad.read_h5ad(tmp_path / "list.h5ad")
    equal(read.X, found.X)
    assert read.obs["perturbation"].to_list() == found.obs["perturbation"].to_list()
    assert list(read.uns["prediction"]["perturbation"]) == list(trained.vocabulary.names)


def test_a_list_of_one(trained, screen):
    adata, name = screen(), trained.vocabulary.names[0]
    listed = trained.predict_perturbation([name], adata=adata, indices=[0, 1], **N)
    assert isinstance(listed, ad.AnnData) and f"predicted_{name}" not in adata.layers


def test_answers_that_would_not_fit_in_memory(trained, monkeypatch):
    import pertura.model.base._model as module

    monkeypatch.setattr(module, "_MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="`iter_predictions`"):
        trained.predict_perturbation(list(trained.vocabulary.names), **N)


def test_continuous_data(trained_continuous):
    """Log-ratios and bulk profiles: the registered scale, values below zero, no library."""
    model = trained_continuous
    name = model.vocabulary.names[0]
    found = model.predict_perturbation(name, return_anndata=True, **N)
    assert found.uns["prediction"]["scale"] == "layer"
    measured = np.asarray(model.adata.X)
    assert (measured < 0).any() and (found.X < 0).any()
    assert np.abs(found.X - measured).mean() < measured.std()
    table = model.get_perturbation_effect(name, **N)
    np.testing.assert_allclose(table["log2fc"], table["lfc_mean"], atol=1e-6)
    for scale in ("log1p", "counts"):
        with pytest.raises(ValueError, match="`scale`: .* needs a model of counts"):
            model.predict_perturbation(name, scale=scale, return_anndata=True, **N)


# -- one row per context --------------------------------------------------------------------------------------------


def test_rows_of_contexts_are_the_effect_table(trained, screen, tmp_path, unchanged):
    adata, names = screen(), list(trained.vocabulary.names)
    with unchanged(adata):
        found = trained.predict_perturbation(names, adata=adata, by="context", **N)
    table = trained.get_perturbation_effect(names, adata=adata, **N)
    assert found.n_obs == len(table) // adata.n_vars
    assert list(found.var_names) == list(adata.var_names)
    for column, values in (("mean_perturbed", found.X), ("mean_control", found.layers["control"])):
        wide = table.pivot(index=["perturbation", "context"], columns="gene", values=column)[list(found.var_names)]
        at = pd.MultiIndex.from_frame(found.obs[["perturbation", "context"]].astype(str))
        equal(values, wide.loc[at].to_numpy())
    equal(found.X - found.layers["control"], found.layers["effect"])
    assert (found.layers["low"] <= found.X + 1e-5).all()
    assert (found.layers["high"] >= found.X - 1e-5).all()
    context_key, control = (
        trained.registered.argument("context_key"),
        adata.obs[trained.registered.argument("perturbation_key")],
    )
    if context_key is not None:
        number = adata.obs.loc[control == trained.vocabulary.control, context_key].astype(str).value_counts()
        assert (found.obs["n_cells"] == found.obs[context_key].astype(str).map(number)).all()
    found.write_h5ad(tmp_path / "contexts.h5ad")
    equal(ad.read_h5ad(tmp_path / "contexts.h5ad").X, found.X)


def test_without_a_name_all_that_were_trained(trained, screen):
    adata = screen()
    table = trained.get_perturbation_effect(adata=adata, **N)
    measured = metrics.measured_effect(
        adata, perturbation_key="perturbation", control="control", context_key="cell_type"
    )
    assert set(table["perturbation"]) == set(measured["perturbation"])
    name = measured["perturbation"].iloc[-1]
    own = trained.get_perturbation_effect(name, adata=adata, **N)
    equal(table.loc[table["perturbation"] == name, "lfc_mean"].to_numpy(), own["lfc_mean"].to_numpy())
    rows = trained.predict_perturbation(adata=adata, by="context", **N)
    effects = metrics.effects_to_anndata(table)
    equal(rows.layers["effect"], effects[:, rows.var_names].X)
    assert effects.obs["novelty"].tolist() == ["seen"] * effects.n_obs


def test_no_prediction_is_negative_where_no_value_is(spec, screen):
    adata = screen()
    spec.setup(adata, layer=None)
    model = spec.fit(spec.make(adata))
    found = model.predict_perturbation(model.vocabulary.names[:2], ci=0.9, **N)
    assert min(found.X.min(), found.layers["low"].min()) == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*log2.*")
        sc.tl.rank_genes_groups(found, "perturbation", method="t-test")
    assert np.isfinite(sc.get.rank_genes_groups_df(found, group=model.vocabulary.names[0])["logfoldchanges"]).all()
    if not hasattr(model.module, "means") or model.module.native_scale != "layer" or spec.samples:
        return
    # effects that are added to cells: the mean over cells is the effect all the same
    control = adata[adata.obs["perturbation"] == "control"].copy()
    found = model.predict_perturbation([model.vocabulary.names[0]], adata=control, **N)
    table = model.get_perturbation_effect(model.vocabulary.names[0], adata=control, **N)
    for context in model.contexts:
        here = (control.obs["cell_type"] == context).to_numpy()
        change = (found.X - control.X.toarray())[here].mean(0)
        np.testing.assert_allclose(change, table.loc[table["context"] == context, "lfc_mean"], atol=1e-4)


def test_one_row_per_context_for_one_name(trained, screen):
    name = trained.vocabulary.names[0]
    found = trained.predict_perturbation(name, adata=screen(), by="context", ci=None, **N)
    assert set(found.layers) - {None} == {"control", "effect"}
    assert (found.obs["perturbation"] == name).all()
    with pytest.raises(ValueError, match="`key_added`"):
        trained.predict_perturbation(name, adata=screen(), by="context", key_added="x", **N)
    with pytest.raises(ValueError, match="`by`"):
        trained.predict_perturbation(name, adata=screen(), by="gene", **N)
