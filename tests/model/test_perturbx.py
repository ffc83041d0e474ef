"""PerturbX finds what predicts a response, and falls back where nothing does."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from pertura.baseline import MeanEffect
from pertura.model import PerturbX
from pertura.model import _perturbx_biomarkers as biomarkers

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
SETUP = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type"}
N_GENES = 60
MARKERS, RESPONSE = np.arange(3), np.arange(20, 40)


def responders(n_contexts: int = 16, *, informative: bool = True, seed: int = 0) -> tuple[AnnData, np.ndarray]:
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


# contexts whose treated cells are left out: of the first two controls train, of the others not even these
HELD, NEW = ["line00", "line01"], ["line02", "line03"]


def training_cells(adata: AnnData) -> AnnData:
    treated, line = adata.obs["perturbation"] == "drug", adata.obs["cell_type"]
    return adata[~((treated & line.isin(HELD)) | line.isin(NEW)).to_numpy()].copy()


def fit(adata: AnnData, cls=PerturbX, max_epochs: int | None = None, **options):
    cls.setup_anndata(adata, **SETUP)
    torch.manual_seed(0)
    model = cls(adata, **options)
    model.train(max_epochs, **QUIET)
    return model


@pytest.fixture(scope="module")
def trained() -> tuple[AnnData, PerturbX]:
    adata, _ = responders()
    return adata, fit(training_cells(adata), n_selected=6, bag_size=16)


def effects(model, adata: AnnData) -> pd.DataFrame:
    own = adata[adata.obs["cell_type"].isin([*HELD, *NEW]) & (adata.obs["perturbation"] == "control")].copy()
    table = model.get_perturbation_effect("drug", adata=own, n_samples=2)
    return table.pivot(index="context", columns="gene", values="lfc_mean")[list(adata.var_names)]


def truth(adata: AnnData) -> pd.DataFrame:
    means = adata.to_df().groupby([adata.obs["cell_type"].astype(str), adata.obs["perturbation"].astype(str)]).mean()
    wide = means.unstack().swaplevel(axis=1)
    return (wide["drug"] - wide["control"]).loc[[*HELD, *NEW]]


def test_an_unseen_responder_is_told_from_a_non_responder(trained):
    """Also where its control cells come with the question."""
    adata, model = trained
    predicted, measured = effects(model, adata), truth(adata)
    size = predicted.iloc[:, RESPONSE].abs().mean(1)
    assert min(size["line00"], size["line02"]) > 2.5 * max(size["line01"], size["line03"])
    mean = effects(fit(training_cells(adata), MeanEffect), adata)
    for context in (*HELD, *NEW):
        error = [((p.loc[context] - measured.loc[context]) ** 2).mean() for p in (predicted, mean)]
        assert error[0] < 0.5 * error[1]
    queried = model.get_context_representation("drug", adata=adata[adata.obs["cell_type"].isin(NEW)].copy())
    assert sorted(queried.index) == NEW


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
    asked = biomarkers.ask(model, "drug")
    axis = biomarkers.effect_axes(model, asked)[0]
    slope = module.regression_slope(asked, axis)
    control = module.means.control + 0.1 * torch.randn(
        module.means.control.shape, generator=torch.Generator().manual_seed(0)
    )
    weights = [module._from_others(asked, module.n_contexts, row) for row in module.affinity(control)]
    along = module.means.sums(np.stack(weights))[0].double().numpy() @ axis
    expected = control.double().numpy() @ slope
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(along - along[0], expected - expected[0], atol=1e-4)


def test_importance_says_when_the_neural_networks_have_no_share(trained, caplog):
    adata, model = trained
    share = model.module.share.clone()
    try:
        model.module.share.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
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
    train = training_cells(adata)
    model = fit(train, n_selected=6, bag_size=16, n_members=3, n_steps=300)
    assert model.shares.sum() < 0.4
    measured = truth(adata)
    error = ((effects(model, adata) - measured) ** 2).mean(axis=None)
    mean = ((effects(fit(train, MeanEffect), adata) - measured) ** 2).mean(axis=None)
    assert error < 1.25 * mean


def test_noise_of_controls_is_no_relation():
    """All contexts have the same effect: that noisy controls look further from treated cells is not to be learned."""
    shares = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        effect = rng.normal(0, 0.5, N_GENES)
        obs = [(name, f"line{c}") for c in range(10) for name in ("control", "drug") for _ in range(15)]
        x = rng.normal(2.0, 1.0, (len(obs), N_GENES)) + np.array([name == "drug" for name, _ in obs])[:, None] * effect
        adata = AnnData(x.astype(np.float32), obs=pd.DataFrame(obs, columns=["perturbation", "cell_type"]).astype(str))
        adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
        model = fit(adata, max_epochs=1, n_selected=6, bag_size=16, n_members=2)  # the bags have no part in it
        shares.append(model.shares["regression"])
    assert np.mean(shares) < 0.3


def test_contexts_that_come_together():
    """Treated cells are alike in all contexts, wherever these start: the control profile takes its part of the effect back."""
    rng = np.random.default_rng(0)
    base, effect = rng.normal(5.0, 0.5, (9, N_GENES)), rng.normal(0, 0.5, N_GENES)
    obs = [(name, f"line{c:02d}") for c in range(9) for name in ("control", "drug")[: 2 if c else 1] for _ in range(30)]
    moved = effect + 0.8 * (5.0 - base)
    x = [base[int(line[4:])] + (name == "drug") * moved[int(line[4:])] for name, line in obs]
    adata = AnnData(
        (np.stack(x) + rng.normal(0, 0.3, (len(obs), N_GENES))).astype(np.float32),
        obs=pd.DataFrame(obs, columns=["perturbation", "cell_type"]).astype(str),
    )
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    model = fit(adata, max_epochs=1, n_selected=6, bag_size=16, n_members=2)  # the bags have no part in it
    assert model.shares["convergence"] > 0.4
    error = ((effects(model, adata).loc["line00"] - moved[0]) ** 2).mean()
    assert error < 0.4 * ((effects(fit(adata, MeanEffect), adata).loc["line00"] - moved[0]) ** 2).mean()
    # what the prediction is explained by is what it is made of
    importance = model.get_gene_importance("drug", of="prediction")["importance"]
    assert (importance > 0).all()


def test_combinations_are_sums(trained):
    """Of what the members do in the context; where one was never measured alone, they are refused."""
    rng = np.random.default_rng(0)
    conditions = {"control": 0.0, "A": 1.0, "B": -2.0, "B+C": 3.0}
    obs = [(name, f"line{c}") for c in range(3) for name in conditions for _ in range(10)]
    x = rng.normal(5.0, 0.1, (len(obs), 8)) + np.array([conditions[name] for name, _ in obs])[:, None]
    adata = AnnData(x.astype(np.float32), obs=pd.DataFrame(obs, columns=["perturbation", "cell_type"]).astype(str))
    model = fit(adata, max_epochs=1, n_selected=4, bag_size=4, n_members=1, rank=4)
    table = model.get_perturbation_effect(["A+B", "B+C"], n_samples=2)
    found = table.groupby("perturbation")["lfc_mean"].mean()
    np.testing.assert_allclose([found["A+B"], found["B+C"]], [-1.0, 3.0], atol=0.1)
    with pytest.raises(ValueError, match="'A\\+C' was not measured, nor that of each member alone"):
        model.get_perturbation_effect("A+C")
    with pytest.raises(ValueError, match="'Q' was not seen in training"):
        model.get_perturbation_effect("Q")


def test_own_perturbation_gives_the_counts_back():
    rng = np.random.default_rng(0)
    obs = [(name, f"line{c}") for c in range(3) for name in ("control", "drug") for _ in range(12)]
    counts = rng.poisson(3.0, (len(obs), 20)).astype(np.float32)
    adata = AnnData(counts, obs=pd.DataFrame(obs, columns=["perturbation", "cell_type"]).astype(str))
    model = fit(adata, max_epochs=1, n_selected=4, bag_size=4, n_members=2, rank=4)
    rows = np.flatnonzero(adata.obs["perturbation"] == "drug")
    ask = {"indices": rows, "scale": "counts", "return_anndata": True, "n_samples": 2}
    np.testing.assert_array_equal(model.predict_perturbation("drug", **ask).X, counts[rows])
    for refused in (model.posterior_predictive_sample, model.get_marginal_ll):
        with pytest.raises(ValueError, match="no distribution of single cells"):
            refused()


def test_cells_get_their_own_expression_plus_the_effect(trained):
    adata, model = trained
    own = adata[(adata.obs["cell_type"] == "line00") & (adata.obs["perturbation"] == "control")].copy()
    predicted = model.predict_perturbation("drug", adata=own, return_anndata=True, n_samples=2)
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


def test_paper_preset(trained):
    adata, _ = trained
    model = fit(training_cells(adata), max_epochs=2, preset="paper", n_selected=6, bag_size=16)
    module = model.module
    assert (module.n_members, module.rank, module.residual, module.n_folds) == (1, None, False, 1)
    assert (module.duplicate_penalty, module.entropy_penalty, module.dropout.p) == (0, 0, 0)
    assert module.selector.logits.shape == (1, 6, N_GENES)
    assert module.decoder_out.weight.shape[-1] == N_GENES
    assert model.shares.tolist() == [0.0, 1.0, 0.0]
    # nothing but the bags predicts, also where the effect was measured
    table = model.get_perturbation_effect("drug", n_samples=2)
    own = table.loc[table["context"] == "line05", "lfc_mean"].to_numpy()
    asked = biomarkers.ask(model, "drug")
    at = model.contexts.index("line05")
    expected = module.predict_bags(module.action_of([asked]), module.bag[[at]])[0][0, 0].detach().numpy()
    np.testing.assert_allclose(own, expected, atol=1e-5)


def test_loaded_model_describes_the_same_biomarkers(trained, tmp_path):
    _, model = trained
    model.save(tmp_path / "m")
    loaded = PerturbX.load(tmp_path / "m", adata=False, accelerator="cpu")
    pd.testing.assert_frame_equal(loaded.get_selected_genes(), model.get_selected_genes())
    pd.testing.assert_frame_equal(loaded.get_gene_importance("drug"), model.get_gene_importance("drug"))
    with pytest.raises(ValueError, match="`component` must be between"):
        loaded.get_gene_importance("drug", component=50)


def test_contexts_that_respond_alike_get_the_mean_effect():
    """With 15 cells in an arm: the noise of control profiles is not taken for a relation to effects."""
    effect, errors, shares = np.zeros(100), [], []
    effect[:20] = np.where(np.arange(20) % 2, 1.0, -1.0)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        base = 2 + 0.5 * rng.normal(size=(11, 100))
        arms = [(c, p) for c in range(11) for p in ("control", "drug") if c < 10 or p == "control"]
        x = [base[c] + (p == "drug") * effect + rng.normal(size=(15, 100)) for c, p in arms]
        obs = pd.DataFrame(
            [(f"line{c:02d}", p) for c, p in arms for _ in range(15)], columns=["cell_type", "perturbation"]
        )
        adata = AnnData(np.concatenate(x).astype(np.float32), obs=obs.set_index(obs.index.astype(str)))
        query = adata[(obs["cell_type"] == "line10").to_numpy()].copy()
        own = {cls: fit(adata.copy(), cls, 5 if cls is PerturbX else None) for cls in (PerturbX, MeanEffect)}
        shares.append(own[PerturbX].shares.sum())
        tables = [m.get_perturbation_effect("drug", adata=query).set_index("gene") for m in own.values()]
        errors.append([((t["lfc_mean"].loc[adata.var_names].to_numpy() - effect) ** 2).sum() for t in tables])
    assert np.count_nonzero(shares) <= 1
    assert np.sum(errors, axis=0)[0] <= 1.02 * np.sum(errors, axis=0)[1]


def test_a_single_context_is_said(caplog):
    adata, _ = responders(2)
    PerturbX.setup_anndata(adata, **{**SETUP, "context_key": None})
    PerturbX(adata)
    assert "`context_key`" in caplog.text
    caplog.clear()
    PerturbX.setup_anndata(adata, **SETUP)
    PerturbX(adata)
    assert "`context_key`" not in caplog.text


# -- contexts of which something was measured ---------------------------------------------------------------------------

SMALL = {"n_members": 1, "n_hidden": 8, "n_selected": 4, "bag_size": 8}


def arms(
    n_new: dict[str, int], own_sd: float = 0.3, shift_sd: float = 0.0, seed: int = 0
) -> tuple[AnnData, np.ndarray]:
    """Perturbations A, B, … in five contexts, in the first with few cells or none; true effects there."""
    rng = np.random.default_rng(seed)
    mean, shift = rng.normal(0, 0.5, (len(n_new), N_GENES)), shift_sd * rng.normal(size=(5, N_GENES))
    effect = mean + shift[:, None] + own_sd * rng.normal(size=(5, len(n_new), N_GENES))
    base = 5 + rng.normal(0, 0.7, (5, N_GENES))
    x, obs = [], []
    for c in range(5):
        number = {"control": 40, **{name: n if c == 0 else 40 for name, n in n_new.items()}}
        for i, (name, n) in enumerate(number.items()):
            moved = base[c] + (effect[c, i - 1] if i else 0.0)
            x.append(moved + 0.7 * rng.normal(size=(n, N_GENES)))
            obs += [(name, f"line{c:02d}")] * n
    obs = pd.DataFrame(obs, columns=["perturbation", "cell_type"], index=[f"cell{i}" for i in range(len(obs))])
    genes = pd.DataFrame(index=[f"g{j:02d}" for j in range(N_GENES)])
    return AnnData(np.concatenate(x).astype(np.float32), obs=obs, var=genes), effect[0]


def error_here(model, name: str, truth: np.ndarray) -> float:
    table = model.get_perturbation_effect(name, n_samples=2)
    own = table[table["context"] == "line00"].set_index("gene").loc[model.gene_names, "lfc_mean"]
    return float(((own - truth) ** 2).mean())


def test_few_cells_of_a_context_are_weighed_with_what_others_say():
    """Better than these cells alone, and than the other contexts alone; as measured where that is asked for."""
    adata, truth = arms({"A": 4})
    few, raw = (fit(adata, PerturbX, 1, target=target, **SMALL) for target in ("mse", "de"))
    own = fit(adata, MeanEffect, use_own_context=True)
    measured = error_here(own, "A", truth[0])
    assert error_here(raw, "A", truth[0]) == pytest.approx(measured, rel=1e-4)
    here = ((adata.obs["cell_type"] == "line00") & (adata.obs["perturbation"] == "A")).to_numpy()
    elsewhere = error_here(fit(adata[~here].copy(), MeanEffect), "A", truth[0])
    assert error_here(few, "A", truth[0]) < 0.85 * min(measured, elsewhere)


def test_known_perturbations_of_a_context_tell_of_another():
    names = "ABCDE"
    adata, truth = arms({**dict.fromkeys(names[1:], 40), "A": 0}, own_sd=0.1, shift_sd=0.6)
    model, mean = fit(adata, PerturbX, 1, **SMALL), fit(adata, MeanEffect)
    assert error_here(model, "A", truth[-1]) < 0.3 * error_here(mean, "A", truth[-1])
