"""Predictions of some genes are on the scale of all of them, and their share of the library may change."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from mudata import MuData

from pertura import baseline as bl
from pertura import datasets
from pertura import model as pm

KANG = {"perturbation_key": "condition", "control": "ctrl", "context_key": "cell_type", "layer": "counts"}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SIZES = ("all genes", "size factors", "X")


@pytest.fixture(scope="module")
def kang() -> AnnData:
    """Two cell types, whose library is the counts of 200 genes."""
    adata = datasets.kang_2018_mini()
    adata = adata[adata.obs["cell_type"].isin(sorted(adata.obs["cell_type"].unique())[:2])].copy()
    adata = adata[:, np.argsort(-adata.X.toarray().var(0))[:200]].copy()
    adata.X = adata.layers["counts"].copy()
    adata.uns.clear()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    adata.obs["n"] = np.asarray(adata.layers["counts"].sum(1)).ravel()
    return adata


@pytest.fixture(scope="module")
def panel(kang):
    """`panel(how)`: all genes, or every third of them with libraries from size factors or from X."""

    def of(how: str) -> AnnData:
        if how == "all genes":
            return kang.copy()
        adata = kang[:, ::3].copy()
        if how == "size factors":
            adata.X = adata.layers["counts"].copy()
        return adata

    return of


def trained(cls, adata, how="X", options=None, **train):
    cls.setup_anndata(adata, **KANG, **({"size_factor_key": "n"} if how == "size factors" else {}))
    torch.manual_seed(0)
    model = cls(adata, **(options or {}))
    model.train(**QUIET, **train)
    return model


def controls(adata):
    return np.flatnonzero(adata.obs["condition"] == "ctrl")


@pytest.mark.parametrize("cls", [bl.MeanEffect, bl.NearestNeighbour])
def test_baselines_of_some_genes_say_what_those_of_all_say(panel, cls):
    """Also where the panel is compared with cells of the user's own X."""
    tables, means = {}, {}
    for how in SIZES:
        adata = panel(how)
        model = trained(cls, adata, how)
        asked = {"indices": controls(adata), "n_samples": 2, "ci": None}
        tables[how] = model.get_perturbation_effect("stim", **{**asked, "ci": 0.9}).set_index(["context", "gene"])
        means[how] = model.predict_perturbation("stim", return_anndata=True, **asked).to_df().mean()
    genes = means["X"].index
    for how in SIZES[1:]:
        np.testing.assert_allclose(means[how], means["all genes"][genes], atol=1e-5)
        for column in ("lfc_mean", "mean_control", "mean_perturbed"):
            expected = tables["all genes"].loc[tables[how].index, column]
            np.testing.assert_allclose(tables[how][column], expected, atol=1e-5)
    x = panel("X")
    own = x[(x.obs["condition"] == "ctrl").to_numpy()]
    for context in own.obs["cell_type"].unique():
        measured = own[own.obs["cell_type"] == context].to_df().mean()
        np.testing.assert_allclose(tables["X"]["mean_control"][context][genes], measured, atol=1e-5)


@pytest.mark.slow
def test_models_of_some_genes_say_what_those_of_all_say(panel):
    effects = {}
    for how in SIZES:
        adata = panel(how)
        model = trained(pm.SAMSVAE, adata, how, {"n_latent": 8}, max_epochs=30, batch_size=64)
        table = model.get_perturbation_effect("stim", indices=controls(adata), n_samples=8)
        effects[how] = table.set_index(["context", "gene"])["lfc_mean"]
    x = panel("X")
    measured = {}
    for context in x.obs["cell_type"].unique():
        own = x[(x.obs["cell_type"] == context).to_numpy()].to_df()
        treated = (x.obs["condition"] == "stim")[x.obs["cell_type"] == context].to_numpy()
        measured |= {(context, gene): v for gene, v in (own[treated].mean() - own[~treated].mean()).items()}
    measured = pd.Series(measured)
    index = effects["X"].index
    for how in SIZES:
        slope = np.polyfit(measured[index], effects[how][index], 1)[0]
        assert 0.75 < slope < 1.2, how
    np.testing.assert_allclose(effects["X"], effects["size factors"][index], atol=1e-4)
    error = np.sqrt(((effects["X"] - effects["all genes"][index]) ** 2).mean())
    assert error < 0.2 * np.sqrt((measured[index] ** 2).mean())


def planted(n: int = 120) -> AnnData:
    """The panel has a tenth of the library of controls; two thirds of its genes triple."""
    rng = np.random.default_rng(0)
    label = np.repeat(["control", "A"], n)
    rate, up = rng.gamma(1.0, 1.0, 24), np.where(np.arange(24) < 16, 3.0, 1.0)
    mean = 0.1 * rate / rate.sum() * np.where((label == "A")[:, None], up, 1.0)
    library = rng.lognormal(np.log(3000), 0.4, 2 * n)
    counts = rng.poisson(library[:, None] * mean * rng.gamma(5.0, 0.2, (2 * n, 24)))
    total = counts.sum(1) + rng.poisson(library * (1 - mean.sum(1)))
    obs = pd.DataFrame({"condition": label, "cell_type": "all", "n": total}, index=[f"c{i}" for i in range(2 * n)])
    adata = AnnData(np.log1p(1e4 * counts / total[:, None]).astype(np.float32), obs=obs)
    adata.layers["counts"] = counts.astype(np.float32)
    adata.var_names = [*(f"g{i}" for i in range(23)), "A"]  # some models know perturbations as genes
    return adata


_SMALL = {"n_latent": 8, "n_hidden": 16}
_PANELS = [
    (pm.SAMSVAE, _SMALL, 0.85),
    (pm.PertVAE, {"n_latent": 8, "encoder_hidden": (16,), "n_flow_hidden": 8, "n_flow_context": 8}, 0.75),
    (pm.CRADLEVAE, _SMALL, 0.85),
    (pm.GPOVAE, _SMALL, 0.85),
    (pm.CPA, _SMALL, 0.7),
    (
        pm.DrugAAE,
        {"n_latent": 8, "encoder_hidden": (16,), "n_gene_embedding": 8, "discriminator_hidden": (8,)},
        0.7,
    ),
]


@pytest.mark.parametrize(
    ("cls", "options", "least"),
    [pytest.param(*p, marks=[] if p[0] is pm.SAMSVAE else pytest.mark.slow, id=p[0].__name__) for p in _PANELS],
)
def test_the_share_of_a_panel_may_change(cls, options, least):
    """Effects of genes that triple together are those of genes that triple."""
    adata = planted()
    arguments = {**KANG, "control": "control", "size_factor_key": "n"}
    cls.setup_anndata(adata, **arguments)
    torch.manual_seed(0)
    model = cls(adata, **options)
    assert model.module.likelihood.rest is not None
    model.train(max_epochs=10 if cls is pm.SAMSVAE else 60, batch_size=64, **QUIET)
    control = (adata.obs["condition"] == "control").to_numpy()
    effect = model.get_perturbation_effect("A", indices=np.flatnonzero(control), n_samples=4)["lfc_mean"].to_numpy()
    measured = adata.X[~control].mean(0) - adata.X[control].mean(0)
    assert least < effect[:16].mean() / measured[:16].mean() < 1.15
    assert abs(effect[16:].mean() - measured[16:].mean()) < 0.08


# -- what is said, and what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("all genes", "total counts of the 200 registered genes"),
        ("size factors", "obs['n']"),
        ("X", "recovered from the log-normalized X"),
    ],
)
def test_the_model_says_which_library_it_took(panel, how, said, capsys):
    adata = panel(how)
    pm.SAMSVAE.setup_anndata(adata, **KANG, **({"size_factor_key": "n"} if how == "size factors" else {}))
    model = pm.SAMSVAE(adata, n_latent=2)
    assert said in model._model_summary_string
    assert (model.module.likelihood.rest is None) == (how == "all genes")
    assert ("likelihood.log_theta_rest" in dict(model.module.named_parameters())) == (how != "all genes")
    model.view_anndata_setup()
    assert "Library" in capsys.readouterr().out


@pytest.mark.parametrize("how", SIZES[1:])
def test_saved_models_and_other_cells(panel, tmp_path, how):
    """A saved model predicts what it did, for its own cells and for others, by the same rule."""
    adata = panel(how)
    model = trained(pm.SAMSVAE, adata, how, {"n_latent": 2}, max_epochs=1)
    module, share = model.module, np.asarray(adata.layers["counts"].sum()) / adata.obs["n"].sum()
    assert module.likelihood.rest.item() == pytest.approx(1e4 * (1 - share), rel=1e-3)
    (cells,) = model._registered_cells(np.arange(adata.n_obs)).cells(adata.n_obs, torch.device("cpu"))
    seen = module.standardized(cells.x, cells.library)
    np.testing.assert_allclose(seen.mean(0), 0.0, atol=1e-3)
    rows = controls(adata)[:20]
    asked = {"indices": rows, "n_samples": 2, "ci": None, "return_anndata": True, "seed": 1}
    expected = model.predict_perturbation("stim", **asked).X
    model.save(tmp_path / "model", save_anndata=False)
    other = panel(how)[:, ::-1].copy()
    for given in (False, panel(how)):
        loaded = pm.SAMSVAE.load(tmp_path / "model", adata=given, accelerator="cpu")
        assert loaded._model_summary_string == model._model_summary_string
        np.testing.assert_allclose(loaded.predict_perturbation("stim", adata=other, **asked).X, expected, atol=1e-5)
    assert "_scvi_library" not in other.obs
    if how == "X":
        other.X = other.layers["counts"].copy()
        with pytest.raises(ValueError, match="`adata`: the model reads the libraries"):
            model.predict_perturbation("stim", adata=other, **asked)


def test_mudata(panel):
    adata = panel("X")
    guides = AnnData((adata.obs[["condition"]] == "stim").to_numpy().astype(np.float32), obs=adata.obs[[]])
    guides.var_names = ["stim"]
    adata.obs = adata.obs.drop(columns="n")
    mdata = MuData({"rna": adata, "guides": guides})
    bl.MeanEffect.setup_mudata(
        mdata, perturbation_mod="guides", control="ctrl", layer="counts", context_key="cell_type"
    )
    assert bl.MeanEffect(mdata).registered.library["source"] == "X"
    np.testing.assert_array_equal(mdata["rna"].obs["_scvi_library"], panel("X").obs["n"])
    mdata.obs["n"] = panel("X").obs["n"].to_numpy()
    arguments = {"perturbation_mod": "guides", "control": "ctrl", "layer": "counts", "size_factor_key": "n"}
    bl.MeanEffect.setup_mudata(mdata, **arguments)
    assert bl.MeanEffect(mdata).registered.library["source"] == "size_factor"


def test_benchmarks_measure_on_the_same_scale(panel, kang):
    from pertura.benchmark import Dataset

    keys = {"perturbation_key": "condition", "control": "ctrl", "context_key": "cell_type", "layer": "counts"}
    for how in SIZES[1:]:
        data = Dataset(panel(how), "kang", **keys, setup={"size_factor_key": "n"} if how == "size factors" else None)
        found = data.expression(np.arange(5, 30))
        np.testing.assert_allclose(found.toarray(), kang.X[5:30].toarray()[:, ::3], atol=1e-5)
        assert "_scvi_library" not in data.adata.obs
