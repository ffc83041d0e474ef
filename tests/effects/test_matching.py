"""Cells are compared with controls that resemble them."""

import numpy as np

from pertura.data._cells import CellDataset
from pertura.effects import matched_differences


def test_a_shift_is_told_from_what_cells_differ_anyway(registered, screen):
    """Two kinds of cells, far apart; a perturbation doubles one gene. Matched to their own kind, cells differ in that gene."""
    adata, rng = screen[:240].copy(), np.random.default_rng(0)
    labels = np.repeat(["ctrl", "A"], 120)
    rate = np.full((240, adata.n_vars), 40.0)
    rate[np.arange(240) % 2 == 0, :10] *= 8.0
    rate[labels == "A", 20] *= 6.0
    adata.layers["counts"] = rng.poisson(rate).astype(np.float32)
    adata.obs["perturbation"], adata.obs["dose"], adata.obs["context"] = labels, "1", "x"
    model = registered(adata, dose_key=None)
    genes = np.arange(adata.n_vars)
    found, share = matched_differences(CellDataset(model.adata_manager), np.arange(240), genes, 1, 9)
    assert found.shape == (1, 9, adata.n_vars) and share.tolist() == [0.5]
    assert (np.diff(found[0], axis=0) >= 0).all()
    median = found[0, 4]
    assert median[20] > 1.0 and np.delete(median, 20).max() < 0.5


def test_combinations_count_for_their_members(registered, screen):
    model = registered(screen, dose_key=None)
    rows = np.arange(screen.n_obs)
    found, share = matched_differences(CellDataset(model.adata_manager), rows, np.array([0, -1, 3]), 2, 3)
    label = screen.obs["perturbation"]
    np.testing.assert_allclose(share, [label.isin([name, "A+B"]).mean() for name in ("A", "B")])
    assert (found[:, -1, [0, 2]] > 0).any(1).all()
