"""Closed forms behind DrugAAE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from pertura.baseline._pseudobulk import Pseudobulk
from pertura.model._description import fit_effects, solve_effects
from pertura.model._description import hill as hill_of_arrays
from pertura.module import DrugAAE
from pertura.module._drugaae import hill
from pertura.nn import GeneEmbedding, fit_descriptions
from pertura.nn._descriptions import DescriptionEncoder
from pertura.nn._ridge import _LeaveOneOut, _slopes, correlations


def test_propagation_is_the_dense_formula():
    rng = np.random.default_rng(0)
    network = sparse.random(12, 12, 0.2, random_state=0)
    network = network + network.T
    layer = GeneEmbedding(12, 5, n_loadings=3, n_free=2, n_steps=3)
    layer.set_network(network)
    layer.loadings.copy_(torch.as_tensor(rng.normal(size=(12, 3))))
    with torch.no_grad():
        layer.step_logits.copy_(torch.tensor([0.3, -1.0, 0.5]))
        dense = network.toarray()
        np.fill_diagonal(dense, 1.0)
        degree = np.diag(dense.sum(1) ** -0.5)
        a = torch.as_tensor(degree @ dense @ degree, dtype=torch.float32)
        start = layer.mix(torch.cat([layer.free, layer.loadings], 1))
        gamma = layer.step_logits.softmax(0)
        expected = start + gamma[0] * a @ start + gamma[1] * a @ a @ start + gamma[2] * a @ a @ a @ start
        torch.testing.assert_close(layer(), expected)


def test_what_is_missing_of_a_description_is_left_out():
    torch.manual_seed(0)
    encoder, embedding = DescriptionEncoder(5, 3, 4), torch.randn(12, 5)
    signature, text = torch.randn(3, 12), torch.randn(3, 3)
    signature[1], text[2] = 0.0, 0.0  # row 1 has a text alone, row 2 a signature alone
    v, s, t = encoder.eval()(signature, text, embedding)
    gate = torch.sigmoid(encoder.gate(torch.cat([s, t], -1)))[0]
    torch.testing.assert_close(v, torch.stack([gate * s[0] + (1 - gate) * t[0], t[1], s[2]]))
    assert (encoder(torch.zeros(1, 12), torch.zeros(1, 3), embedding)[0] == 0).all()
    # in training either is taken away from those that have both, and from them alone
    both = encoder.train()(signature, text, embedding, (1.0, 0.0))[0]
    torch.testing.assert_close(both, torch.stack([t[0], t[1], s[2]]))
    both = encoder(signature, text, embedding, (0.0, 1.0))[0]
    torch.testing.assert_close(both, torch.stack([s[0], t[1], s[2]]))


def test_hill_is_0_at_0_and_1_at_1():
    dose = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0])
    for log_k, log_n in [(0.0, 0.0), (-1.0, 0.5), (1.0, -0.5)]:
        found = hill(dose, torch.tensor(log_k), torch.tensor(log_n))
        assert found[0] == 0 and found[3] == pytest.approx(1)
        assert (found.diff() > 0).all()
        np.testing.assert_allclose(found, hill_of_arrays(dose.numpy(), log_k, log_n), rtol=1e-5)


def test_left_out_predictions_are_those_of_fits_without_the_row():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 4))
    y = x @ rng.normal(size=(4, 10)) + 0.3 * rng.normal(size=(20, 10))
    found = fit_descriptions(x, y, [slice(0, 4)])
    assert found.gain > 0.3 and found.share > 0.8
    # ridge without row 0, by hand: the features' centre and scale stay those of all rows
    centre, scale = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).sum() / 20)
    z = (x - centre) / scale
    design = np.column_stack([np.ones(19), z[1:]])
    penalty = np.diag([0.0, *[found.penalty] * 4])
    beta = np.linalg.solve(design.T @ design + penalty, design.T @ y[1:])
    by_hand = np.r_[1.0, z[0]] @ beta
    mean = y[1:].mean(0)
    np.testing.assert_allclose(found.left_out[0], mean + found.share * (by_hand - mean), rtol=1e-6)


def test_a_signature_of_ones_own_genes_is_used_gene_by_gene():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(20, 30))
    signature = 0.5 * truth + 0.1 * rng.normal(size=truth.shape)
    genes = rng.permutation(30)
    own = fit_descriptions(signature[:, genes], truth, [slice(0, 30)], own=[genes])
    plain = fit_descriptions(signature[:, genes], truth, [slice(0, 30)])
    assert correlations(own.left_out, truth).mean() > 0.9
    assert correlations(own.left_out, truth).mean() > correlations(plain.left_out, truth).mean() + 0.05
    new = rng.normal(size=(5, 30))
    found = (0.5 * new)[:, genes] @ own.weight + own.intercept
    assert correlations(found, new).mean() > 0.9


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_left_out_predictions_gene_by_gene_are_those_of_fits_without_the_row(strength):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(15, 6, 2))
    x -= x.mean(0)
    y = (x * rng.normal(size=(6, 2))).sum(-1) + rng.normal(size=(15, 6))
    kernel = x.reshape(15, -1) @ x.reshape(15, -1).T
    found = _LeaveOneOut(kernel, 2.0, y, x)(_slopes(x, y, strength, left_out=True))
    for row in (0, 7):
        keep = np.arange(15) != row
        mean, own = y[keep].mean(0), x[keep]
        # by hand: common slopes, each gene's own towards them, ridge with an intercept on what is left
        common = np.linalg.lstsq(own.reshape(-1, 2), (y[keep] - mean).ravel(), rcond=None)[0]
        level = np.trace(own.reshape(-1, 2).T @ own.reshape(-1, 2)) / 2 / 6
        slopes = np.stack(
            [
                np.linalg.solve(
                    own[:, g].T @ own[:, g] + strength * level * np.eye(2),
                    own[:, g].T @ (y[keep, g] - mean[g]) + strength * level * common,
                )
                for g in range(6)
            ]
        )
        rest = y[keep] - (own * slopes).sum(-1)
        design = np.column_stack([np.ones(14), own.reshape(14, -1)])
        penalty = np.diag([0.0, *[2.0] * 12])
        beta = np.linalg.solve(design.T @ design + penalty, design.T @ rest)
        by_hand = np.r_[1.0, x[row].ravel()] @ beta + (x[row] * slopes).sum(-1)
        np.testing.assert_allclose(found[row], by_hand, rtol=1e-5)


def test_gene_by_gene_only_where_left_out_perturbations_bear_it_out():
    rng = np.random.default_rng(6)
    latent = rng.normal(size=(40, 2))
    signature = latent @ rng.normal(size=(2, 30)) + 0.5 * rng.normal(size=(40, 30))
    # the same two programmes move other genes: a gene's own value in the signature says nothing of it
    other = latent @ rng.normal(size=(2, 30)) + 0.1 * rng.normal(size=(40, 30))
    by_programme = fit_descriptions(signature, other, [slice(0, 30)], own=[np.arange(30)])
    assert by_programme.strength is None and by_programme.gain > 0.2
    gene_by_gene = fit_descriptions(signature, 0.5 * signature, [slice(0, 30)], own=[np.arange(30)])
    assert gene_by_gene.strength is not None


def test_planted_hill_curves_are_found():
    rng = np.random.default_rng(7)
    doses, log_k, log_n = np.array([0.04, 0.2, 0.5, 1.0]), -1.5, 0.5
    truth = rng.normal(size=(6, 20))
    codes = np.repeat(np.arange(6), 4)[:, None]
    dose = np.tile(doses, 6)[:, None]
    mean = hill_of_arrays(dose, log_k, log_n) * truth[codes[:, 0]] + 0.02 * rng.normal(size=(24, 20))
    stacked = np.concatenate([mean, np.zeros((1, 20))]).astype(np.float32)
    bulk = Pseudobulk(
        codes, dose, np.zeros(24, dtype=np.int64), stacked, np.full_like(stacked, 4e-4), np.ones(1, dtype=bool)
    )
    found = fit_effects(bulk, np.ones(6), 1, np.zeros((6, 0)), n_text=0, signatures=[], n_components=20)
    # where the module starts: its dose head maps these to log k and log n
    assert np.tanh(found["dose"]) * [2.0, 1.0] == pytest.approx([log_k, log_n], abs=0.01)
    np.testing.assert_allclose(found["effects"][:, 0] @ found["basis"].T, truth, atol=0.15)


def test_features_that_say_nothing_leave_the_mean_effect():
    rng = np.random.default_rng(3)
    found = fit_descriptions(rng.normal(size=(40, 8)), rng.normal(size=(40, 20)) + 1.0, [slice(0, 8)])
    assert found.share == 0 and not found.weight.any()


def test_effects_of_doses_and_combinations_are_solved_together():
    rng = np.random.default_rng(4)
    truth = 3 * rng.normal(size=(4, 6))
    design = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0.7]])
    found, _, _ = solve_effects(design, design @ truth, np.full((6, 6), 1e-6))
    assert correlations(found, truth).min() > 0.98


def test_every_parameter_is_in_exactly_one_optimiser():
    from types import SimpleNamespace

    from pertura.train import AdversarialPlan

    module = DrugAAE(8, 3, 2, 2, n_text=2, n_effect_components=4)
    plan = AdversarialPlan(module)
    plan._trainer = SimpleNamespace(max_epochs=3)
    first, second = plan.configure_optimizers()
    groups = [[id(p) for g in o.param_groups for p in g["params"]] for o in (first, second)]
    assert sorted(groups[0] + groups[1]) == sorted(id(p) for p in module.parameters())
    assert set(groups[1]) == {id(p) for p in module.discriminator.parameters()}


def test_adversary_counts_from_its_own_steps():
    from pertura.train import AdversarialPlan

    plan = AdversarialPlan(DrugAAE(8, 3), warmup_start=0.2, warmup_end=0.6)
    assert [plan.adversary_share(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
