"""A Gaussian process over perturbations: against planted kernels, and in closed form against fits without the left-out row."""

import numpy as np
import pytest
import torch

from pertura.effects import feature_blocks, fill_missing, fit_kernels
from pertura.effects._kernels import _MEAN_VARIANCE, _Process, _slopes, correlations

BLOCKS = [slice(0, 10), slice(10, 20), slice(20, 30)]


def planted(n=150, n_genes=60, seed=0):
    """Effects of which two blocks of features explain .4 and, half of that block being noise, .2; the third block says nothing.

    Returns features, true effects, measured ones, and their noise.
    """
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(3, n, 4))
    respond = np.sqrt(rng.gamma(1.0, 1.0, n_genes))
    loading = rng.normal(size=(3, 4, n_genes)) / 2.0 * respond
    features = [
        np.sqrt(share) * own @ rng.normal(size=(4, 10)) / 2.0 + np.sqrt(1.0 - share) * rng.normal(size=(n, 10))
        for share, own in zip((0.95, 0.5, 0.0), latent, strict=True)
    ]
    truth = 0.5 * rng.normal(size=n_genes) + sum(
        np.sqrt(share) * own @ on_genes for share, own, on_genes in zip((0.4, 0.4, 0.1), latent, loading, strict=True)
    )
    truth += np.sqrt(0.1) * respond * rng.normal(size=(n, n_genes))
    noise = 2.0 / rng.integers(4, 60, n)
    measured = truth + np.sqrt(noise)[:, None] * rng.normal(size=truth.shape)
    return np.concatenate(features, 1), truth, measured, noise, np.concatenate(latent[:2], 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_kernels(seed):
    """Unseen perturbations are nearly as well predicted as from what made them; what says nothing has weight 0."""
    features, truth, measured, noise, latent = planted(seed=seed)
    train, test = slice(0, 110), slice(110, None)
    found = fit_kernels(features[train], measured[train], BLOCKS, noise=noise[train])
    oracle = fit_kernels(latent[train], measured[train], [slice(0, 4), slice(4, 8)], noise=noise[train])
    assert oracle.evidence > found.evidence > 100.0
    first, second, useless = found.kernel_weights
    assert first > second > 0.02 and useless < 0.01 and found.gain > 0.1
    predicted, sd = found.predict(features[test])
    np.testing.assert_allclose(predicted, features[test] @ found.weight + found.intercept, atol=1e-8)
    error, of_mean = (((truth[test] - p) ** 2).mean() for p in (predicted, measured[train].mean(0)))
    best = ((truth[test] - latent[test] @ oracle.weight - oracle.intercept) ** 2).mean()
    assert error < 0.75 * of_mean and of_mean - error > 0.6 * (of_mean - best)
    inside = np.abs(predicted - truth[test]) < 1.645 * sd
    assert 0.85 < inside.mean() < 0.96
    # an average perturbation that was left out is as uncertain as a new one, one without features more so
    np.testing.assert_allclose(found.sd, np.sqrt((sd**2).mean(0)), rtol=0.2)
    nothing, more = found.predict(np.zeros((1, 30)))
    np.testing.assert_allclose(nothing[0], found.mean)
    assert (more[0] ** 2).mean() > 1.1 * (found.sd**2).mean()


def small_screen(n, seed, told=0.95, n_genes=60):
    """Perturbations of very different strength, half of whose effects one block of features tells; the other block says nothing.

    Returns features, true effects and noise; 40 further rows are not to train.
    """
    rng = np.random.default_rng(seed)
    rows = n + 40
    latent, respond = rng.normal(size=(3, rows, 4)), np.sqrt(rng.gamma(1.0, 1.0, n_genes))
    loading = rng.normal(size=(2, 4, n_genes)) / 2.0 * respond
    strength = np.sqrt(rng.gamma(0.7, 1.0 / 0.7, rows))[:, None]
    features = [
        np.sqrt(share) * own @ rng.normal(size=(4, 10)) / 2.0 + np.sqrt(1.0 - share) * rng.normal(size=(rows, 10))
        for share, own in ((told, latent[0]), (0.0, latent[2]))
    ]
    deviation = np.sqrt(0.5) * latent[0] @ loading[0] + np.sqrt(0.3) * latent[1] @ loading[1]
    deviation += np.sqrt(0.2) * respond * rng.normal(size=deviation.shape)
    truth = 0.5 * rng.normal(size=n_genes) * respond + strength * deviation
    return np.concatenate(features, 1), truth, 2.0 / rng.integers(4, 60, rows)


def fits_of_small_screens(n, seeds, told=0.95):
    """Weights of both blocks, squared error of new perturbations relative to the mean effect, and coverage, each per seed."""
    found = []
    for seed in range(seeds):
        features, truth, noise = small_screen(n, seed, told)
        measured = truth + np.sqrt(noise)[:, None] * np.random.default_rng([seed, 1]).normal(size=truth.shape)
        fit = fit_kernels(features[:n], measured[:n], [slice(0, 10), slice(10, 20)], noise=noise[:n])
        predicted, sd = fit.predict(features[n:])
        error = ((predicted - truth[n:]) ** 2).sum() / ((measured[:n].mean(0) - truth[n:]) ** 2).sum()
        found.append([*fit.kernel_weights, error, (np.abs(predicted - truth[n:]) < 1.645 * sd).mean()])
    return np.array(found).T


def test_a_screen_of_twenty_perturbations_tells_which_features_help():
    informative, useless, error, coverage = fits_of_small_screens(20, 20)
    assert (informative > 0).mean() > 0.7 and useless.mean() < 0.02
    assert error.mean() < 0.9 and error.max() < 1.05 and 0.85 < coverage.mean() < 0.95
    nothing = fits_of_small_screens(20, 20, told=0.0)
    assert nothing[:2].mean() < 0.02 and nothing[2].mean() < 1.01


def test_one_perturbation_that_is_far_off_does_not_outweigh_the_others():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x, loading = rng.normal(size=(20, 3)), rng.normal(size=(3, 6))
        y = x @ loading + 0.3 * rng.normal(size=(20, 6))
        y[0] *= -2.0
        weights, _ = _Process((x @ x.T / 3)[None], y - y.mean(0), np.zeros(20), np.ones(6)).choose()
        assert weights[0, 0] > 0.0


def test_what_a_row_adds_is_what_fits_without_it_lack():
    rng = np.random.default_rng(1)
    y, noise = rng.normal(size=(20, 7)), rng.uniform(0.1, 1.0, 20)
    x = rng.normal(size=(2, 20, 3))
    kernels, weights = x @ x.mT, np.array([[0.3, 0.5, 0.2], [0.7, 0.1, 0.1]])
    process = _Process(kernels, y, noise, np.linspace(0.1, 1.0, 7))
    assert [len(at) for at in process.groups] == [4, 3]
    dual, precision, _ = process.duals(weights)
    for row, column in ((3, 0), (11, 6)):
        own, keep = weights[process.group_of[column]], np.arange(20) != row
        variance = process.noise[process.group_of[column]] + own[2]
        covariance = own[0] * kernels[0] + own[1] * kernels[1] + _MEAN_VARIANCE
        part = covariance[row, keep] @ np.linalg.inv(covariance[np.ix_(keep, keep)] + np.diag(variance[keep]))
        left = process.y[row, column] - part @ process.y[keep, column]
        np.testing.assert_allclose((dual / precision)[row, column], left, rtol=1e-5)
        ahead = covariance[row, row] + variance[row] - part @ covariance[keep, row]
        np.testing.assert_allclose(1.0 / precision[row, column], ahead, rtol=1e-5)


def test_gradient_of_the_marginal_likelihood():
    """The weights that are found can not be improved."""
    features, _, measured, noise, _ = planted(n=40, n_genes=10)
    kernels = np.stack([x @ x.T / 10 for x in (features[:, :10], features[:, 10:20])])
    process = _Process(kernels, measured - measured.mean(0), noise, np.ones(10))
    used = np.ones(2, dtype=bool)
    weights, best = process.fit(used)

    def likelihood(weights):
        total = 0.0
        for group, at in enumerate(process.groups):
            inverse, log_determinant = process.inverse(group, used, weights[group])
            y = process.y[:, at]
            total -= 0.5 * (len(at) * log_determinant + np.einsum("ic,ij,jc->", y, inverse, y))
        return total

    assert likelihood(weights) == pytest.approx(best, abs=1e-6)
    for factor in (0.7, 1.4):
        for k in range(3):
            moved = weights.copy()
            moved[:, k] *= factor
            assert likelihood(moved) <= best + 0.01


def test_noisy_perturbations_count_less():
    rng = np.random.default_rng(2)
    measured = rng.normal(size=(12, 300)) * 0.1 + 1.0
    noise = np.where(np.arange(12) < 6, 0.01, 25.0)
    measured += np.sqrt(noise)[:, None] * rng.normal(size=measured.shape)
    found = fit_kernels(np.zeros((12, 0)), measured, noise=noise)
    assert np.abs(found.intercept - 1.0).mean() < 0.1 < 0.5 < np.abs(measured.mean(0) - 1.0).mean()


def test_effects_elsewhere_have_an_amplitude_gene_by_gene():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(20, 30))
    elsewhere = 0.5 * truth + 0.1 * rng.normal(size=truth.shape)
    genes = rng.permutation(30)
    own = fit_kernels(elsewhere[:, genes], truth, [slice(0, 30)], own=[genes])
    plain = fit_kernels(elsewhere[:, genes], truth, [slice(0, 30)])
    assert own.strength is not None and own.share > 0.8
    assert correlations(own.left_out, truth).mean() > 0.9
    assert correlations(own.left_out, truth).mean() > correlations(plain.left_out, truth).mean() + 0.05
    new = rng.normal(size=(5, 30))
    assert correlations((0.5 * new)[:, genes] @ own.weight + own.intercept, new).mean() > 0.9


def test_gene_by_gene_only_where_left_out_perturbations_support_it():
    rng = np.random.default_rng(6)
    latent = rng.normal(size=(40, 2))
    elsewhere = latent @ rng.normal(size=(2, 30)) + 0.5 * rng.normal(size=(40, 30))
    # the same two programs move other genes: a gene's own value elsewhere says nothing of it
    other = latent @ rng.normal(size=(2, 30)) + 0.1 * rng.normal(size=(40, 30))
    by_program = fit_kernels(elsewhere, other, [slice(0, 30)], own=[np.arange(30)])
    assert by_program.strength is None and by_program.gain > 0.2


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_left_out_amplitudes_are_those_of_fits_without_the_row(strength):
    rng = np.random.default_rng(5)
    x, y, weight = rng.normal(size=(15, 6, 2)), rng.normal(size=(15, 6)), rng.uniform(0.5, 2.0, 15)
    found = _slopes(x, y, strength, weight, left_out=True)
    keep = np.arange(15) != 7
    np.testing.assert_allclose(found[7], _slopes(x[keep], y[keep], strength, weight[keep]), rtol=1e-6)
    # common amplitudes, and each gene's own towards them
    own, root = x[keep], np.sqrt(weight[keep])[:, None]
    common = np.linalg.lstsq((own * root[..., None]).reshape(-1, 2), (y[keep] * root).ravel(), rcond=None)[0]
    gram = np.einsum("ngi,ngj,n->gij", own, own, weight[keep])
    level = strength * np.trace(gram.sum(0)) / 2 / 6
    cross = np.einsum("ng,ngi,n->gi", y[keep], own, weight[keep])
    by_hand = [np.linalg.solve(g + level * np.eye(2), c + level * common) for g, c in zip(gram, cross, strict=True)]
    np.testing.assert_allclose(found[7], by_hand, rtol=1e-6)


def test_features_that_say_nothing_leave_the_mean_effect(caplog):
    rng = np.random.default_rng(3)
    with caplog.at_level("INFO", logger="pertura"):
        found = fit_kernels(rng.normal(size=(40, 8)), rng.normal(size=(40, 20)) + 1.0, [slice(0, 8)])
    assert found.share == found.evidence == found.gain == 0 and not found.weight.any()
    assert "do not predict left-out perturbations" in caplog.text


def test_without_features_the_mean_effect_is_all_there_is():
    effects = np.random.default_rng(4).normal(size=(10, 3))
    found = fit_kernels(np.zeros((10, 0)), effects)
    np.testing.assert_allclose(found.intercept, effects.mean(0))
    np.testing.assert_allclose(found.left_out[2], np.delete(effects, 2, 0).mean(0))


def test_columns_of_one_source_are_one_block():
    names = ["a", "go:1", "hpa:x:1", "b", "go:2"]
    assert [list(b) for b in feature_blocks(names)] == [[0, 3], [1, 4], [2]]
    assert [list(b) for b in feature_blocks([f"s{i}:x" for i in range(9)])] == [list(range(9))]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 5))
    y += x[:, [0, 2]] @ rng.normal(size=(2, 5)) * 2.0
    apart, together = fit_kernels(x, y, [np.array([0, 2]), np.array([1, 3])]), fit_kernels(x, y)
    assert apart.kernel_weights[0] > 0.3 > 0.1 > apart.kernel_weights[1] and apart.evidence > together.evidence


def test_a_missing_block_is_average():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)) + 3.0
    y = (x - 3.0) @ rng.normal(size=(4, 5)) + 0.1 * rng.normal(size=(60, 5))
    x[:10, :2] = 0.0
    found = fit_kernels(x, y, [slice(0, 2), slice(2, 4)])
    assert found.kernel_weights.min() > 0.1
    given, missing = (
        found.predict(row)[0] for row in (np.array([[3.0, 3.0, 4.0, 2.0]]), np.array([[0.0, 0.0, 4.0, 2.0]]))
    )
    np.testing.assert_allclose(given, missing, atol=0.5)
    # as a linear map of the features, too
    asked = np.array([[2.0, 4.0, 3.5, 2.5], [0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    center, block = torch.as_tensor(found.center), torch.as_tensor(found.block)
    linear = fill_missing(torch.as_tensor(asked), center, block).numpy() @ found.weight + found.intercept
    np.testing.assert_allclose(linear, found.predict(asked)[0], atol=1e-6)
    assert (
        found.predict(np.array([[0.0, 0.0, 4.0, 2.0]]))[1] > found.predict(np.array([[3.0, 3.0, 4.0, 2.0]]))[1]
    ).all()
