"""Effects from features of perturbations: closed forms against fits without the left-out row."""

import numpy as np
import pytest

from pertura.effects import fit_features
from pertura.effects._contexts import Asked
from pertura.effects._features import _LeaveOneOut, _slopes, correlations, label_features, linear_slope, member_features


def test_left_out_predictions_are_those_of_fits_without_the_row():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 4))
    y = x @ rng.normal(size=(4, 10)) + 0.3 * rng.normal(size=(20, 10))
    found = fit_features(x, y)
    assert found.gain > 0.3 and found.share > 0.8
    # ridge without row 0, by hand: the features' center and scale stay those of all rows
    center, scale = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).sum() / 20)
    z = (x - center) / scale
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
    own = fit_features(signature[:, genes], truth, [slice(0, 30)], own=[genes])
    plain = fit_features(signature[:, genes], truth, [slice(0, 30)])
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


def test_gene_by_gene_only_where_left_out_perturbations_support_it():
    rng = np.random.default_rng(6)
    latent = rng.normal(size=(40, 2))
    signature = latent @ rng.normal(size=(2, 30)) + 0.5 * rng.normal(size=(40, 30))
    # the same two programs move other genes: a gene's own value in the signature says nothing of it
    other = latent @ rng.normal(size=(2, 30)) + 0.1 * rng.normal(size=(40, 30))
    by_program = fit_features(signature, other, [slice(0, 30)], own=[np.arange(30)])
    assert by_program.strength is None and by_program.gain > 0.2
    gene_by_gene = fit_features(signature, 0.5 * signature, [slice(0, 30)], own=[np.arange(30)])
    assert gene_by_gene.strength is not None


def test_features_that_say_nothing_leave_the_mean_effect():
    rng = np.random.default_rng(3)
    found = fit_features(rng.normal(size=(40, 8)), rng.normal(size=(40, 20)) + 1.0, [slice(0, 8)])
    assert found.share == 0 and not found.weight.any()


def test_without_features_the_mean_effect_is_all_there_is():
    effects = np.random.default_rng(4).normal(size=(10, 3))
    found = fit_features(np.zeros((10, 0)), effects)
    np.testing.assert_allclose(found.intercept, effects.mean(0))
    np.testing.assert_allclose(found.left_out[2], np.delete(effects, 2, 0).mean(0))


def test_features_of_a_combination_are_the_sum_of_its_members():
    known = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    codes = np.array([[0, -1], [0, 1], [1, 2]])
    found, described = label_features(codes, known, np.array([[1.0, 5.0], [1.0, 0.5], [1.0, 1.0]]))
    np.testing.assert_allclose(found[:2], [[1, 0], [1, 1]])
    assert described.tolist() == [True, True, False]


def test_features_of_unseen_members_are_those_that_are_asked():
    known = np.array([[1.0], [0.0]])
    none = np.zeros(0)
    asked = Asked(np.array([0, -2]), np.ones(2), np.array([[9.0], [3.0]], np.float32), -1, none)
    np.testing.assert_allclose(member_features(asked, known), [[1], [3]])
    assert member_features(Asked(np.array([0, -2]), np.ones(2), None, -1, none), known) is None
    assert member_features(Asked(np.array([1]), np.ones(1), None, -1, none), known) is None


@pytest.mark.parametrize("n_features", [2, 9])
def test_slope_of_each_context(n_features):
    p = np.random.default_rng(5).normal(size=(8, n_features))
    context, described = np.array([0] * 5 + [1] * 3), np.arange(8) != 2
    found = linear_slope(p, described, context, 0.3)
    own = p[[0, 1, 3, 4]]
    np.testing.assert_allclose(found[[0, 1, 3, 4]], own @ np.linalg.inv(own.T @ own + 0.3 * np.eye(n_features)))
    assert (found[2] == 0).all() and found[5:].any()
