"""The table of conditions against means that are computed cell by cell."""

import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from pertura.data._cells import Expression
from pertura.effects import _sums, _table
from pertura.effects._sums import control_means

LABELS = {"A": (0,), "B": (1,), "A+B": (0, 1)}


def log1p(adata):
    counts = adata.layers["counts"].toarray().astype(float)
    return np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)), counts


def cells_of(adata, table, row):
    """Rows of the cells of a condition of a table."""
    codes = tuple(c for c in table.codes[row] if c >= 0)
    label = {v: k for k, v in LABELS.items()}.get(codes, "ctrl")
    dose = "+".join(f"{d:g}" for d in table.dose[row][: len(codes)]) or "0"
    own = (adata.obs["perturbation"] == label) & (adata.obs["context"] == "xy"[table.context[row]])
    return np.flatnonzero(own & (adata.obs["dose"] == dose))


def test_means_and_variances_of_conditions(screen, measure):
    table = measure(screen)
    x, counts = log1p(screen)
    depth = np.log(np.maximum(counts.sum(1), 1)) - 8
    # controls, A and B at two doses and A+B, in two contexts; every cell is of one of them
    assert len(table.codes) == 2 * (1 + 4 + 1) and table.n.sum() == screen.n_obs
    assert table.is_control.tolist() == [True] * 2 + [False] * 10
    for row in range(len(table.codes)):
        own = cells_of(screen, table, row)
        assert table.n[row].sum() == len(own) > 3 and abs(table.n[row][0] - table.n[row][1]) <= 1
        np.testing.assert_allclose(table.means([row])[0], x[own].mean(0), atol=1e-5)
        np.testing.assert_allclose(table.within[row], x[own].var(0) * len(own), rtol=1e-4, atol=1e-4)
        found = (table.n[row][:, None] * table.depth[row]).sum(0) / len(own)
        np.testing.assert_allclose(found, [depth[own].mean(), (depth[own] ** 2).mean()], rtol=1e-6)
        batches = screen.obs["batch"].iloc[own].value_counts().reindex(["b1", "b2", "b3"], fill_value=0)
        assert table.per_batch[row].sum(0).tolist() == batches.tolist()
        # each batch is halved
        assert (np.abs(table.per_batch[row][0] - table.per_batch[row][1]) <= 1).all()
    for found, values in ((table.normalized, x), (table.raw, counts)):
        np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.variance, values.var(0), rtol=1e-6)
    control = (screen.obs["perturbation"] == "ctrl").to_numpy()
    np.testing.assert_allclose(table.control_moments.mean, x[control].mean(0), rtol=1e-5)
    np.testing.assert_allclose(table.control_moments.variance, x[control].var(0), rtol=1e-4)
    for code, name in enumerate(["b1", "b2", "b3"]):
        np.testing.assert_allclose(table.batch_mean[code], x[screen.obs["batch"] == name].mean(0), rtol=1e-5)


def halves_by_hand(screen, seed=0):
    hashed = pd.util.hash_array(screen.obs_names.to_numpy(object), hash_key=f"{seed:016d}", categorize=False)
    half = np.zeros(screen.n_obs, int)
    frame = screen.obs.assign(hashed=hashed, row=np.arange(screen.n_obs))
    for _, own in frame.groupby(["perturbation", "dose", "context"]):
        ordered = own.sort_values(["batch", "hashed"])["row"].to_numpy()
        half[ordered] = (np.arange(len(ordered)) + 1) % 2
    return half


@pytest.mark.parametrize("half", [None, 0, 1])
def test_effects_compare_within_batches(screen, measure, half):
    table = measure(screen)
    x, _ = log1p(screen)
    found = table.effects(half=half, adjust_depth=False)
    chosen = np.ones(screen.n_obs, bool) if half is None else halves_by_hand(screen) == half
    for i, row in enumerate(table.treated):
        own = cells_of(screen, table, row)
        own = own[chosen[own]]
        control = (screen.obs["perturbation"] == "ctrl") & (screen.obs["context"] == "xy"[table.context[row]]) & chosen
        expected, noise = x[own].mean(0), 1 / len(own)
        for batch, number in screen.obs["batch"].iloc[own].value_counts().items():
            beside = x[control & (screen.obs["batch"] == batch)]
            expected = expected - number / len(own) * beside.mean(0)
            noise += (number / len(own)) ** 2 / len(beside)
        np.testing.assert_allclose(found.effect[i], expected, atol=1e-5)
        np.testing.assert_allclose(found.noise[i], noise, rtol=1e-6)
    assert found.measured.all()


def test_batch_effects_cancel(measure):
    """Treated cells are mostly in the batch where everything is higher."""
    rng = np.random.default_rng(1)
    obs = pd.DataFrame({"perturbation": ["ctrl"] * 200 + ["A"] * 200, "context": "x", "dose": 1.0})
    obs["batch"] = rng.permuted(["low"] * 160 + ["high"] * 40).tolist() + ["high"] * 160 + ["low"] * 40
    x = rng.normal(size=(400, 5)) + 5 * (obs["batch"] == "high").to_numpy()[:, None]
    x[200:, 0] += 1
    adata = AnnData(x.astype(np.float32), obs=obs.set_index("perturbation", drop=False).reset_index(drop=True))
    adata.obs_names = [f"c{i}" for i in range(400)]
    table = measure(adata, setup={"layer": None, "dose_key": None})
    np.testing.assert_allclose(table.effects().effect[0], [1, 0, 0, 0, 0], atol=4 * table.effects().se.max())
    together = measure(adata, setup={"layer": None, "dose_key": None, "batch_key": None})
    assert together.effects().effect[0].min() > 2


def test_a_batch_without_controls_is_compared_with_all_controls(measure):
    obs = pd.DataFrame({"perturbation": ["ctrl"] * 3 + ["A"] * 4, "context": "x"})
    obs["batch"] = ["p", "p", "q", "p", "r", "r", "r"]
    obs.index = [f"c{i}" for i in range(7)]
    adata = AnnData(np.array([[1.5], [2.5], [9.0], [10.0], [20.0], [20.0], [20.0]], np.float32), obs=obs)
    table = measure(adata, setup={"layer": None, "dose_key": None})
    found = table.effects()
    np.testing.assert_allclose(found.effect, [[17.5 - (0.25 * 2 + 0.75 * 13 / 3)]], rtol=1e-6)
    weight = np.array([0.25 + 0.75 * 2 / 3, 0.75 / 3])
    np.testing.assert_allclose(found.noise, 1 / 4 + (weight**2 / [2, 1]).sum())


def test_standard_errors_are_moderated(screen, measure):
    table = measure(screen, setup={"batch_key": None})
    x, _ = log1p(screen)
    groups = [cells_of(screen, table, row) for row in range(len(table.codes))]
    within = np.array([x[g].var(0) * len(g) for g in groups])
    df = np.array([len(g) - 1 for g in groups])[:, None]
    variance = (within + 3 * within.sum(0) / df.sum()) / (df + 3)
    found = table.effects(adjust_depth=False)
    for i, row in enumerate(table.treated):
        at = table.context[row]  # controls come first
        expected = variance[row] / len(groups[row]) + variance[at] / len(groups[at])
        np.testing.assert_allclose(found.se[i] ** 2, expected, rtol=1e-4)


def test_depth_is_not_an_effect(measure):
    """Cells of A are sequenced deeper, and nothing else happens to them."""
    rng = np.random.default_rng(2)
    n, n_genes = 3000, 40
    obs = pd.DataFrame({"perturbation": np.where(np.arange(n) < n // 2, "ctrl", "A"), "context": "x", "batch": "b"})
    obs.index = [f"c{i}" for i in range(n)]
    depth = rng.lognormal(0, 0.5, n) * np.where(obs["perturbation"] == "A", 2.0, 1.0)
    counts = rng.poisson(rng.gamma(0.5, 2, n_genes) * depth[:, None]).astype(np.float32)
    adata = AnnData(counts, obs=obs, layers={"counts": sparse.csr_matrix(counts)})
    table = measure(adata, setup={"dose_key": None})
    adjusted, plain = table.effects(), table.effects(adjust_depth=False)
    # the slopes are those of the regression within conditions
    x, _ = log1p(adata)
    q = np.log(np.maximum(counts.sum(1), 1)) - 8
    design = np.stack([q, q**2], 1)
    for own in (slice(0, n // 2), slice(n // 2, n)):
        x[own] -= x[own].mean(0)
        design[own] -= design[own].mean(0)
    expected = np.linalg.lstsq(design, x, rcond=None)[0]
    np.testing.assert_allclose(table.slope, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table.spread**2, ((x - design @ expected) ** 2).sum(0) / (n - 2), rtol=1e-4, atol=1e-8)
    assert (adjusted.effect**2).mean() < 0.02 * (plain.effect**2).mean()
    # up to what is noise, nothing is left
    assert (np.abs(adjusted.effect) <= 4 * adjusted.se).all()


@pytest.mark.parametrize("storage", ["csc", "dense", "backed", "backed dense", "dask"])
def test_any_storage_in_any_chunks_is_the_same(screen, measure, storage, tmp_path, monkeypatch):
    expected = measure(screen.copy())
    adata = screen.copy()
    x = adata.layers.pop("counts")
    adata.X = x.toarray() if "dense" in storage else x.asformat("csc" if storage == "csc" else "csr")
    if "backed" in storage:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    elif storage == "dask":
        dask = pytest.importorskip("dask.array")
        adata.X = dask.from_array(x.toarray(), chunks=(100, -1)).map_blocks(sparse.csr_matrix)
    monkeypatch.setattr(_sums, "_CHUNK_ENTRIES", 1)
    found = measure(adata, setup={"layer": None})
    for name in ("codes", "dose", "context", "n", "mean", "within", "depth", "per_batch", "slope", "spread"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6, err_msg=name)
    assert sparse.issparse(found.sample.x) == ("dense" not in storage)


def test_the_order_of_cells_does_not_matter(screen, measure):
    shuffled = screen[np.random.default_rng(3).permutation(screen.n_obs)].copy()
    one, other = measure(screen.copy()), measure(shuffled)
    for half in (None, 0, 1):
        np.testing.assert_allclose(one.effects(half=half).effect, other.effects(half=half).effect, atol=1e-5)
    np.testing.assert_allclose(np.abs(one.programs()), np.abs(other.programs()), atol=1e-4)
    again = measure(screen.copy(), seed=1)
    assert np.abs(one.effects(half=0).effect - again.effects(half=0).effect).max() > 0.01


def test_cells_are_read_once_and_deep_ones_once_more(screen, measure, monkeypatch):
    monkeypatch.setattr(_sums, "_CHUNK_ENTRIES", 1)
    read = []

    class Counted:
        format = None  # rows are asked for one by one

        def __init__(self, values):
            self.values, self.shape = values, values.shape

        def __getitem__(self, rows):
            read.extend(np.asarray(rows).tolist())
            return self.values[rows]

    real = Expression.of
    monkeypatch.setattr(
        Expression,
        "of",
        classmethod(lambda cls, *a: (lambda e: cls(Counted(e.values), e.columns, e.kind))(real(*a))),
    )
    rows = np.arange(0, screen.n_obs, 2)
    table = measure(screen, rows=rows, linear=True)
    table.effects()
    table.programs()
    assert read[: len(rows)] == rows.tolist()
    again = read[len(rows) :]
    assert len(set(again)) == len(again) and 0 < len(again) < len(rows)


def test_memory_does_not_grow_with_cells(screen, measure, monkeypatch):
    monkeypatch.setattr(_sums, "_CHUNK_ENTRIES", 1)
    monkeypatch.setattr(_table, "_MAX_SAMPLE", 50)
    peaks = []
    for times in (4, 40):
        many = anndata.concat([screen] * times, index_unique="-")
        many.layers["counts"] = many.layers["counts"].tocsr()
        measure(many)  # what is made once
        tracemalloc.start()
        table = measure(many)
        peaks.append(tracemalloc.get_traced_memory()[1] / many.n_obs)
        tracemalloc.stop()
        assert len(table.sample.condition) == 50
    # labels and codes of the cells, and no expression: 20,000 cells x 30 genes would be 240 bytes a cell in float64
    assert peaks[1] < peaks[0]


def test_counts_before_the_logarithm(screen, measure):
    table = measure(screen, linear=True)
    counts = screen.layers["counts"].toarray()
    x = 1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for row in range(len(table.codes)):
        own = cells_of(screen, table, row)
        np.testing.assert_allclose(table.linear_mean[row], x[own].mean(0), rtol=1e-6)
        np.testing.assert_allclose(table.linear_within[row], x[own].var(0) * len(own), rtol=1e-4, atol=1e-3)
    assert table.linear_unit == pytest.approx((1e4 / np.maximum(counts.sum(1), 1)).mean())
    assert measure(screen).linear_mean is None


def test_pooled_by_precision(screen, measure):
    table = measure(screen)
    which = np.array([{(0,): 0, (1,): 1}.get(m, -1) for m in table.members])
    strength = np.where(table.dose[table.treated][:, 0] > 2, 1.0, 0.5)
    found = table.pooled(which, 3, strength=strength, adjust_depth=False)
    for half, (effect, noise) in zip((None, 0, 1), [(found.effect, found.noise), *found.parts], strict=True):
        each = table.effects(half=half, adjust_depth=False)
        for row in (0, 1):
            own = which == row
            assert own.sum() == 4
            # least squares with the strengths as regressor
            precision = (strength[own] ** 2 / each.noise[own]).sum()
            expected = (strength[own] / each.noise[own]) @ each.effect[own] / precision
            np.testing.assert_allclose(effect[row], expected, rtol=1e-6)
            np.testing.assert_allclose(noise[row], 1 / precision, rtol=1e-6)
        assert noise[2] == np.inf


def test_contexts_without_controls(screen, measure):
    rows = np.flatnonzero(~((screen.obs["context"] == "y") & (screen.obs["perturbation"] == "ctrl")))
    table = measure(screen, rows=rows)
    found = table.effects()
    assert table.has_control.tolist() == [True, False]
    in_y = table.context[table.treated] == 1
    assert (found.measured == ~in_y).all() and (found.effect[in_y] == 0).all()
    assert (table.controls[1] == 0).all() and table.controls[0].any()
    assert len(table.condition_means().context) == (~in_y).sum()


def test_halves_of_controls(screen, measure):
    table = measure(screen)
    n = table.n[table.is_control]
    at = table.context[table.is_control]
    halves = table.control_halves[:, at]
    assert not np.allclose(halves[0], halves[1])
    mean = np.einsum("ch,hcg->cg", n / n.sum(1, keepdims=True), halves)
    np.testing.assert_allclose(mean, table.controls[at], rtol=1e-4, atol=1e-5)


def test_controls_of_other_data(screen, registered):
    model = registered(screen)
    found, mean = control_means(model.adata_manager, np.array([1, 5]))
    x, _ = log1p(screen)
    own = (screen.obs["context"] == "y") & (screen.obs["perturbation"] == "ctrl")
    assert found.tolist() == [True, False]
    np.testing.assert_allclose(mean[0], x[own].mean(0), atol=1e-5)
