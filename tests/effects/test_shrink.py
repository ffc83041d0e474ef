"""Measured effects are shrunk as far as they are noise, and along the programs that they follow."""

import numpy as np
import pytest

from pertura.effects import Halves, principal_programs, shrink

N_EFFECTS, N_GENES = 20, 60


def simulated(noise, *, seed=0, common=True):
    """Effects along two programs and a few genes of their own, measured twice with half of the cells."""
    rng = np.random.default_rng(seed)
    loadings = np.zeros((N_GENES, 2))
    loadings[:20, 0], loadings[20:40, 1] = 1.0, 1.0
    truth = 0.3 * rng.normal(size=(N_EFFECTS, 2)) @ loadings.T * common
    truth[:, 40:44] += 0.5 * rng.normal(size=(N_EFFECTS, 4))
    cells = rng.normal(size=(800, 2)) @ loadings.T + rng.normal(size=(800, N_GENES))
    parts = [(truth + np.sqrt(2 * noise) * rng.normal(size=truth.shape), np.full(N_EFFECTS, 2 * noise)) for _ in "ab"]
    both = (parts[0][0] + parts[1][0]) / 2
    measured = Halves(both, np.full(N_EFFECTS, noise), tuple(parts))
    return truth, measured, principal_programs(cells - cells.mean(0))


def error(a, b):
    return float(((a - b) ** 2).mean())


def test_programs_are_the_planted_ones():
    _, _, loadings = simulated(0.1)
    size = (loadings**2).sum(0)
    assert size[:2].min() > 10 * size[2:].max()
    assert (loadings**2).sum(1)[:40].min() > 2 * (loadings**2).sum(1)[40:].max()


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_better_than_what_was_measured_and_than_nothing(noise):
    truth, measured, loadings = simulated(noise)
    found = shrink(measured, loadings)
    assert error(found.mean, truth) < 0.7 * min(error(measured.effect, truth), error(truth, 0.0))


def test_programs_help():
    truth, measured, loadings = simulated(0.1)
    without = shrink(measured, np.zeros((N_GENES, 0)))
    assert error(shrink(measured, loadings).mean, truth) < 0.7 * error(without.mean, truth)


def test_sd_is_that_of_the_error():
    truth, measured, loadings = simulated(0.1, seed=1)
    found = shrink(measured, loadings)
    z = (found.mean - truth) / found.sd
    # not too small; most genes have no effect of their own, less than any prior of all genes expects
    assert 0.5 < np.sqrt((z**2).mean()) < 1.1


def test_sd_of_perturbations_at_large():
    """What is said of a perturbation that was not measured is how large the true effects of the others are."""
    truth, measured, loadings = simulated(0.02)
    found = shrink(measured, loadings)
    for genes in (slice(0, 40), slice(40, 44)):
        ratio = np.sqrt((found.prior_sd[genes] ** 2).mean() / (truth[:, genes] ** 2).mean())
        assert 0.7 < ratio < 1.4
    assert found.prior_sd[44:].mean() < 0.5 * found.prior_sd[:44].mean()


def test_many_cells_are_believed():
    truth, measured, loadings = simulated(1e-5)
    assert error(shrink(measured, loadings).mean, measured.effect) < 1e-4


def test_nothing_is_made_of_noise():
    rng = np.random.default_rng(2)
    parts = tuple((rng.normal(size=(N_EFFECTS, N_GENES)), np.ones(N_EFFECTS)) for _ in "ab")
    measured = Halves((parts[0][0] + parts[1][0]) / 2, np.full(N_EFFECTS, 0.5), parts)
    _, _, loadings = simulated(0.1)
    assert error(shrink(measured, loadings).mean, 0.0) < 0.05 * error(measured.effect, 0.0)


def test_one_perturbation_in_few_cells_without_halves():
    found = shrink(Halves(np.full((1, 3), 0.2), np.array([0.5])), np.zeros((3, 0)))
    assert np.isfinite(found.mean).all() and (np.abs(found.mean) < 0.2).all() and (found.sd > 0).all()


def test_known_variance_is_a_prior_gene_by_gene():
    """Where the prior is wide the measurement is believed; nowhere is the posterior wider than the measurement."""
    rng = np.random.default_rng(3)
    known = np.zeros((N_EFFECTS, N_GENES))
    known[:, :30] = 4.0
    y = rng.normal(0, np.sqrt(known + 0.5))
    found = shrink(Halves(y, np.full(N_EFFECTS, 0.5)), np.zeros((N_GENES, 0)), known)
    np.testing.assert_allclose(found.mean[:, :30], y[:, :30] * 4 / 4.5, atol=0.1)
    assert error(found.mean[:, 30:], 0) < 0.1 * error(y[:, 30:], 0)
    assert (found.sd <= np.sqrt(0.5)).all()
    # what is known of the prior is not taken for the size of the effects
    assert found.prior_sd.max() < 0.5


def test_programs_are_wide_in_genes_that_follow_them():
    truth, measured, loadings = simulated(0.1)
    found = shrink(measured, loadings)
    assert (found.sd <= np.sqrt(0.1) + 1e-12).all()
    assert found.sd[:, :40].mean() > found.sd[:, 44:].mean()
