"""Cells of poor quality are flagged within their batch."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pertura.pp import qc_flags


@pytest.fixture
def cells():
    """Two batches of different depth; in each, five shallow cells and five with mitochondrial counts."""
    rng = np.random.default_rng(0)
    depth = np.repeat([1.0, 6.0], 200)
    rate = np.ones((400, 50)) * depth[:, None] * rng.lognormal(0, 0.1, (400, 1))
    for start in (0, 200):
        rate[start : start + 5] *= 0.2
        rate[start + 5 : start + 10, :4] *= 8
    names = [f"MT-{i}" if i < 4 else f"G{i}" for i in range(50)]
    obs = pd.DataFrame({"batch": np.repeat(["a", "b"], 200)}, index=[f"c{i}" for i in range(400)])
    return AnnData(rng.poisson(rate).astype(np.float32), obs=obs, var=pd.DataFrame(index=names))


def test_planted_failures_are_flagged(cells):
    before = cells.copy()
    flags = qc_flags(cells, by="batch")
    for start in (0, 200):
        assert flags["low_counts"].iloc[start : start + 5].all()
        assert flags["high_mitochondrial"].iloc[start + 5 : start + 10].all()
    assert flags["failed"].sum() < 20 + 15
    assert list(cells.obs) == list(before.obs) and list(cells.var) == list(before.var)


def test_thresholds_are_of_the_batch(cells):
    """Without batches the shallow one hides its failures: thresholds lie between the two."""
    by_batch, pooled = qc_flags(cells, by="batch"), qc_flags(cells)
    assert by_batch["low_counts"].sum() > pooled["low_counts"].sum()


@pytest.mark.parametrize(
    ("argument", "value"), [("by", "lane"), ("layer", "raw"), ("n_mads", 0.0)], ids=["by", "layer", "n_mads"]
)
def test_wrong_arguments(cells, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        qc_flags(cells, **{argument: value})


def test_values_that_are_no_counts(cells):
    cells.X = np.log1p(cells.X)
    with pytest.raises(ValueError, match="counts"):
        qc_flags(cells)


def test_planted_doublets_are_flagged():
    """Sums of two cells of different kinds."""
    rng = np.random.default_rng(0)
    profiles = rng.gamma(0.5, size=(3, 300))
    cells = rng.poisson(4 * profiles[np.repeat([0, 1, 2], 80)])
    pairs = cells[rng.integers(80, size=16)] + cells[80 + rng.integers(80, size=16)]
    names = [f"c{i}" for i in range(256)]
    adata = AnnData(np.concatenate([cells, pairs]).astype(np.float32), obs=pd.DataFrame(index=names))
    doublet = qc_flags(adata, doublets=True)["doublet"].to_numpy()
    assert doublet[240:].mean() > 0.6
    assert doublet[:240].mean() < 0.05
    assert not qc_flags(adata)["doublet"].any()
