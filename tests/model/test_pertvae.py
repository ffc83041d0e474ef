"""PertVAE finds what was planted."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from pertura import datasets
from pertura.model import PertVAE
from pertura.module._departures import Departures

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
KEYS = {"perturbation_key": "perturbation", "control": "control", "layer": "counts", "context_key": "cell_type"}
SMALL = {"n_genes": 60, "n_regulators": 10, "library_size": 4000.0, "n_truth_cells": 300}


def _compare(model, adata, labels=None):
    """Predicted beside planted effects: one row per perturbation, context and gene."""
    truth = datasets.true_effects(adata).rename_axis(["perturbation", "context"])
    truth = truth if labels is None else truth.loc[labels]
    names = list(truth.index.get_level_values(0).unique())
    table = model.get_perturbation_effect(names, adata=adata)
    long = truth.rename_axis("gene", axis=1).stack().rename("truth").reset_index()
    return table.merge(long, on=["perturbation", "context", "gene"])


def _pearson(table):
    active = table.groupby(["perturbation", "context"]).filter(lambda t: t["truth"].abs().max() > 0.3)
    groups = active.groupby(["perturbation", "context"])[["lfc_mean", "truth"]]
    return groups.apply(lambda t: np.corrcoef(t["lfc_mean"], t["truth"])[0, 1]).mean()


def _coverage(table):
    return ((table["ci_low"] <= table["truth"]) & (table["truth"] <= table["ci_high"])).mean()


@pytest.fixture(scope="module")
def screen():
    return datasets.simulate(
        n_cells_per_condition=60, n_perturbations=3, combinations=1, n_contexts=2, n_batches=2, seed=1, **SMALL
    )


@pytest.fixture(scope="module")
def trained(screen):
    """Trained without the combination."""
    adata = screen[~screen.obs["perturbation"].str.contains("+", regex=False)].copy()
    PertVAE.setup_anndata(adata, batch_key="batch", **KEYS)
    torch.manual_seed(0)
    model = PertVAE(adata, n_latent=10, n_flow_hidden=16)
    model.train(max_epochs=80, batch_size=64, **QUIET)
    return model


def test_planted_effects_are_found_with_honest_intervals(screen, trained):
    singles = [p for p in screen.obs["perturbation"].unique() if p != "control" and "+" not in p]
    table = _compare(trained, screen[screen.obs["perturbation"] == "control"].copy(), singles)
    assert (table["novelty"] == "seen").all()
    assert _pearson(table) >= 0.9
    assert 0.8 <= _coverage(table) <= 0.97


def test_a_new_combination_is_the_sum_and_less_certain(screen, trained):
    combination = [p for p in screen.obs["perturbation"].unique() if "+" in p]
    controls = screen[screen.obs["perturbation"] == "control"].copy()
    table = _compare(trained, controls, combination)
    assert (table["novelty"] == "new combination").all()
    assert _pearson(table) >= 0.9
    singles = trained.get_perturbation_effect(combination[0].split("+"), adata=controls)
    sd = singles.groupby(["context", "gene"])["lfc_sd"].max()
    combined = table.set_index(["context", "gene"])["lfc_sd"]
    assert combined.mean() > sd.reindex(combined.index).mean()


@pytest.mark.slow
def test_a_context_nobody_treated():
    adata = datasets.simulate(
        n_cells_per_condition=80, n_perturbations=1, n_contexts=6, n_unresponsive_contexts=2, seed=2, **SMALL
    )
    held_out = next(c for c in adata.obs["cell_type"].unique() if _response(adata, c) > 0.5)
    treated = (adata.obs["perturbation"] != "control") & (adata.obs["cell_type"] == held_out)
    train = adata[~treated.to_numpy()].copy()
    PertVAE.setup_anndata(train, **KEYS)
    model = PertVAE(train, n_latent=10, n_flow_hidden=16)
    model.train(max_epochs=70, **QUIET)
    table = _compare(model, adata)
    # its response lies between those of five others: less is known of it than of a context with treated cells
    assert _pearson(table[table["context"] == held_out]) >= 0.85
    new, seen = (table[(table["context"] == held_out) == flag] for flag in (True, False))
    assert new["lfc_sd"].mean() > seen["lfc_sd"].mean()
    assert _coverage(new) >= 0.8


def _response(adata, context):
    contexts = adata.uns["truth"]["contexts"]
    contexts = contexts if isinstance(contexts, pd.DataFrame) else pd.DataFrame(contexts)
    column = contexts.columns[0]
    rows = contexts if context in contexts.index else contexts.set_index(column)
    return float(rows.loc[context, "response_factor"])


@pytest.mark.slow
def test_singletons_do_not_hurt_the_latent_space():
    """With few pairs and many cells without a partner, held-out cells are described at least as well."""
    adata = datasets.simulate(n_cells_per_condition=150, n_perturbations=1, n_contexts=4, seed=3, **SMALL)
    contexts = adata.obs["cell_type"].to_numpy()
    first = np.unique(contexts)[0]
    # only one context was ever treated; the others are controls alone
    adata = adata[(adata.obs["perturbation"] == "control").to_numpy() | (contexts == first)].copy()
    rng = np.random.default_rng(0)
    order = rng.permutation(adata.n_obs)
    split = [order[: int(0.7 * len(order))], order[int(0.7 * len(order)) :]]
    PertVAE.setup_anndata(adata, **KEYS)
    losses = {}
    for singletons in (True, False):
        model = PertVAE(adata, n_latent=8, n_flow_hidden=16, singletons=singletons)
        model.train(max_epochs=40, datasplitter_kwargs={"external_indexing": split}, **QUIET)
        # both are judged on all validation cells
        losses[singletons] = _validation_loss(model, np.sort(split[1]))
    assert losses[True] <= losses[False]


def _validation_loss(model, rows):
    from pertura.data._datamodule import PerturbationDataModule
    from pertura.train import FreeBitsELBO

    data = PerturbationDataModule(model.adata_manager, rows, rows[:0], batch_size=10**6)
    (batch,) = data.train_dataloader()
    (cells, n_pairs), _ = model.module._get_fn_args_from_batch(batch)
    torch.manual_seed(0)
    with torch.no_grad():
        loss = FreeBitsELBO(num_particles=5).differentiable_loss(model.module.model, model.module.guide, cells, n_pairs)
    return float(loss) / len(rows)


def test_explicit_pairs_of_bulk_profiles():
    adata = datasets.simulate(
        n_cells_per_condition=40, n_perturbations=1, n_contexts=3, modality="log", paired=True, seed=4, **SMALL
    )
    PertVAE.setup_anndata(
        adata, perturbation_key="perturbation", control="control", context_key="cell_type", pair_key="pair"
    )
    model = PertVAE(adata, n_latent=8, n_flow_hidden=16)
    assert model.pairing == "pairs"
    assert model.module.effect_input == "cell"
    model.train(max_epochs=60, batch_size=64, **QUIET)
    table = _compare(model, adata[adata.obs["perturbation"] == "control"].copy())
    assert _pearson(table) >= 0.9


@pytest.mark.slow
def test_features_predict_new_perturbations():
    """Effects are linear in features: a perturbation that training never saw is told apart from the mean effect."""
    rng = np.random.default_rng(0)
    adata = datasets.simulate(n_cells_per_condition=60, n_perturbations=1, n_contexts=1, seed=5, **SMALL)
    control = adata[adata.obs["perturbation"] == "control"].copy()
    genes = control.n_vars
    directions = rng.normal(size=(2, genes)) * 0.8
    features = pd.DataFrame(rng.normal(size=(14, 2)), index=[f"P{i:02d}" for i in range(14)])
    rate = control.layers["counts"].toarray().mean(0) + 0.5
    counts, labels = [], []
    for name, row in [("control", np.zeros(2)), *zip(features.index, features.to_numpy(), strict=True)]:
        expected = rate * np.exp(row @ directions)
        counts.append(rng.poisson(3000 * expected / expected.sum(), size=(60, genes)))
        labels += [name] * 60
    from anndata import AnnData

    adata = AnnData(np.concatenate(counts).astype(np.float32), obs=pd.DataFrame({"perturbation": labels}))
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    adata.uns["features"] = features
    new = ["P12", "P13"]
    train = adata[~adata.obs["perturbation"].isin(new)].copy()
    PertVAE.setup_anndata(
        train, perturbation_key="perturbation", control="control", perturbation_features_key="features"
    )
    model = PertVAE(train, n_latent=8, n_flow_hidden=16)
    model.train(max_epochs=100, **QUIET)
    table = model.get_perturbation_effect(new)
    assert (table["novelty"] == "unseen with features").all()
    x = np.log1p(1e4 * adata.X / adata.X.sum(1, keepdims=True))
    means = pd.DataFrame(x, columns=adata.var_names).groupby(adata.obs["perturbation"].to_numpy()).mean()
    effects = means.sub(means.loc["control"])
    mean_effect = effects.drop(index=["control", *new]).mean()
    for name in new:
        own = table[table["perturbation"] == name].set_index("gene")["lfc_mean"].reindex(effects.columns)
        assert np.corrcoef(own, effects.loc[name])[0, 1] > 0.8
        assert ((own - effects.loc[name]) ** 2).mean() < ((mean_effect - effects.loc[name]) ** 2).mean()
    seen = model.get_perturbation_effect("P00")
    assert table["lfc_sd"].mean() > seen["lfc_sd"].mean()


def test_own_counts_come_back_and_effects_are_the_mean_change_of_controls(trained):
    adata = trained.adata
    name = next(p for p in adata.obs["perturbation"].unique() if p != "control")
    own = np.flatnonzero(adata.obs["perturbation"] == name)
    counts = adata.layers["counts"][own]
    counts = counts.toarray() if sparse.issparse(counts) else counts
    result = trained.predict_perturbation(name, indices=own, scale="counts", ci=None, return_anndata=True)
    np.testing.assert_array_equal(result.X, counts)
    controls = np.flatnonzero((adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "context_1"))
    predicted = trained.predict_perturbation(name, indices=controls, ci=None, return_anndata=True, seed=1)
    raw = adata.layers["counts"][controls]
    raw = raw.toarray() if sparse.issparse(raw) else raw
    change = predicted.X.mean(0) - np.log1p(1e4 * raw / raw.sum(1, keepdims=True)).mean(0)
    table = trained.get_perturbation_effect(name, indices=controls, seed=2).set_index("gene")["lfc_mean"]
    np.testing.assert_allclose(table.reindex(adata.var_names), change, atol=0.05)


@pytest.mark.parametrize("likelihood", ["nb", "normal"])
def test_errors_of_reconstruction_are_no_effects(likelihood):
    """Of a model that reconstructs controls badly and learned no effect, neither the table nor predictions have one."""
    adata = datasets.simulate(
        n_cells_per_condition=15, n_perturbations=2, n_contexts=2, **{**SMALL, "n_truth_cells": 5}
    )
    adata.layers["bulk"] = np.log1p(adata.layers["counts"].toarray()).astype(np.float32)
    layer = "counts" if likelihood == "nb" else "bulk"
    PertVAE.setup_anndata(adata, **{**KEYS, "layer": layer})
    model = PertVAE(adata, n_latent=3, encoder_hidden=(8,), likelihood=likelihood)
    model.train(max_epochs=1, **QUIET)
    model.module.departures.clear()
    with torch.no_grad():
        model.module.likelihood.linear.bias += torch.randn(adata.n_vars)
        for name, value in model.module.named_parameters():
            if name in ("effect_U", "effect_b", "effect_common"):
                value.zero_()
    asked = {
        "perturbation": model.vocabulary.names[0],
        "indices": np.flatnonzero(adata.obs["perturbation"] == "control"),
    }
    table = model.get_perturbation_effect(**asked, n_samples=4)
    np.testing.assert_allclose(table["lfc_mean"], 0.0, atol=1e-3)
    treated = np.flatnonzero(adata.obs["perturbation"] == model.vocabulary.names[0])
    np.testing.assert_allclose(
        model.get_perturbation_effect(**asked | {"indices": treated})["lfc_mean"], 0.0, atol=1e-3
    )
    found = model.predict_perturbation(
        model.vocabulary.names[0],
        indices=asked["indices"],
        return_anndata=True,
        n_samples=4,
        scale="layer" if likelihood == "normal" else "counts",
    )
    own = adata.layers[layer][asked["indices"]]
    np.testing.assert_allclose(found.X, own.toarray() if sparse.issparse(own) else own, atol=2e-3)


def test_log_likelihood_of_a_cell_knows_its_perturbation(trained):
    adata = trained.adata
    treated = np.flatnonzero(adata.obs["perturbation"] != "control")
    own = trained.get_marginal_ll(indices=treated, n_samples=20)
    other = adata.copy()
    other.obs["perturbation"] = "control"
    assert own.mean() > trained.get_marginal_ll(other, indices=treated, n_samples=20).mean() + 0.1


def test_intervals_of_cells_hold_the_noise_of_the_transition(trained):
    """Noise taken out of the model leaves means alone and makes the intervals of single cells narrower."""
    name = next(p for p in trained.adata.obs["perturbation"].unique() if p != "control")
    rows = np.flatnonzero(trained.adata.obs["perturbation"] == "control")[:40]
    options = {"indices": rows, "return_anndata": True, "n_samples": 50}
    noisy = trained.predict_perturbation(name, **options)
    log_scale = trained.module.effect_log_scale
    kept = log_scale.detach().clone()
    try:
        log_scale.data.fill_(-20.0)
        plain = trained.predict_perturbation(name, **options)
    finally:
        log_scale.data.copy_(kept)
    np.testing.assert_array_equal(noisy.X, plain.X)

    def width(result):
        return (result.layers["high"] - result.layers["low"]).mean()

    assert width(noisy) > 1.1 * width(plain)


def test_paper_preset_is_the_architecture_and_schedule_of_the_paper(screen):
    single = next(p for p in screen.obs["perturbation"].unique() if p != "control" and "+" not in p)
    adata = screen[screen.obs["perturbation"].isin(["control", single])].copy()
    PertVAE.setup_anndata(adata, **KEYS)
    model = PertVAE(adata, preset="paper", likelihood="normal")
    module, flow = model.module, model.module.flow
    assert [m.out_features for m in module.encoder if hasattr(m, "out_features")] == [500, 300]
    # mean and scale beside the units of the flow, all from the second layer
    assert [layer.in_features for layer in (flow.loc, flow.log_scale, flow.context[0])] == [300] * 3
    assert (flow.context[0].out_features, flow.loc.out_features) == (200, 100)
    assert [m.out_features for m in module.decoder if hasattr(m, "out_features")] == [300, 500]
    assert [step.nn.hidden_dims for step in flow.steps] == [[300], [300]]
    assert module.effect_W().shape == (1, 100, 100)
    assert not module.effect_W().any() and not module.effect_b.any()
    assert module.effect_input == "cell" and module.effect_log_scale_slope is not None
    for part in (module.encoder, flow, module.decoder, module.likelihood):
        layers = [m for m in part.modules() if isinstance(m, torch.nn.Linear)]
        assert layers and all(hasattr(layer, "parametrizations") for layer in layers)
    plan = model._plan_defaults()
    assert (plan["lr_schedule"], plan["n_epochs_kl_warmup"], plan["weight_decay"]) == ("constant", None, 0.0)
    assert plan["loss_fn"].free_nats == {"z1": 2.0, "z2": 2.0}
    assert PertVAE(adata, preset="paper", n_latent=20).module.n_latent == 20


@pytest.mark.parametrize("pairing", ["random", "ot"])
def test_partners_are_controls_of_the_same_context_and_batch(screen, pairing):
    adata = screen.copy()
    PertVAE.setup_anndata(adata, batch_key="batch", **KEYS)
    model = PertVAE(adata, n_latent=4, pairing=pairing)
    rows = np.arange(adata.n_obs)
    data = model._data_module(rows, rows[:0], 64, 0)
    table = model._measure(rows, data)
    model._initialize(data, table)
    coupling = data.train_dataloader().sampler.coupling
    assert (coupling.cumulative is None) == (pairing == "random")
    assert set(coupling.treated) == set(np.flatnonzero(adata.obs["perturbation"] != "control"))
    partners = coupling.draw(np.random.default_rng(0))
    assert (adata.obs["perturbation"].to_numpy()[partners] == "control").all()
    for key in ("cell_type", "batch"):
        same = adata.obs[key].to_numpy()
        assert (same[partners] == same[coupling.treated]).all()


def test_new_contexts_are_described_by_their_own_controls(trained, monkeypatch):
    """A context under another name has the same effect, but for what was measured in it; one of other cells another."""
    monkeypatch.setattr(trained.module, "departures", Departures(trained.adata.n_vars))
    name = next(p for p in trained.adata.obs["perturbation"].unique() if p != "control")
    controls = trained.adata[trained.adata.obs["perturbation"] == "control"].copy()
    known = controls[controls.obs["cell_type"] == "context_1"].copy()
    other = controls[controls.obs["cell_type"] != "context_1"].copy()
    renamed = [part.copy() for part in (known, other)]
    for part in renamed:
        part.obs["cell_type"] = "new"
    effects = [trained.get_perturbation_effect(name, adata=a)["lfc_mean"] for a in (known, *renamed)]
    np.testing.assert_allclose(effects[0], effects[1], atol=0.02)
    assert np.abs(effects[0] - effects[2]).max() > 0.02


def test_profiles_of_contexts_are_of_either_half_of_their_controls(monkeypatch):
    """The half of a control cell in a minibatch is that of the profile which it is in."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"p": ["ctrl"] * 11 + ["drug"] * 9, "c": "x"})
    obs = pd.concat([obs, obs.assign(c="y")], ignore_index=True)
    obs.index = obs.index.astype(str)
    adata = AnnData(rng.normal(size=(40, 12)).astype(np.float32), obs=obs)
    PertVAE.setup_anndata(adata, perturbation_key="p", control="ctrl", context_key="c")
    model, seen = PertVAE(adata, n_latent=2, encoder_hidden=(4,), n_flow_steps=0), {}
    before = type(model.module)._get_fn_args_from_batch

    def spy(batch):
        args, given = before(batch)
        n = len(args[0]) - args[1]
        seen.update({tuple(x.tolist()): int(h) for x, h in zip(args[0].x[:n], given["half"][:n, 0], strict=True)})
        return args, given

    monkeypatch.setattr(type(model.module), "_get_fn_args_from_batch", staticmethod(spy))
    model.train(max_epochs=1, accelerator="cpu", train_size=1.0)
    half = np.array([seen.get(tuple(x.tolist()), -1) for x in adata.X])
    for i, context in enumerate(model.contexts):
        for h in (0, 1):
            own = adata.X[((obs["p"] == "ctrl") & (obs["c"] == context)).to_numpy() & (half == h)]
            assert len(own) in (5, 6)
            expected = model._projected(own.mean(0, keepdims=True), np.array([True]))
            torch.testing.assert_close(model.module.half_profile[[2 * h + i]], expected, atol=1e-4, rtol=1e-4)
