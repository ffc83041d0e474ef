"""Data that are effects of conditions, without cells and without controls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura import baseline as bl
from pertura.effects import ConditionTable
from pertura.model import SAMSVAE, PerturbX

SETUP = {"perturbation_key": "drug", "context_key": "line", "values": "effects"}
N, N_GENES, LINES = 12, 50, ["x", "y", "z"]
ALL = [bl.MeanEffect, bl.ContextMean, bl.TwoWayAdditive, bl.LowRankCompletion, bl.NearestNeighbour]
ALL += [bl.NoChange, bl.WeightedMeanEffect, bl.Additive, bl.Linear, bl.EmpiricalBayes, PerturbX]


@pytest.fixture(autouse=True)
def without_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals take most of the time, and are not looked at here."""
    for cls in (bl.NoChange, PerturbX):
        monkeypatch.setattr(cls.__mro__[1], "_after_training", lambda self, rows, table: self.module.eval())


@pytest.fixture(scope="module")
def signatures() -> AnnData:
    """Additive but for a little; lines x and y are alike."""
    rng = np.random.default_rng(0)
    line = rng.normal(size=(3, N_GENES))
    own = rng.normal(size=(3, N, N_GENES))
    own[1] = own[0] + 0.1 * own[1]
    x = rng.normal(size=(N, N_GENES)) + line[:, None] + 0.5 * own
    obs = pd.DataFrame([(f"d{i}", c) for c in LINES for i in range(N)], columns=["drug", "line"])
    obs.index = [f"row{i}" for i in range(len(obs))]
    genes = pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)])
    return AnnData(x.reshape(-1, N_GENES).astype(np.float32), obs=obs, var=genes)


def _fit(cls: type, adata: AnnData, out: list[int], **options):
    cls.setup_anndata(adata, **SETUP)
    model = cls(adata, **options)
    train = np.setdiff1d(np.arange(adata.n_obs), out)
    model.train(datasplitter_kwargs={"external_indexing": [train]}, enable_progress_bar=False)
    return model


def _effect(model, drug: str, line: str) -> np.ndarray:
    table = model.get_perturbation_effect(drug)
    return table[table["context"] == line].set_index("gene").loc[model.gene_names, "lfc_mean"].to_numpy()


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_control_is_zero_and_no_row_is_read_but_in_training(signatures, cls):
    adata = signatures.copy()
    model = _fit(cls, adata, [3])
    expected = _effect(model, "d3", "x")
    # a row that was held out, one of the same drug and one of another: all are asked from a control of 0
    model.predict_perturbation("d3", key_added="p")
    np.testing.assert_allclose(adata.layers["p"][[0, 3, 5]], np.stack([expected] * 3), atol=1e-5)
    model.predict_perturbation("control", key_added="none")
    np.testing.assert_allclose(adata.layers["none"], 0.0, atol=1e-6)
    changed = adata.copy()
    changed.X[3] = 100.0
    np.testing.assert_allclose(_effect(_fit(cls, changed, [3]), "d3", "x"), expected, atol=1e-5)


def test_measured_effects_are_the_rows(signatures):
    for cls in (bl.NearestNeighbour, bl.Linear, PerturbX):
        model = _fit(cls, signatures.copy(), [3])
        np.testing.assert_allclose(_effect(model, "d4", "y"), signatures.X[N + 4], atol=1e-5)


def test_means_over_contexts_and_over_perturbations(signatures):
    x = signatures.X.reshape(3, N, N_GENES).astype(float)
    others = np.delete(np.arange(N), 3)
    expected = {
        bl.MeanEffect: x[1:, 3].mean(0),
        bl.ContextMean: x[0, others].mean(0),
        bl.TwoWayAdditive: x[1:, 3].mean(0) + x[0, others].mean(0) - x[1:, others].mean((0, 1)),
        bl.NearestNeighbour: x[1, 3],  # line y is like x
    }
    for cls, wanted in expected.items():
        np.testing.assert_allclose(_effect(_fit(cls, signatures.copy(), [3]), "d3", "x"), wanted, atol=1e-5)


def test_two_way_leaves_a_measured_condition_out(signatures):
    """It is a baseline of what is not known: the own value plays no part."""
    x = signatures.X.reshape(3, N, N_GENES).astype(float)
    others = np.delete(np.arange(N), 3)
    wanted = x[1:, 3].mean(0) + x[0, others].mean(0) - x[1:, others].mean((0, 1))
    np.testing.assert_allclose(_effect(_fit(bl.TwoWayAdditive, signatures.copy(), []), "d3", "x"), wanted, atol=1e-5)


def test_low_rank_completion_finds_a_table_of_low_rank():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(30, 2))
    x = np.concatenate([scores @ rng.normal(size=(2, N_GENES)) for _ in range(3)]).astype(np.float32)
    obs = pd.DataFrame([(f"d{i}", c) for c in LINES for i in range(30)], columns=["drug", "line"])
    obs.index = [f"row{i}" for i in range(len(obs))]
    adata = AnnData(x, obs=obs)
    out = [0, 4, 17]
    low, mean = (
        _fit(cls, adata.copy(), out, **o)
        for cls, o in ((bl.LowRankCompletion, {"n_components": 2}), (bl.MeanEffect, {}))
    )
    errors = [np.mean([(_effect(m, f"d{i}", "x") - x[i]) ** 2 for i in out]) for m in (low, mean)]
    assert errors[0] < 0.05 * errors[1]


def test_perturbx_learns_from_the_known_perturbations_of_a_context(signatures):
    held = [0, 1, 2]
    model, mean = (_fit(cls, signatures.copy(), held) for cls in (PerturbX, bl.MeanEffect))
    errors = [np.mean([(_effect(m, f"d{i}", "x") - signatures.X[i]) ** 2 for i in held]) for m in (model, mean)]
    assert errors[0] < 0.6 * errors[1]
    assert (model.shares == 0).all()


def test_a_saved_model_predicts_the_same_without_data(signatures, tmp_path):
    model = _fit(PerturbX, signatures.copy(), [3])
    expected = _effect(model, "d3", "x")
    model.save(tmp_path / "model")
    loaded = PerturbX.load(tmp_path / "model", adata=False)
    question = AnnData(
        np.zeros((1, N_GENES), np.float32), obs=pd.DataFrame({"drug": ["d0"], "line": ["x"]}, index=["q"])
    )
    question.var_names = signatures.var_names
    table = loaded.get_perturbation_effect("d3", adata=question)
    np.testing.assert_allclose(table["lfc_mean"], expected, atol=1e-5)


def test_replicates_are_averaged_and_give_errors(signatures):
    adata = signatures.copy()
    noisy = adata.copy()
    noisy.obs_names = [f"again{i}" for i in range(adata.n_obs)]
    noisy.X = noisy.X + np.float32(0.2)
    both = AnnData(np.concatenate([adata.X, noisy.X]), obs=pd.concat([adata.obs, noisy.obs]), var=adata.var)
    bl.NoChange.setup_anndata(both, **SETUP)
    manager = bl.NoChange(both).adata_manager
    table = ConditionTable.measure(manager, np.arange(both.n_obs), max_dose=np.ones(N), n_contexts=3)
    effects = table.effects()
    np.testing.assert_array_equal(table.controls, 0.0)
    at = int(np.flatnonzero((table.codes[table.treated, 0] == 0) & (table.context[table.treated] == 0))[0])
    np.testing.assert_allclose(effects.effect[at], adata.X[0] + 0.1, atol=1e-5)
    np.testing.assert_allclose(effects.noise, 0.5)  # of two rows; the control has no error
    np.testing.assert_allclose(effects.se, np.sqrt(0.02 / 2), rtol=1e-4)


def test_what_does_not_fit_is_refused(signatures):
    with pytest.raises(ValueError, match="`values`: SAMSVAE learns from single cells.*PerturbX"):
        SAMSVAE.setup_anndata(signatures.copy(), **SETUP)
    with pytest.raises(ValueError, match="`values` must be 'expression'"):
        PerturbX.setup_anndata(signatures.copy(), **{**SETUP, "values": "ranks"})
    with pytest.raises(ValueError, match="`control`: name the label"):
        PerturbX.setup_anndata(signatures.copy(), **{**SETUP, "values": "expression"})
    with pytest.raises(ValueError, match="`values`: effects are differences.*3 rows of .* are 'd0' themselves"):
        PerturbX.setup_anndata(signatures.copy(), control="d0", **SETUP)
    depth = signatures.copy()
    depth.obs["depth"] = 1.0
    with pytest.raises(ValueError, match="`size_factor_key`: effects have no library"):
        PerturbX.setup_anndata(depth, size_factor_key="depth", **SETUP)
    with pytest.raises(ValueError, match="was not seen in training"):
        _fit(PerturbX, signatures.copy(), []).get_perturbation_effect("d99")
