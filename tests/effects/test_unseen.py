"""Perturbations that were not measured: each source has the share that left-out perturbations bear out."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura.effects import fit_unseen

N, GENES, CELLS, CONTROLS = 20, 40, 100, 60


@pytest.fixture
def table(measure):
    """`table(effect)`: cells whose expression moves by these effects, and few controls."""

    def make(effect, seed=0):
        rng = np.random.default_rng(seed)
        labels = np.repeat(["ctrl", *(f"P{i:02d}" for i in range(len(effect)))], [CONTROLS, *[CELLS] * len(effect)])
        mean = np.repeat(np.vstack([np.zeros(GENES), effect]), [CONTROLS, *[CELLS] * len(effect)], axis=0)
        adata = AnnData((mean + rng.normal(size=mean.shape)).astype(np.float32))
        adata.obs = pd.DataFrame({"perturbation": labels}, index=adata.obs_names)
        setup = {"context_key": None, "batch_key": None, "dose_key": None, "layer": None}
        return measure(adata, setup=setup)

    return make


def fitted(table, spread=None, features=None):
    spread = np.zeros((N, GENES)) if spread is None else spread
    return fit_unseen(table, np.full(N, -1), spread, features=np.zeros((N, 0)) if features is None else features)


def test_the_noise_of_the_controls_is_no_mean_effect(table):
    """Without effects all measured ones are alike, as they have the controls in common."""
    share = fitted(table(np.zeros((N, GENES)))).share
    assert share[:, :2].sum(1).max() < 0.35
    common = np.random.default_rng(1).normal(size=GENES)
    assert fitted(table(np.tile(common, (N, 1)))).share[0].sum() > 0.9


def test_each_source_has_its_share(table):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N, 4))
    explained, network = features @ rng.normal(size=(4, GENES)), rng.normal(size=(N, GENES))
    for effect, wanted in ((explained, (0, 1, 0)), (network, (0, 0, 1)), (0 * network, (0, 0, 0))):
        found = fitted(table(effect), network, features)
        np.testing.assert_allclose(found.share[1], wanted, atol=0.15)
    # the network says twice of what is there, and nothing of most: these have shares of their own
    spread = 2.0 * network
    spread[6:] = 0.0
    found = fitted(table(np.where(spread == 0, explained, network)), spread, features)
    assert found.share[1, 2] == pytest.approx(0.5, abs=0.1) and found.share[0, 2] == 0 < found.share[0, 1]
    mean, sd = found.predict(features[[0, 9]], spread[[0, 9]])
    assert np.corrcoef(mean[0], network[0])[0, 1] > 0.8 < np.corrcoef(mean[1], explained[9])[0, 1]
    assert (sd > 0).all()


def test_what_is_not_explained_is_the_sd(table):
    rng = np.random.default_rng(0)
    network = rng.normal(size=(N, GENES))
    found = fitted(table(network + 0.5 * rng.normal(size=(N, GENES))), network)
    _, sd = found.predict(np.zeros((1, 0)), network[:1])
    assert np.sqrt((sd**2).mean()) == pytest.approx(0.5, rel=0.15)


def test_the_effect_on_the_own_gene_does_not_count(table):
    rng = np.random.default_rng(0)
    network = rng.normal(size=(N, GENES))
    effect = network.copy()
    effect[np.arange(N), np.arange(N)] -= 20.0
    found = fit_unseen(table(effect), np.arange(N), network, features=np.zeros((N, 0)))
    assert found.share[1, 2] > 0.9 and np.abs(found.mean.mean).max() < 2.0


def test_few_perturbations_tell_nothing(table):
    assert (
        fit_unseen(table(np.zeros((4, GENES))), np.full(4, -1), np.zeros((4, GENES)), features=np.zeros((4, 0))) is None
    )
