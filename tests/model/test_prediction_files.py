"""Predictions written to a file are those held in memory, and an interrupted file is continued."""

from __future__ import annotations

import anndata
import numpy as np
import pytest

import pertura.model.base._model as base
import pertura.model.base._out as out
import pertura.model.base._predict as predict
from pertura import datasets

from .conftest import MODELS

N = {"n_samples": 4}
SUFFIXES = (".zarr", ".h5ad")


@pytest.fixture(scope="module")
def trained():
    """The file does not know which model predicts."""
    spec = next(spec for spec in MODELS if spec.name == "model.SAMSVAE")
    adata = datasets.simulate(
        n_cells_per_condition=10,
        n_control_cells=20,
        n_genes=40,
        n_regulators=6,
        n_perturbations=3,
        n_biomarkers=2,
        n_truth_cells=10,
    )
    spec.setup(adata)
    return spec.fit(spec.make(adata), max_epochs=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(predict, "_MAX_CELLS", 32)
    monkeypatch.setattr(out, "_CHUNK_BYTES", 1)


def read(path):
    return anndata.io.read_zarr(path) if path.suffix == ".zarr" else anndata.io.read_h5ad(path)


def same(one, other):
    assert one.obs.index.equals(other.obs.index)
    assert one.var_names.equals(other.var_names)
    for column in ("perturbation", "novelty", "cell"):
        assert one.obs[column].astype(str).to_list() == other.obs[column].astype(str).to_list()
    for slot, keys in (("layers", ("low", "high")), ("obsm", ("X_latent", "X_basal"))):
        for key in keys:
            np.testing.assert_array_equal(getattr(one, slot)[key], getattr(other, slot)[key])
    np.testing.assert_array_equal(one.X, other.X)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_as_in_memory(trained, tmp_path, suffix):
    names, path = [*trained.vocabulary.names, "control"], tmp_path / f"pred{suffix}"
    before = set(trained.adata.layers)
    assert trained.predict_perturbation(names, out=path, **N) is None
    assert set(trained.adata.layers) == before
    expected = trained.predict_perturbation(names, **N)
    same(read(path), expected)
    assert read(path).uns["prediction"]["model"] == "SAMSVAE"
    single = tmp_path / f"one{suffix}"
    trained.predict_perturbation(names[0], out=str(single), ci=None, **N)
    found = read(single)
    assert found.n_obs == trained.adata.n_obs
    assert "low" not in found.layers
    assert np.isfinite(found.X).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_continued_after_an_interruption(trained, tmp_path, suffix, monkeypatch):
    names, path = list(trained.vocabulary.names), tmp_path / f"pred{suffix}"

    def stop_early(*args, **kwargs):
        for i, block in enumerate(predict.predict_blocks(*args, **kwargs)):
            if i == 3:
                raise KeyboardInterrupt
            yield block

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base, "predict_blocks", stop_early)
        trained.predict_perturbation(names, out=path, **N)
    half = read(path)
    done = np.isfinite(half.X).all(1).reshape(len(names), -1)
    assert (done.sum(1) == 96).all()

    begun = []
    monkeypatch.setattr(
        base,
        "predict_blocks",
        lambda *args, **kwargs: begun.append(kwargs["first_cell"]) or predict.predict_blocks(*args, **kwargs),
    )
    trained.predict_perturbation(names, out=path, batch_size=50, **N)
    assert begun == [96]
    monkeypatch.undo()
    monkeypatch.setattr(predict, "_MAX_CELLS", 32)
    same(read(path), trained.predict_perturbation(names, **N))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_overwritten_unasked(trained, tmp_path, suffix):
    names, path = list(trained.vocabulary.names), tmp_path / f"pred{suffix}"
    trained.predict_perturbation(names[0], out=path, indices=range(40), **N)
    with pytest.raises(ValueError, match="`out`: .* holds these predictions already"):
        trained.predict_perturbation(names[0], out=path, indices=range(40), **N)
    with pytest.raises(ValueError, match="`out`: .* holds something else"):
        trained.predict_perturbation(names[0], out=path, indices=range(40), seed=7, **N)
    with pytest.raises(ValueError, match="`out`: .* holds something else"):
        trained.predict_perturbation(names[0], out=path, indices=range(41), **N)
    trained.predict_perturbation(names[0], out=path, indices=range(41), overwrite=True, **N)
    assert read(path).n_obs == 41


def test_other_files_are_kept(trained, tmp_path):
    path = tmp_path / "mine.h5ad"
    path.write_text("not a prediction")
    with pytest.raises(ValueError, match="`out`"):
        trained.predict_perturbation(trained.vocabulary.names[0], out=path, **N)
    assert path.read_text() == "not a prediction"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"out": "pred.csv"}, r"`out` must end in '\.zarr' or '\.h5ad', got 'pred\.csv'"),
        ({"out": "nowhere/pred.zarr"}, r"`out`: the folder 'nowhere' does not exist"),
        ({"out": "pred.zarr", "key_added": "mine"}, "`out`: .*`key_added`"),
        ({"out": "pred.zarr", "by": "context"}, "`out`: .*`by`"),
        ({"out": "pred.zarr", "return_anndata": True}, "`out`: .*`return_anndata`"),
    ],
)
def test_wrong_arguments(trained, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        trained.predict_perturbation(trained.vocabulary.names[0], **arguments, **N)
    assert not list(tmp_path.iterdir())
