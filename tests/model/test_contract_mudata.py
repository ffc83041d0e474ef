"""MuData: a second modality, cells x perturbations, says what was done to each cell."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData
from scipy import sparse

# sums may be rounded one way or the other, depending on where in memory their terms are
equal = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


N = {"n_samples": 4}
SETUP = {"perturbation_mod": "grna", "control": "control", "layer": "counts", "target_key": "target"}


def as_mudata(adata: AnnData, *, doses: bool = False) -> MuData:
    """Two gRNAs per target, one of which each perturbed cell carries, and non-targeting ones in half of the controls."""
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    targets = sorted({m for label in labels for m in label.split("+")} - {"control"})
    guides = [f"{t}_{i}" for t in [*targets, "control"] for i in (1, 2)]
    values = np.zeros((adata.n_obs, len(guides)), np.float32)
    for row, label in enumerate(labels):
        for member in label.split("+"):
            if member != "control" or row % 2:
                dose = float(adata.obs["dose"].iloc[row]) if doses and member != "control" else 1.0
                values[row, guides.index(f"{member}_{1 + row % 2}")] = dose
    var = pd.DataFrame({"target": [g.rpartition("_")[0] for g in guides]}, index=guides)
    grna = AnnData(sparse.csr_matrix(values), obs=pd.DataFrame(index=adata.obs_names), var=var)
    rna = adata.copy()
    del rna.obs["perturbation"]
    grna = grna[::-1].copy()  # the order of the cells is the first modality's
    mdata = MuData({"rna": rna, "grna": grna})
    mdata.obs["cell_line"] = rna.obs["cell_type"].to_numpy()
    mdata.obs["lane"] = rna.obs["batch"].to_numpy()
    return mdata


@pytest.fixture
def mdata(screen):
    return as_mudata(screen())


@pytest.fixture
def model(spec, mdata):
    spec.cls.setup_mudata(mdata, context_key="cell_line", batch_key="lane", **SETUP)
    return spec.fit(spec.make(mdata))


def test_same_model_as_of_an_anndata(spec, screen, mdata, model):
    adata = screen()
    spec.setup(adata)
    expected = spec.fit(spec.make(adata))
    assert model.vocabulary == expected.vocabulary
    assert model.contexts == expected.contexts
    for key, value in expected.module.state_dict().items():
        assert (model.module.state_dict()[key] == value).all(), key
    name = model.vocabulary.names[0]
    answers = [m.predict_perturbation(name, return_anndata=True, **N) for m in (model, expected)]
    equal(answers[0].X, answers[1].X)
    assert model.adata is mdata["rna"]


def test_results_land_in_the_expression_modality(mdata, model, tmp_path):
    name = model.vocabulary.names[0]
    model.predict_perturbation(name, adata=mdata, key_added="x", **N)
    assert {"x", "x_low", "x_high"} <= set(mdata["rna"].layers)
    assert "x_effect" in mdata["rna"].uns
    found = model.predict_perturbation([name, "control"], adata=mdata, **N)
    assert set(found.obs["perturbation"]) == {name, "control"}
    assert not [c for c in found.obs if c.startswith(("_pertura", "_scvi"))]
    mdata.write(tmp_path / "x.h5mu")


def test_saved_and_loaded_with_a_mudata(spec, screen, model, tmp_path):
    model.save(tmp_path / "model")
    name = model.vocabulary.names[0]
    expected = model.predict_perturbation(name, return_anndata=True, **N)
    other = as_mudata(screen())
    loaded = spec.cls.load(tmp_path / "model", adata=other, accelerator="cpu")
    equal(loaded.predict_perturbation(name, return_anndata=True, **N).X, expected.X)
    assert loaded.adata is other["rna"]
    without = spec.cls.load(tmp_path / "model", adata=False, accelerator="cpu")
    equal(without.predict_perturbation(name, adata=as_mudata(screen()), return_anndata=True, **N).X, expected.X)
    spec.fit(loaded)


def test_foreign_mudata_get_nothing_but_the_results(screen, model, unchanged):
    other, name = as_mudata(screen()), model.vocabulary.names[0]
    with unchanged(other["rna"]), unchanged(other["grna"]):
        model.predict_perturbation(name, adata=other, return_anndata=True, **N)
        model.get_latent_representation(other, **N)
    control = other[(screen().obs["perturbation"] == "control").to_numpy()].copy()
    assert model.predict_perturbation(name, adata=control, return_anndata=True, **N).n_obs == control.n_obs
    columns = list(other["rna"].obs)
    model.predict_perturbation(name, adata=other, key_added="x", **N)
    assert "x" in other["rna"].layers
    assert list(other["rna"].obs) == columns


def test_registered_again_it_is_still_a_mudata(spec, mdata, model):
    """Another registration of the same data makes the manager of the first replay its own."""
    name = model.vocabulary.names[0]
    expected = model.predict_perturbation(name, return_anndata=True, **N)
    spec.cls.setup_mudata(mdata, **SETUP)
    equal(model.predict_perturbation(name, return_anndata=True, **N).X, expected.X)
    model.predict_perturbation(name, adata=mdata, return_anndata=True, **N)


def test_doses(spec, screen):
    adata = screen("dosed")
    mdata = as_mudata(adata, doses=True)
    spec.cls.setup_mudata(mdata, context_key="cell_type", batch_key="batch", values="dose", **SETUP)
    model = spec.fit(spec.make(mdata))
    spec.setup(adata, dose_key="dose")
    expected = spec.fit(spec.make(adata))
    assert model.vocabulary == expected.vocabulary
    assert model.vocabulary.doses[0] == (1.0, 10.0)
    name = model.vocabulary.names[0]
    answers = [m.predict_perturbation(name, dose=[1, 10], **N) for m in (model, expected)]
    equal(answers[0].X, answers[1].X)
    assert answers[0].obs["dose"].unique().tolist() == ["1", "10"]


def test_threshold_and_layer(spec, mdata):
    """Background counts below the threshold are no perturbation."""
    grna = mdata["grna"]
    grna.layers["umi"] = grna.X.toarray() * 10 + 1
    spec.cls.setup_mudata(mdata, perturbation_layer="umi", threshold=5, **SETUP)
    labels = mdata["rna"].obs["_pertura_perturbation"].copy()
    spec.cls.setup_mudata(mdata, **SETUP)
    assert (labels == mdata["rna"].obs["_pertura_perturbation"]).all()


def test_an_anndata_model_is_not_asked_about_a_mudata(trained, screen):
    with pytest.raises(ValueError, match="`adata` is a MuData, but the model was set up with an AnnData"):
        trained.predict_perturbation(trained.vocabulary.names[0], adata=as_mudata(screen()), **N)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rna_mod", "protein"),
        ("rna_mod", None),
        ("perturbation_mod", "drugs"),
        ("control", None),
        ("layer", "absent"),
        ("perturbation_layer", "absent"),
        ("perturbation_layer", 1),
        ("target_key", "absent"),
        ("target_key", "holes"),
        ("values", "counts"),
        ("threshold", -1),
        ("threshold", "low"),
        ("threshold", 100),
        ("context_key", "absent"),
        ("batch_key", "absent"),
        ("size_factor_key", "absent"),
        ("perturbation_features_key", "absent"),
        ("delimiter", ""),
    ],
    ids=str,
)
def test_wrong_arguments(spec, mdata, unchanged, argument, value):
    mdata["grna"].var["holes"] = [None, *["a"] * (mdata["grna"].n_vars - 1)]
    with unchanged(mdata["rna"]), unchanged(mdata["grna"]), pytest.raises(ValueError, match=f"`{argument}`"):
        spec.cls.setup_mudata(mdata, **{**SETUP, argument: value})


def test_wrong_mudata(spec, screen, mdata):
    with pytest.raises(ValueError, match="`mdata` must be a MuData, got AnnData. Use `setup_anndata`"):
        spec.cls.setup_mudata(screen(), **SETUP)
    with pytest.raises(ValueError, match="`adata` must be an AnnData, got MuData. Use `setup_mudata`"):
        spec.cls.setup_anndata(mdata, perturbation_key="perturbation", control="control")
    with pytest.raises(ValueError, match="`adata`: this MuData was not set up"):
        spec.cls(mdata, **spec.init)
    fewer = MuData({"rna": mdata["rna"], "grna": mdata["grna"][:50].copy()})
    with pytest.raises(ValueError, match="`perturbation_mod`: 150 of 200 cells"):
        spec.cls.setup_mudata(fewer, **SETUP)


def test_loading_wrong_mudata(spec, trained, mdata, tmp_path):
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match="is a MuData, but the model was set up with an AnnData"):
        spec.cls.load(tmp_path / "model", adata=mdata, accelerator="cpu")
