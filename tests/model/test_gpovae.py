"""GPOVAE finds the planted network, and knocks out genes that nobody perturbed."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from pertura import datasets
from pertura.metrics import score_network
from pertura.model import GPOVAE
from pertura.module import HopsGPOVAE

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
KEYS = {"perturbation_key": "perturbation", "control": "control", "layer": "counts"}
SCREEN = {
    "n_cells_per_condition": 60,
    "n_genes": 80,
    "n_regulators": 20,
    "n_perturbations": 20,
    "n_contexts": 1,
    "n_unresponsive_contexts": 0,
    "n_truth_cells": 10,
    "seed": 2,
}


def fitted(adata, max_epochs=8, setup=None, **options):
    GPOVAE.setup_anndata(adata, **KEYS, **(setup or {}))
    torch.manual_seed(0)
    model = GPOVAE(adata, **{"n_latent": 6, "n_hidden": 32, **options})
    model.train(max_epochs=max_epochs, **QUIET)
    return model


def auprc(scores, adata, regulators):
    table = pd.DataFrame(np.abs(scores), index=list(regulators), columns=adata.var_names)
    return score_network(table, datasets.true_network(adata), regulators=list(regulators))["auprc"]


@pytest.fixture(scope="module")
def trained():
    return fitted(datasets.simulate(**SCREEN))


def test_the_network_is_better_than_shifts_and_correlation(trained):
    adata, names = trained.adata, trained.vocabulary.names
    module = trained.module
    rows = module.row_genes.numpy()
    z = module.shift_table * module.shift_precision.sqrt() * module.possible
    correlation = np.corrcoef(adata.X.toarray().T)[rows] * module.possible.numpy()
    grn = trained.get_grn(key_added=None)
    wide = grn.pivot(index="source", columns="target", values="weight").reindex(index=names, columns=adata.var_names)
    found = auprc(wide.fillna(0.0), adata, names)
    assert found > auprc(z.numpy(), adata, names) + 0.05
    assert found > auprc(correlation, adata, names) + 0.2
    assert np.isclose(found, trained.evaluate_grn(datasets.true_network(adata), regulators=list(names))["auprc"])


def test_single_profiles_are_warned_of():
    """Without replicates nothing says how exact shifts are."""
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(5)]
    for copies in (1, 2):
        labels = ["control"] * 6 + genes * copies
        adata = AnnData(rng.normal(size=(len(labels), 5)).astype(np.float32), var=pd.DataFrame(index=genes))
        adata.obs["perturbation"] = labels
        GPOVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
        model = GPOVAE(adata, n_latent=2, n_hidden=4)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model.train(1, **QUIET)
        assert any("single cell or profile" in str(w.message) for w in seen) == (copies == 1)


def test_measured_shifts_are_no_more_precise_than_the_floor(screen):
    model = fitted(screen(), max_epochs=1, shift_floor=2.0)
    precision = model.module.shift_precision
    assert precision.max() <= 0.25 and (precision > 0.05).any()


def test_effects_of_measured_perturbations_are_those_measured(trained):
    truth = datasets.true_effects(trained.adata).droplevel("cell_type")
    table = trained.get_perturbation_effect(list(truth.index), n_samples=4)
    found = table.pivot(index="perturbation", columns="gene", values="lfc_mean").loc[truth.index, truth.columns]
    every = np.ones(truth.shape, dtype=bool)
    assert pearson(found.to_numpy(), truth.to_numpy(), every) > 0.88
    assert ((found - truth) ** 2).to_numpy().mean() < 0.25 * (truth**2).to_numpy().mean()


def test_a_cell_under_its_own_perturbation_is_what_was_measured(trained):
    name, adata = trained.vocabulary.names[3], trained.adata
    rows = np.flatnonzero(adata.obs["perturbation"] == name)
    asked = {"indices": rows, "n_samples": 4, "ci": None, "scale": "counts", "return_anndata": True}
    np.testing.assert_array_equal(trained.predict_perturbation(name, **asked).X, adata.layers["counts"][rows].toarray())


def test_log_likelihood_of_a_cell_knows_its_perturbation(trained):
    rows = np.flatnonzero(trained.adata.obs["perturbation"] != "control")[::4]
    other = trained.adata.copy()
    other.obs["perturbation"] = np.roll(other.obs["perturbation"].to_numpy(object), 100)
    own, wrong = (trained.get_marginal_ll(adata, indices=rows, n_samples=10) for adata in (trained.adata, other))
    assert own.mean() > wrong.mean() + 3.0


def test_the_network_alone_explains_effects():
    """Without measured effects, the shifts of the network do nearly as well."""
    adata = datasets.simulate(**SCREEN)
    model = fitted(adata, max_epochs=4, effects="latent")
    truth = datasets.true_effects(adata).droplevel("cell_type")
    table = model.get_perturbation_effect(list(truth.index), n_samples=4)
    found = table.pivot(index="perturbation", columns="gene", values="lfc_mean").loc[truth.index, truth.columns]
    assert pearson(found.to_numpy(), truth.to_numpy(), np.ones(truth.shape, dtype=bool)) > 0.88
    assert model.module.gene_effects is None


def test_edges_have_probability_and_sign(trained):
    adata = trained.adata
    edges = trained.get_grn(top_k=100)
    assert {"source", "target", "weight", "proba"} <= set(edges)
    assert edges["proba"].between(0, 1).all()
    true = datasets.true_network(adata).set_index(["source", "target"])["weight"]
    both = edges.set_index(["source", "target"])["weight"].to_frame("found").join(true, how="inner")
    assert len(both) > 50 and (np.sign(both["found"]) == np.sign(both["weight"])).mean() > 0.95
    assert sparse.issparse(adata.varp["grn"]) and adata.varp["grn"].nnz == 100


@pytest.fixture(scope="module")
def held_out():
    """A screen in which every fourth regulator is not perturbed, and the effects that it would have had."""
    adata = datasets.simulate(**SCREEN)
    effects = datasets.true_effects(adata).droplevel("cell_type")
    names = sorted(effects.index)[::4]
    rest = adata[~adata.obs["perturbation"].isin(names).to_numpy()].copy()
    rest.obs["perturbation"] = rest.obs["perturbation"].astype(str)
    return rest, effects.loc[names]


def knocked_out(model, effects):
    """Predicted effects, and on which genes they are compared: all but the one knocked out."""
    controls = np.flatnonzero(model.adata.obs["perturbation"] == "control")[:150]
    table = model.get_perturbation_effect(list(effects.index), indices=controls, n_samples=10)
    wide = table.pivot(index="perturbation", columns="gene", values="lfc_mean").loc[effects.index, effects.columns]
    others = effects.columns.to_numpy()[None, :] != effects.index.to_numpy()[:, None]
    return wide.to_numpy(), others, table


def pearson(a, b, mask):
    return np.mean([np.corrcoef(x[m], y[m])[0, 1] for x, y, m in zip(a, b, mask, strict=True)])


def test_a_gene_that_nobody_perturbed_is_knocked_out(held_out):
    adata, effects = held_out
    truth = effects.to_numpy()
    model = fitted(adata.copy(), regulators=list(effects.index))
    predicted, others, table = knocked_out(model, effects)
    pair = f"{effects.index[0]}+{model.vocabulary.names[0]}"
    assert set(model.get_perturbation_effect(pair, n_samples=2)["novelty"]) == {"unseen with features"}
    assert set(table["novelty"]) == {"unseen with features"}
    seen = model.get_perturbation_effect(list(model.vocabulary.names[:5]), n_samples=10)
    with pytest.raises(ValueError, match="no regulator of the network. Name it in `regulators`"):
        model.get_perturbation_effect(next(g for g in adata.var_names if g not in model._rows))
    with pytest.raises(ValueError, match="'nobody' was not seen"):
        model.get_perturbation_effect("nobody")
    assert table["lfc_sd"].median() > 1.3 * seen["lfc_sd"].median()
    mean = np.tile(model.module.shift_table[: model.vocabulary.n_perturbations].mean(0).numpy(), (len(truth), 1))
    assert pearson(predicted, truth, others) > pearson(mean, truth, others) + 0.2
    error, unchanged = (((x - truth)[others] ** 2).mean() for x in (predicted, np.zeros_like(truth)))
    assert error < unchanged


def test_a_registered_perturbation_without_training_cells_is_the_network_s():
    """Another split, the same network: nothing was measured, so that the effect is what the network says."""
    adata = datasets.simulate(**SCREEN)
    GPOVAE.setup_anndata(adata, **KEYS)
    torch.manual_seed(0)
    model, name = GPOVAE(adata, n_latent=6, n_hidden=32), "TF05"
    out = adata.obs["perturbation"] == name
    split = [np.flatnonzero(~out), np.array([], dtype=int), np.flatnonzero(out)]
    model.train(max_epochs=3, datasplitter_kwargs={"external_indexing": split}, **QUIET)
    control = np.flatnonzero(adata.obs["perturbation"] == "control")[:100]
    table = model.get_perturbation_effect(name, indices=control, n_samples=10).set_index("gene")
    row = list(model.vocabulary.names).index(name)
    with torch.no_grad():
        total = model.module.total(model.module.mean_network())[row].numpy()
    assert np.corrcoef(table.loc[adata.var_names, "lfc_mean"], total)[0, 1] > 0.8
    assert not bool(model.module.gene_effects.measured.measured[row])


def grouped(seed=0, n_groups=6, size=4, n_genes=60, n_cells=25):
    """Counts of a screen in which regulators of a group have targets in common, their shifts, and features that tell the group."""
    rng = np.random.default_rng(seed)
    n = n_groups * size
    names, group = [f"R{i:02d}" for i in range(n)], np.arange(n) % n_groups
    common = rng.normal(0, 0.8, (n_groups, n_genes)) * (rng.random((n_groups, n_genes)) < 0.2)
    shift = common[group] + rng.normal(0, 0.4, (n, n_genes)) * (rng.random((n, n_genes)) < 0.1)
    shift[:, :n] = -3.0 * np.eye(n)
    number = [4 * n_cells, *[n_cells] * n]
    log = rng.normal(0, 1, n_genes) + np.repeat(np.vstack([np.zeros(n_genes), shift]), number, axis=0)
    x = rng.poisson(np.exp(log + rng.normal(0, 0.2, log.shape)) * rng.lognormal(1, 0.2, (len(log), 1)))
    adata = AnnData(x.astype(np.float32), var=pd.DataFrame(index=[*names, *(f"g{i}" for i in range(n_genes - n))]))
    adata.obs["perturbation"] = np.repeat(["control", *names], number)
    features = rng.normal(size=(n_groups, 8))[group] + 0.3 * rng.normal(size=(n, 8))
    return adata, pd.DataFrame(shift, names, adata.var_names), pd.DataFrame(features, names, list("abcdefgh"))


def test_features_tell_of_knockouts_that_nobody_made():
    """Right ones help effects, their sd and edges, with or without a row of the network; those of other genes change nothing."""
    adata, shift, features = grouped(2)
    unseen = list(shift.index[-6:])
    adata = adata[~adata.obs["perturbation"].isin(unseen).to_numpy()].copy()
    other = features.set_axis(np.random.default_rng(0).permutation(features.index))
    r, sd, edges = {}, {}, {}
    for name, table, rows in (("none", None, unseen), ("right", features, unseen[:3]), ("permuted", other, unseen)):
        own = adata.copy()
        if table is not None:
            own.uns["features"] = table
        key = None if table is None else "features"
        GPOVAE.setup_anndata(own, **{**KEYS, "layer": None}, perturbation_features_key=key)
        torch.manual_seed(0)
        model = GPOVAE(own, n_latent=4, n_hidden=16, regulators=rows)
        model.train(max_epochs=1, **QUIET)
        for part, names in (("row", unseen[:3]), ("no row", unseen[3:])):
            predicted, others, _ = knocked_out(model, shift.loc[names])
            r[name, part] = pearson(predicted, shift.loc[names].to_numpy(), others)
        at = model._rows.get_indexer(unseen[:3])
        sd[name] = float(model.module.gene_effects.measured.sd[at].square().mean())
        true = shift.loc[unseen[:3]].mask(shift.columns.to_numpy()[None] == np.array(unseen[:3])[:, None], 0.0)
        edges[name] = model.evaluate_grn(edge_list(true), regulators=unseen[:3], targets=list(shift.columns))["auprc"]
    for part in ("row", "no row"):
        assert r["right", part] > r["none", part] + 0.15
        assert abs(r["permuted", part] - r["none", part]) < 0.03
    assert sd["right"] < 0.7 * sd["none"]
    assert edges["right"] > edges["none"] + 0.05 and abs(edges["permuted"] - edges["none"]) < 0.02


def edge_list(wide):
    long = wide.rename_axis(index="source", columns="target").stack()
    return long[long != 0].reset_index()[["source", "target"]]


def test_features_and_the_network_after_saving(tmp_path):
    adata, shift, features = grouped(n_groups=3, n_genes=40, n_cells=15)
    unseen = [shift.index[-1], shift.index[-2]]
    adata = adata[~adata.obs["perturbation"].isin(unseen).to_numpy()].copy()
    adata.uns["features"] = features
    GPOVAE.setup_anndata(adata, **{**KEYS, "layer": None}, perturbation_features_key="features")
    model = GPOVAE(adata, n_latent=2, n_hidden=8, regulators=unseen[:1])
    model.train(max_epochs=1, **QUIET)
    model.save(tmp_path / "model")
    loaded = GPOVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    asked = {"adata": adata[:5].copy(), "n_samples": 4}
    for label in (*unseen, f"{unseen[0]}+{unseen[1]}", f"{unseen[1]}+{shift.index[0]}"):
        one, other = (m.get_perturbation_effect(label, **asked) for m in (model, loaded))
        pd.testing.assert_frame_equal(one, other)
        assert set(one["novelty"]) == {"unseen with features"} and (one["lfc_sd"] > 0).mean() > 0.9
    # trained on: what is known of them is learned again
    before = model.module.gene_effects.measured.mean.clone()
    model.train(max_epochs=1, **QUIET)
    torch.testing.assert_close(model.module.gene_effects.measured.mean, before, rtol=0.2, atol=0.05)


def test_few_knockouts_leave_the_network_alone():
    adata, shift, _ = grouped(n_groups=2, size=3, n_genes=30)
    adata = adata[adata.obs["perturbation"].isin(["control", "R00", "R01", "R02"]).to_numpy()].copy()
    GPOVAE.setup_anndata(adata, **{**KEYS, "layer": None})
    model = GPOVAE(adata, n_latent=2, n_hidden=8, regulators=["R05"])
    model.train(max_epochs=1, **QUIET)
    site = model.module.gene_effects
    with torch.no_grad():
        total = site.from_activation(model.module.total(model.module.mean_network()))[-1]
    assert np.corrcoef(site.measured.mean[-1], total)[0, 1] > 0.8 and (site.measured.sd[-1] > 0).all()


def test_a_prior_network_helps_if_right_and_does_no_harm_if_wrong(held_out):
    adata, effects = held_out
    truth = effects.to_numpy()
    right = sparse.csr_matrix(adata.varp["true_grn"] != 0).astype(float)
    wrong = sparse.csr_matrix(right[:, np.random.default_rng(0).permutation(adata.n_vars)])
    true, scores, found = datasets.true_network(adata), {}, {}
    for name, prior in (("none", None), ("right", right), ("wrong", wrong)):
        own = adata.copy()
        if prior is not None:
            own.varp["prior"] = prior
        setup = {"network_key": None if prior is None else "prior"}
        model = fitted(own, max_epochs=1, setup=setup, regulators=list(effects.index))
        predicted, others, _ = knocked_out(model, effects)
        scores[name] = pearson(predicted, truth, others)
        found[name] = model.evaluate_grn(true)["auprc"]
    assert found["right"] > found["none"] + 0.05 and scores["right"] > scores["none"] + 0.05
    assert found["wrong"] > found["none"] - 0.05 and scores["wrong"] > scores["none"] - 0.1


def test_saved_networks_load_without_the_prior(trained, held_out, tmp_path):
    adata, effects = held_out
    adata = adata.copy()
    adata.varp["prior"] = sparse.csr_matrix(adata.varp["true_grn"] != 0).astype(float)
    model = fitted(adata, max_epochs=1, setup={"network_key": "prior"})
    assert set(effects.index) <= set(model.get_grn(key_added=None)["source"])
    model.save(tmp_path / "model")
    loaded = GPOVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    pd.testing.assert_frame_equal(loaded.get_grn(), model.get_grn(key_added=None))
    asked = {"adata": adata[:5].copy(), "n_samples": 3, "return_anndata": True}
    one, other = (m.predict_perturbation(effects.index[0], **asked).X for m in (model, loaded))
    np.testing.assert_array_equal(one, other)
    without = adata.copy()
    del without.varp["prior"]
    again = GPOVAE.load(tmp_path / "model", adata=without, accelerator="cpu")
    before = again.module.shifts.loc.clone()
    again.train(max_epochs=1, **QUIET)
    assert not torch.equal(before, again.module.shifts.loc)


def test_artifacts_are_taken_away():
    small = {"n_cells_per_condition": 20, "n_genes": 50, "n_regulators": 6, "n_perturbations": 6}
    adata = datasets.simulate(**{**SCREEN, **small, "frac_qc_failed": 0.3, "n_artefact_genes": 8})
    adata.obs["failed"] = ~adata.obs["qc_pass"]
    model = fitted(adata, max_epochs=60, setup={"qc_key": "failed"}, batch_size=32)
    name, failed = model.vocabulary.names[0], adata.obs["failed"].to_numpy()
    asked = {"n_samples": 2, "ci": None, "return_anndata": True}
    own, removed = (model.predict_perturbation(name, artefact=a, **asked).X for a in ("own", "removed"))
    gap, left = (
        np.abs(x[failed].mean(0) - x[~failed].mean(0))[adata.var["is_artefact"].to_numpy()].mean()
        for x in (own, removed)
    )
    assert left < 0.5 * gap
    np.testing.assert_allclose(own[~failed], removed[~failed], atol=1e-5)


def test_paper_preset_is_that_of_the_paper(held_out):
    adata = held_out[0].copy()
    GPOVAE.setup_anndata(adata, **KEYS)
    model = GPOVAE(adata, preset="paper", n_hidden=16, n_particles=2, regulators=["TF01"])
    module = model.module
    assert isinstance(module, HopsGPOVAE) and module.n_latent == 100 and module.n_hops == 5
    torch.testing.assert_close(module.shifts.prior_logits.sigmoid().unique(), torch.tensor([0.3]))
    assert (module.alignment_weight, module.sparsity_weight) == (100.0, 5.0)
    assert model._plan_defaults()["lr"] == 3e-4 and model._default_batch_size(1000) == 512
    model.train(max_epochs=2, **QUIET)
    edges = model.get_grn(key_added=None)
    assert set(edges["source"]) <= {*model.vocabulary.names, "TF01"}
    np.testing.assert_allclose(edges["weight"], edges["proba"])
    assert float(module.share.sum()) > 0.5 and float(module.difference.max()) > 0.5
    with pytest.raises(ValueError, match="`perturbation`: 'TF01' was not seen"):
        model.get_perturbation_effect("TF01")
    with pytest.raises(ValueError, match="`effects='measured'` is not possible"):
        GPOVAE(adata, preset="paper", effects="measured")


def test_the_objective_of_the_paper_fits_differences(held_out):
    """Probabilities of edges go with how much genes differ from matched controls."""
    adata = held_out[0].copy()
    model = fitted(adata, max_epochs=12, objective="hops", alignment_weight=100.0, effect_lr_factor=5.0)
    module = model.module
    off = module.possible[: module.n_perturbations].numpy()
    found = module.accumulated().detach().numpy()[off]
    assert np.corrcoef(found, module.difference[:, 4].numpy()[off])[0, 1] > 0.7


def test_wrong_networks(held_out):
    adata = held_out[0].copy()
    with pytest.raises(ValueError, match="`network_key`: 'absent' is not a key"):
        GPOVAE.setup_anndata(adata, **KEYS, network_key="absent")
    adata.varp["prior"] = np.full((adata.n_vars, adata.n_vars), np.nan)
    with pytest.raises(ValueError, match="`network_key`.*finite"):
        GPOVAE.setup_anndata(adata, **KEYS, network_key="prior")
    GPOVAE.setup_anndata(adata, **KEYS)
    with pytest.raises(ValueError, match="`regulators`: 1 of 2"):
        GPOVAE(adata, regulators=["TF01", "absent"])
    with pytest.raises(ValueError, match="`regulators` must be a list"):
        GPOVAE(adata, regulators="TF01")
    with pytest.raises(ValueError, match="`objective` must be one of"):
        GPOVAE(adata, objective="loud")
