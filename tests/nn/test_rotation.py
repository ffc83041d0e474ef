"""Sparse rows are found again after a rotation."""

import numpy as np

from pertura.nn import quartimax


def test_a_sparse_table_is_turned_back():
    rng = np.random.default_rng(0)
    sparse = np.zeros((60, 4))
    sparse[np.arange(60), rng.integers(4, size=60)] = rng.normal(size=60) + 2.0
    turned = sparse @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    rotation = quartimax(turned)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(4), atol=1e-10)
    assert (np.abs(turned @ rotation) > 1e-3).sum() == 60
    # columns come in any order and with any sign
    np.testing.assert_allclose(np.sort((turned @ rotation) ** 2, axis=None), np.sort(sparse**2, axis=None), atol=1e-4)
