"""PerturbX finds what foretells a response, and falls back where nothing does."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from pertura.baseline import MeanEffect
from pertura.model import PerturbX
from pertura.module._perturbx import _STRENGTHS

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SETUP = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type"}
N_GENES = 60
MARKERS, RESPONSE = np.arange(3), np.arange(20, 40)


def responders(n_contexts: int = 14, *, informative: bool = True, seed: int = 0) -> tuple[AnnData, np.ndarray]:
    """Contexts with and without three marker genes; a drug moves twenty genes where they are expressed."""
    rng = np.random.default_rng(seed)
    responds = np.arange(n_contexts) % 2 == 0
    base = rng.normal(2.0, 0.3, size=(n_contexts, N_GENES))
    base[:, MARKERS] = np.where(responds[:, None], 3.0, 1.0) if informative else 2.0
    effect = np.zeros(N_GENES)
    effect[RESPONSE] = np.where(np.arange(20) % 2, 1.0, -1.0)
    parts, obs = [], []
    for context in range(n_contexts):
        for name, amount in (("control", 0.0), ("drug", 0.2 + 0.8 * responds[context])):
            parts.append(base[context] + amount * effect + rng.normal(0, 0.4, size=(40, N_GENES)))
            obs += [(name, f"line{context:02d}")] * 40
    adata = AnnData(
        np.concatenate(parts).astype(np.float32),
        obs=pd.DataFrame(obs, columns=["perturbation", "cell_type"], index=[f"cell{i}" for i in range(len(obs))]),
        var=pd.DataFrame(index=[f"g{j:02d}" for j in range(N_GENES)]),
    )
    return adata, responds


def without(adata: AnnData, contexts: list[str]) -> AnnData:
    treated = adata.obs["perturbation"] == "drug"
    return adata[~(treated & adata.obs["cell_type"].isin(contexts)).to_numpy()].copy()


def fit(adata: AnnData, cls=PerturbX, **options):
    cls.setup_anndata(adata, **SETUP)
    torch.manual_seed(0)
    model = cls(adata, **options)
    model.train(**(QUIET if cls is PerturbX else {}))
    return model


HELD = ["line00", "line01"]


@pytest.fixture(scope="module")
def trained() -> tuple[AnnData, PerturbX]:
    adata, _ = responders()
    return adata, fit(without(adata, HELD), n_selected=6, bag_size=16)


def effects(model, adata: AnnData) -> pd.DataFrame:
    own = adata[adata.obs["cell_type"].isin(HELD) & (adata.obs["perturbation"] == "control")].copy()
    table = model.get_perturbation_effect("drug", adata=own)
    return table.pivot(index="context", columns="gene", values="lfc_mean")[list(adata.var_names)]


def truth(adata: AnnData) -> pd.DataFrame:
    means = adata.to_df().groupby([adata.obs["cell_type"].astype(str), adata.obs["perturbation"].astype(str)]).mean()
    wide = means.unstack().swaplevel(axis=1)
    return (wide["drug"] - wide["control"]).loc[HELD]


def test_an_unseen_responder_is_told_from_a_non_responder(trained):
    adata, model = trained
    predicted, measured = effects(model, adata), truth(adata)
    size = predicted.iloc[:, RESPONSE].abs().mean(1)
    assert size["line00"] > 2.5 * size["line01"]
    mean = effects(fit(without(adata, HELD), MeanEffect), adata)
    for context in HELD:
        error = [((p.loc[context] - measured.loc[context]) ** 2).mean() for p in (predicted, mean)]
        assert error[0] < 0.5 * error[1]


def test_planted_markers_are_selected_and_important(trained):
    adata, model = trained
    markers = set(adata.var_names[MARKERS])
    selected = model.get_selected_genes()
    # of six rows among sixty genes: by chance a member has 0.3 markers
    assert len(markers & set(selected.index[selected["stability"] >= 0.4])) >= 2
    importance = model.get_gene_importance("drug")
    assert set(importance.index[:2]) <= markers
    assert importance["importance"].iloc[0] > 3 * importance["importance"].drop(list(markers), errors="ignore").max()


def test_importance_of_the_prediction_adds_up_to_it(trained):
    adata, model = trained
    table = model.get_gene_importance("drug", of="prediction", n_cells=112, n_samples=5)
    markers = set(adata.var_names[MARKERS])
    assert set(table.index[:3]) == markers
    assert (table.loc[list(markers), "direction"] > 0.9).all()
    assert len(table) == N_GENES

    # values of the regression are those of a linear function: together they are its change from the mean context
    module = model.module
    action = model._question_action("drug", 1)
    axis = model._effect_axes("drug")[0]
    module = copy.deepcopy(module)
    module.share.copy_(torch.tensor([1.0, 0.0, 1.0]))
    slope = module.regression_slope(action, axis)
    control = module.control + 0.1 * torch.randn(module.control.shape, generator=torch.Generator().manual_seed(0))
    asked = module._distinct(action, torch.zeros(1, dtype=torch.long))[0][0]
    weights = [module._from_others(asked, module.n_contexts, row)[1] for row in module.affinity(control).numpy()]
    along = module._sums(np.stack(weights))[0].double().numpy() @ axis
    told = control.double().numpy() @ slope
    np.testing.assert_allclose(along - along[0], told - told[0], atol=1e-4)


def test_importance_says_when_the_networks_have_no_share(trained, caplog):
    adata, model = trained
    share = model.module.share.clone()
    try:
        model.module.share.copy_(torch.tensor([0.0, 0.0, 1.0]))
        with caplog.at_level("WARNING"):
            model.get_gene_importance("drug", n_samples=1, n_cells=2)
        assert "of='prediction'" in caplog.text
        assert (model.get_gene_importance("drug", of="prediction")["importance"] == 0).all()
    finally:
        model.module.share.copy_(share)
    with pytest.raises(ValueError, match="`of`"):
        model.get_gene_importance("drug", of="effect")


def test_selector_is_hard_at_the_end(trained):
    _, model = trained
    selector = model.module.selector
    assert float(selector.temperature) == pytest.approx(0.1)
    assert (selector.certainty() > 0.95).all()
    assert (selector.entropy() < 0.2).all()


def test_representation_separates_responders(trained):
    adata, model = trained
    table = model.get_context_representation("drug")
    responds = np.array([int(name[4:]) % 2 == 0 for name in table.index])
    first = table["PC1"].to_numpy()
    gap = abs(first[responds].mean() - first[~responds].mean())
    assert gap > 2 * max(first[responds].std(), first[~responds].std())
    queried = model.get_context_representation("drug", adata=adata[adata.obs["cell_type"] == "line00"].copy())
    assert list(queried.index) == ["line00"]
    middle = (first[responds].mean() + first[~responds].mean()) / 2
    sign = np.sign(first[responds].mean() - middle)
    assert sign * (queried["PC1"].iloc[0] - middle) > 0


def test_without_signal_the_mean_effect_remains():
    """Whether a context responds is not in its control cells."""
    adata, _ = responders(informative=False, seed=1)
    train = without(adata, HELD)
    model = fit(train, n_selected=6, bag_size=16)
    assert float(model.module.share[:2].sum()) < 0.4
    measured = truth(adata)
    error = ((effects(model, adata) - measured) ** 2).mean(axis=None)
    mean = ((effects(fit(train, MeanEffect), adata) - measured) ** 2).mean(axis=None)
    assert error < 1.25 * mean


def test_training_contexts_choose_the_strength_of_the_regression():
    """The same choice by ridge regressions written out, each without the context it is judged on."""
    train = without(responders()[0], HELD)
    PerturbX.setup_anndata(train, **SETUP)
    model = PerturbX(train, n_selected=6, bag_size=16)
    model.train(max_epochs=1, **QUIET)  # the networks have no part in it
    module = model.module
    basis = module.basis.double().numpy()
    obs = model.adata.obs
    means = model.adata.to_df().groupby([obs["cell_type"].astype(str), obs["perturbation"].astype(str)]).mean()
    wide = means.unstack().swaplevel(axis=1)
    treated = wide["drug"].dropna().index
    control = wide["control"].loc[treated].to_numpy() @ basis
    effect = (wide["drug"] - wide["control"]).loc[treated].to_numpy() @ basis
    errors = []
    for strength in _STRENGTHS:
        target, told = [], []
        for i in range(len(treated)):
            others = np.delete(np.arange(len(treated)), i)
            centre, mean = control[others].mean(0), effect[others].mean(0)
            a = control[others] - centre
            penalty = strength * np.square(a).sum() / (len(others) - 1)
            told.append(
                (control[i] - centre)
                @ np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ (effect[others] - mean))
            )
            target.append(effect[i] - mean)
        target, told = np.ravel(target), np.ravel(told)
        share = np.clip(target @ told / (told @ told), 0, 1)
        errors.append(((target - share * told) ** 2).sum())
    assert float(module.regression_strength) == pytest.approx(_STRENGTHS[int(np.argmin(errors))])


def test_cells_get_their_own_expression_plus_the_effect(trained):
    adata, model = trained
    own = adata[(adata.obs["cell_type"] == "line00") & (adata.obs["perturbation"] == "control")].copy()
    predicted = model.predict_perturbation("drug", adata=own, return_anndata=True)
    moved = predicted.X - own.X
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:1], moved.shape), atol=1e-4)
    np.testing.assert_allclose(moved[0], effects(model, adata).loc["line00"], atol=1e-3)


def test_attention_is_of_control_cells_and_averages_to_one(trained):
    _, model = trained
    weight = model.get_attention("drug")
    treated = model.adata.obs["perturbation"] == "drug"
    assert weight[treated].isna().all()
    assert (weight[~treated] > 0).all()
    np.testing.assert_allclose(
        weight[~treated].groupby(model.adata.obs["cell_type"], observed=True).mean(), 1, rtol=1e-4
    )


def test_paper_preset_is_one_network(trained):
    adata, _ = trained
    train = without(adata, HELD)
    PerturbX.setup_anndata(train, **SETUP)
    model = PerturbX(train, preset="paper", n_selected=6, bag_size=16)
    module = model.module
    assert (module.n_members, module.rank, module.residual, module.n_folds) == (1, None, False, 1)
    assert module.selector.logits.shape == (1, 6, N_GENES)
    assert module.decoder_out.weight.shape[-1] == N_GENES
    model.train(max_epochs=2, **QUIET)
    assert module.share.tolist() == [0.0, 1.0, 0.0]


def test_loaded_model_describes_the_same_biomarkers(trained, tmp_path):
    _, model = trained
    model.save(tmp_path / "m")
    loaded = PerturbX.load(tmp_path / "m", adata=False, accelerator="cpu")
    pd.testing.assert_frame_equal(loaded.get_selected_genes(), model.get_selected_genes())
    pd.testing.assert_frame_equal(loaded.get_gene_importance("drug"), model.get_gene_importance("drug"))
    with pytest.raises(ValueError, match="`component` must be between"):
        loaded.get_gene_importance("drug", component=50)


def test_patients_that_the_model_has_never_met():
    """Their control cells, which come with the question, are enough."""
    adata, _ = responders()
    known = ~adata.obs["cell_type"].isin(HELD)
    model = fit(adata[known.to_numpy()].copy(), n_selected=6, bag_size=16)
    predicted, measured = effects(model, adata), truth(adata)
    size = predicted.iloc[:, RESPONSE].abs().mean(1)
    assert size["line00"] > 2.5 * size["line01"]
    for context in HELD:
        assert np.corrcoef(predicted.loc[context], measured.loc[context])[0, 1] > 0.7
    queried = model.get_context_representation("drug", adata=adata[~known.to_numpy()].copy())
    assert sorted(queried.index) == HELD
