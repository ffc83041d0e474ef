"""What may be asked, of which data: genes, files, contexts, batches, perturbations."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pertura.effects import Error

# sums may be rounded one way or the other, depending on where in memory their terms are
equal = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


N = {"n_samples": 4}


def ask(model, adata=None, perturbation=None, **arguments):
    name = perturbation or model.vocabulary.names[0]
    return model.predict_perturbation(name, adata=adata, return_anndata=True, **{**N, **arguments})


# -- genes ----------------------------------------------------------------------------------------------------------


def test_genes_are_matched_by_name(trained, screen):
    expected = ask(trained, screen())
    order = np.random.default_rng(0).permutation(expected.n_vars)
    permuted = screen()[:, order].copy()
    assert not permuted.var_names.equals(expected.var_names)
    found = ask(trained, permuted)
    assert found.var_names.equals(expected.var_names)
    equal(found.X, expected.X)
    trained.predict_perturbation(trained.vocabulary.names[0], adata=permuted, key_added="x", **N)
    equal(permuted.layers["x"], expected.X[:, order])


@pytest.mark.parametrize("form", ["csc", "dense", "array"])
def test_storage_does_not_matter(trained, screen, form):
    from scipy import sparse

    adata, expected = screen(), ask(trained, screen())
    counts = adata.layers["counts"]
    forms = {"csc": counts.tocsc, "dense": counts.toarray, "array": lambda: sparse.csr_array(counts)}
    adata.layers["counts"] = forms[form]()
    equal(ask(trained, adata).X, expected.X)


def test_missing_genes_are_counted(trained, screen):
    some = screen()[:, 3:].copy()
    with pytest.raises(ValueError, match="`adata`: 3 of the model's 40 genes are missing") as raised:
        ask(trained, some)
    assert str(screen().var_names[0]) in str(raised.value)


def test_doubled_genes(trained, screen):
    adata = screen()
    adata.var_names = [adata.var_names[0], *adata.var_names[:-1]]
    with pytest.raises(ValueError, match="gene names occur more than once"):
        ask(trained, adata)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_file", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
def test_backed_file(spec, screen, tmp_path, sparse_file, permuted):
    """Rows in the order asked, also where the file is read in ascending order."""
    adata = screen()
    adata.X = adata.layers["counts"] if sparse_file else adata.layers["counts"].toarray()
    del adata.layers["counts"]
    spec.setup(adata, layer=None)
    model = spec.fit(spec.make(adata))
    stored = (adata[:, ::-1] if permuted else adata).copy()
    for key in [k for k in stored.uns if k.startswith("_scvi")]:
        del stored.uns[key]
    stored.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    rows = [5, 3, 1, 60]
    expected, found = ask(model, indices=rows), ask(model, backed, indices=rows)
    assert found.obs["cell"].to_list() == adata.obs_names[rows].to_list()
    equal(found.X, expected.X)
    everything = model.get_perturbation_effect(model.vocabulary.names[0], adata=backed, **N)
    pd.testing.assert_frame_equal(everything, model.get_perturbation_effect(model.vocabulary.names[0], **N))
    assert not [k for k in backed.uns if k.startswith("_scvi")]


def test_training_from_a_backed_file(spec, screen, tmp_path):
    adata = screen()
    adata.X = adata.layers["counts"]
    del adata.layers["counts"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    spec.setup(adata, layer=None)
    in_memory = ask(spec.fit(spec.make(adata)))
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    spec.setup(backed, layer=None)
    equal(ask(spec.fit(spec.make(backed))).X, in_memory.X)


# -- cells ----------------------------------------------------------------------------------------------------------


def test_rows_come_in_the_order_asked(trained):
    rows = np.array([7, 2, 50])
    found = ask(trained, indices=rows)
    assert found.obs["cell"].to_list() == trained.adata.obs_names[rows].to_list()
    mask = np.zeros(trained.adata.n_obs, bool)
    mask[rows] = True
    equal(ask(trained, indices=mask).X, ask(trained, indices=np.sort(rows)).X)


def test_part_and_copy_of_the_training_data(trained):
    """They carry the marks of registration, and are not the registered object."""
    adata = trained.adata
    rows = np.arange(0, adata.n_obs, 3)
    for some in (adata[rows].copy(), adata[rows]):
        equal(ask(trained, some).X, ask(trained, indices=rows).X)
    equal(ask(trained, adata.copy()).X, ask(trained).X)


def test_foreign_data_get_nothing_but_the_results(spec, trained, screen, unchanged):
    adata, before, name = screen(), screen(), trained.vocabulary.names[0]
    with unchanged(adata):
        ask(trained, adata)
        trained.get_perturbation_effect(name, adata=adata, **N)
        trained.get_latent_representation(adata, **N)
        assert len(list(trained.iter_predictions(name, adata=adata, **N)))
        if spec.samples:
            trained.posterior_predictive_sample(adata, n_samples=2, indices=[0, 1])
    with unchanged(adata):
        trained.predict_perturbation(name, adata=adata, key_added="new", **N)
        added = {
            "layers": {"new", "new_low", "new_high"},
            "obsm": {"X_new", "X_basal"},
            "uns": {"new", "new_effect"},
            **dict.fromkeys(("obs", "var", "varm", "obsp"), set()),
        }
        for slot, keys in added.items():
            assert {k for k in getattr(adata, slot) if k is not None} - set(getattr(before, slot)) == keys, slot
            for key in keys:
                del getattr(adata, slot)[key]


@pytest.mark.parametrize("column", ["perturbation", "cell_type", "batch"])
def test_foreign_data_without_a_registered_column(trained, screen, column):
    adata = screen()
    del adata.obs[column]
    with pytest.raises(ValueError, match=rf"`adata`: the column '{column}' of `obs`, registered as") as raised:
        ask(trained, adata)
    if column == "perturbation":
        assert "adata.obs['perturbation'] = 'control'" in str(raised.value)


@pytest.mark.parametrize("column", ["perturbation", "cell_type", "batch"])
def test_foreign_data_with_missing_values(trained, screen, column):
    adata = screen()
    adata.obs[column] = pd.Categorical([None, *adata.obs[column].astype(object)[1:]])
    with pytest.raises(ValueError, match=f"_key`: 1 of {adata.n_obs} cells have no value in .*{column}"):
        ask(trained, adata)


def test_foreign_data_of_another_kind(trained, screen):
    adata = screen()
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(ValueError, match="trained on counts, but these values are not"):
        ask(trained, adata)
    del adata.layers["counts"]
    with pytest.raises(ValueError, match="trained on layer 'counts'"):
        ask(trained, adata)
    adata.layers["counts"] = adata.X * np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        ask(trained, adata)


def test_unseen_batch(trained, screen):
    adata = screen()
    adata.obs["batch"] = "elsewhere"
    with pytest.raises(ValueError, match=r"batch 'elsewhere' in `obs\['batch'\]` was not in training .*batch_1"):
        ask(trained, adata)


@pytest.mark.needs("samples")
def test_prediction_is_in_the_batch_of_the_cell(trained):
    """The same basal state, in another batch, is other expression."""
    module = trained.module.eval()
    with torch.no_grad():
        cells = next(trained._registered_cells(np.arange(6)).cells(6, torch.device("cpu")))
        basal = module.abduct(cells, 2, module.draw_globals(2, cells))
        means = []
        for batch in (0, 1):
            moved = replace(basal, cells=replace(cells, batch=torch.full_like(cells.batch, batch)))
            found = module.counterfactual(moved, cells.action)
            means.append(found.expression.expectation(trained.registered.default_scale, cells.library))
    assert ((means[0] - means[1]).abs() > 1e-5).float().mean() > 0.9


def test_cells_under_an_unknown_perturbation(trained, screen):
    adata = screen()
    control = np.flatnonzero(adata.obs["perturbation"] == "control")
    expected = ask(trained, adata, indices=control)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace(trained.vocabulary.names[1], "novel")
    number = (adata.obs["perturbation"].str.contains("novel")).sum()
    with pytest.raises(ValueError, match=f"{number} cells carry the perturbations? .*'novel") as raised:
        ask(trained, adata)
    assert "indices=" in str(raised.value)
    equal(ask(trained, adata, indices=control).X, expected.X)


# -- contexts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(trained, monkeypatch):
    """Discrepancies as a model may have them; a few cells and epochs give all sorts."""
    parameters = {
        "noise": 0.0,
        "seen": asdict(Error(0.1, 0.1)),
        "new context": asdict(Error(0.8, 0.2)),
    }
    monkeypatch.setattr(trained, "calibration_", {**trained.calibration_, **parameters})
    return trained


def test_unseen_context(calibrated, screen):
    """No error; intervals are wider than of the same cells in a known context, the answer says why."""
    model, name, known, new = calibrated, calibrated.vocabulary.names[0], screen(), screen()
    control = np.flatnonzero(known.obs["perturbation"] == "control")
    new.obs["cell_type"] = pd.Categorical(["new"] * new.n_obs)
    inside, outside = (ask(model, a, indices=control, n_samples=20) for a in (known, new))
    assert set(inside.obs["novelty"]) == {"seen"}
    assert set(outside.obs["novelty"]) == {"new context"}
    width = [float((a.layers["high"] - a.layers["low"]).mean()) for a in (inside, outside)]
    assert width[1] > 1.01 * width[0]
    tables = [model.get_perturbation_effect(name, adata=a, n_samples=20) for a in (known, new)]
    assert set(tables[1]["context"]) == {"new"} and set(tables[1]["novelty"]) == {"new context"}
    assert tables[1]["lfc_sd"].median() > 1.5 * tables[0]["lfc_sd"].median()


def test_contexts_old_and_new_together(trained, screen):
    """A known context keeps its answer beside one that is new."""
    adata, both = screen(), screen()
    context = adata.obs["cell_type"].astype(str)
    first = context.iloc[0]
    both.obs["cell_type"] = np.where(context == first, first, "new")
    name = trained.vocabulary.names[0]
    alone, mixed = (trained.get_perturbation_effect(name, adata=a, **N) for a in (adata, both))
    assert set(mixed["context"]) == {first, "new"}
    assert set(mixed.loc[mixed["context"] == first, "novelty"]) == {"seen"}
    columns = ["mean_control", "lfc_mean"]
    a, b = (t.loc[t["context"] == first, columns].to_numpy() for t in (alone, mixed))
    np.testing.assert_allclose(a, b, atol=1e-6)


# -- perturbations --------------------------------------------------------------------------------------------------


@pytest.mark.needs("refuses_unseen")
def test_unseen_perturbation_is_refused(trained):
    with pytest.raises(ValueError, match="`perturbation`: 'novel' was not seen in training") as raised:
        ask(trained, perturbation="novel")
    message = str(raised.value)
    assert trained.vocabulary.names[0] in message
    assert "perturbation_features_key" in message
    close = trained.vocabulary.names[0] + "x"
    with pytest.raises(ValueError, match=f"Did you mean '{trained.vocabulary.names[0]}'"):
        ask(trained, perturbation=close)


def test_unseen_perturbation_with_features(spec, screen):
    adata = screen()
    names = sorted({m for label in adata.obs["perturbation"].unique() for m in label.split("+")} - {"control"})
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(len(names) + 1, 3)), index=[*names, "novel"], columns=list("abc"))
    adata.uns["features"] = table
    try:
        spec.setup(adata, perturbation_features_key="features")
        model = spec.fit(spec.make(adata))
    except ValueError as error:
        assert spec.only_genes or not spec.cls._can_predict_features
        assert "`perturbation_features_key`" in str(error)
        return
    if not spec.refuses_unseen:
        assert np.isfinite(ask(model, perturbation="novel").X).all()
        return
    if not model._can_predict_features:
        with pytest.raises(ValueError, match="can not represent a new perturbation; .*Linear"):
            ask(model, perturbation="novel")
        return
    found = ask(model, perturbation="novel")
    assert set(found.obs["novelty"]) == {"unseen with features"}
    assert np.isfinite(found.X).all()
    model.calibration_ = model.calibration_ | {
        "noise": 0.0,
        "seen": asdict(Error(0.1)),
        "unseen with features": asdict(Error(0.9)),
    }
    seen, unseen = (model.get_perturbation_effect(p, **N) for p in (names[0], "novel"))
    assert unseen["lfc_sd"].median() > 2 * seen["lfc_sd"].median()
    with pytest.raises(ValueError, match="'other' was not seen in training and has no features"):
        ask(model, perturbation="other")


def test_registered_but_not_trained(spec, screen):
    """A perturbation that the split leaves out is as unseen as one that was never registered."""
    adata = screen()
    spec.setup(adata)
    model = spec.make(adata)
    (pair,) = model.vocabulary.combinations
    left_out = pair[0]
    rows = np.flatnonzero(~adata.obs["perturbation"].astype(str).str.contains(left_out))
    spec.fit(model, datasplitter_kwargs={"external_indexing": [rows]})
    assert left_out in model.vocabulary.names
    control = np.flatnonzero(adata.obs["perturbation"] == "control")
    if spec.refuses_unseen and not spec.knows_genes:
        with pytest.raises(ValueError, match=f"'{left_out}' was not seen in training"):
            ask(model, perturbation=left_out, indices=control)
        with pytest.raises(ValueError, match="cells carry the perturbation.*'" + left_out):
            ask(model, perturbation=pair[1])
    assert set(ask(model, perturbation=pair[1], indices=control).obs["novelty"]) == {"seen"}
    assert left_out not in model.calibration_["doses"]


def test_combinations(trained):
    vocabulary = trained.vocabulary
    a, b, c = vocabulary.names
    (seen,) = vocabulary.combinations
    new = next(pair for pair in ((a, b), (a, c), (b, c)) if pair != seen)
    first, second = new
    answer = ask(trained, perturbation=f"{first}+{second}")
    equal(answer.X, ask(trained, perturbation=f"{second}+{first}").X)
    assert set(answer.obs["perturbation"]) == {f"{first}+{second}"}
    assert set(answer.obs["novelty"]) == {"new combination"}
    equal(ask(trained, perturbation=f"{first}+control").X, ask(trained, perturbation=first).X)
    assert set(ask(trained, perturbation="+".join(seen)).obs["novelty"]) == {"seen"}


def test_only_perturbation_needs_no_name(spec, screen):
    adata = screen()
    name = "gene_1"
    present = sorted(set(adata.obs["perturbation"]) - {"control"})
    adata = adata[adata.obs["perturbation"].isin(["control", present[0]])].copy()
    spec.setup(adata)
    model = spec.fit(spec.make(adata))
    assert model.vocabulary.names == (present[0],), name
    model.predict_perturbation(**N)
    assert f"predicted_{present[0]}" in adata.layers


def test_control_needs_no_name_only_if_there_is_one(trained):
    with pytest.raises(ValueError, match="`perturbation`: the model knows 4"):
        trained.predict_perturbation(**N)


# -- doses ----------------------------------------------------------------------------------------------------------


def test_doses(trained_dosed):
    model, name = trained_dosed, trained_dosed.vocabulary.names[0]
    assert model.vocabulary.doses[0] == (1.0, 10.0)
    control = ask(model, perturbation="control")
    equal(ask(model, dose=0).X, control.X)
    several = model.predict_perturbation(name, dose=[1, 3, 10], n_samples=4)
    assert several.obs["dose"].unique().tolist() == ["1", "3", "10"]
    novelty = several.obs.groupby("dose", observed=True)["novelty"].agg(lambda v: set(v).pop())
    assert novelty.to_dict() == {"1": "seen", "3": "new dose", "10": "seen"}
    for dose in (1, 10):
        equal(several[several.obs["dose"] == str(dose)].X, ask(model, dose=dose).X)
    reference = model.vocabulary.reference_dose[0]
    equal(ask(model).X, ask(model, dose=reference).X)
    table = model.get_perturbation_effect(name, dose=[1, 10], **N)
    assert table["dose"].unique().tolist() == ["1", "10"]
    # without a dose, the reference is asked, and said
    assert model.predict_perturbation(name, return_anndata=True, **N).obs["dose"].unique().tolist() == [
        f"{reference:g}"
    ]
