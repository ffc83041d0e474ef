"""Distribution metrics against direct formulas and normal closed forms."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance as energy_1d

from pertura import metrics as mt


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    x, y = rng.poisson(1.0, size=(60, 9)).astype(float), rng.poisson(1.5, size=(45, 9)).astype(float)
    return x, y


def test_energy_distance_formula(cells):
    x, y = cells
    for metric in ("euclidean", "sqeuclidean"):
        xy, xx, yy = cdist(x, y, metric), cdist(x, x, metric), cdist(y, y, metric)
        v = 2 * xy.mean() - xx.mean() - yy.mean()
        u = 2 * xy.mean() - xx.sum() / (60 * 59) - yy.sum() / (45 * 44)
        assert mt.energy_distance(x, y, metric=metric, unbiased=False) == pytest.approx(v)
        assert mt.energy_distance(x, y, metric=metric) == pytest.approx(u)
    assert mt.energy_distance(x, x, unbiased=False) == pytest.approx(0, abs=1e-6)


def test_energy_distance_agrees_with_scipy_in_one_dimension():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=200), rng.normal(1.0, 2.0, size=150)
    # scipy returns the square root.
    assert mt.energy_distance(x[:, None], y[:, None], unbiased=False) == pytest.approx(energy_1d(x, y) ** 2, rel=1e-6)


def test_squared_euclidean_sees_means_only(cells):
    x, y = cells
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    assert mt.energy_distance(x, y, metric="sqeuclidean", unbiased=False) == pytest.approx(2 * shift)


def test_unbiased_is_zero_on_average_for_equal_distributions():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(20, 3)), rng.normal(size=(30, 3))) for _ in range(100)]
    for f in (mt.energy_distance, lambda x, y, **k: mt.mmd_rbf(x, y, bandwidth=2.0, **k)):
        u, v = (np.array([f(x, y, unbiased=b) for x, y in pairs]) for b in (True, False))
        assert abs(u.mean()) < 4 * u.std() / 10
        assert v.mean() > 10 * v.std() / 10


def test_mmd_formula_and_normal_closed_form(cells):
    x, y = cells
    h = mt.median_distance(y)
    assert h == pytest.approx(np.median(cdist(y, y)[np.triu_indices(45, 1)]))

    def k(a, b):
        return np.exp(-cdist(a, b, "sqeuclidean") / (2 * h**2))

    assert mt.mmd_rbf(x, y, unbiased=False) == pytest.approx(k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean())
    two = [mt.mmd_rbf(x, y, bandwidth=b * h) for b in (0.5, 2.0)]
    assert mt.mmd_rbf(x, y, scales=(0.5, 2.0)) == pytest.approx(np.mean(two))
    # N(0,1) against N(m,1), kernel width h: 2 s (1 - exp(-m^2 / (2 (h^2+2)))) with s = h / sqrt(h^2+2).
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3000, 1)), rng.normal(1.5, size=(3000, 1))
    expected = 2 / np.sqrt(3) * (1 - np.exp(-(1.5**2) / 6))
    assert mt.mmd_rbf(a, b, bandwidth=1.0) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("f", [mt.energy_distance, mt.mmd_rbf])
def test_chunks_sparse_and_order_do_not_matter(f, cells):
    rng = np.random.default_rng(1)
    x, y = rng.poisson(1.0, size=(400, 9)).astype(float), cells[1]
    whole = f(x, y)
    assert f(x, y, working_memory=0.01) == pytest.approx(whole)  # about 3 rows a chunk
    assert f(sp.csr_matrix(x), sp.csr_matrix(y)) == pytest.approx(whole)
    genes = rng.permutation(9)
    assert f(x[rng.permutation(400)][:, genes], y[:, genes]) == pytest.approx(whole)
    small = f(x, y, max_cells=30, seed=3)
    assert small == f(x, y, max_cells=30, seed=3) != whole


def test_variance_ratio(cells):
    x = np.hstack([cells[0], np.full((60, 1), 2.0)])
    scale = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    assert mt.variance_ratio(x / scale, x) == pytest.approx(1 / 25)
    ratio = mt.variance_ratio(x * 2, x, reduce="none")
    np.testing.assert_allclose(ratio[:9], 4)
    assert np.isnan(ratio[9])
    assert mt.variance_ratio(x / scale, x, reduce="total") == pytest.approx(
        (x.var(0) / scale**2).sum() / x.var(0).sum()
    )
    assert mt.variance_ratio(sp.csr_matrix(x), sp.csr_matrix(x * 3)) == pytest.approx(1 / 9)
    assert mt.variance_ratio(np.ones((4, 10)), x) == 0.0


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda x, y: mt.energy_distance(x[:1], y), "`predicted`"),
        (lambda x, y: mt.energy_distance(x, y[:, :3]), "genes"),
        (lambda x, y: mt.energy_distance(x, y, metric="l1"), "`metric`"),
        (lambda x, y: mt.energy_distance(x, np.full_like(y, np.inf)), "`truth`"),
        (lambda x, y: mt.mmd_rbf(x, np.ones_like(y)), "`bandwidth`"),
        (lambda x, y: mt.mmd_rbf(x, y, scales=()), "`scales`"),
        (lambda x, y: mt.variance_ratio(x, y, reduce="mean"), "`reduce`"),
    ],
)
def test_errors(call, word, cells):
    with pytest.raises(ValueError, match=word):
        call(*cells)
