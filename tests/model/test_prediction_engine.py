"""Draws, scales, quantiles, effect tables: against closed forms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from pertura.data import build_vocabulary
from pertura.data._perturbation import Perturbation
from pertura.effects import Discrepancy
from pertura.effects._ranked import ranked_effects
from pertura.model.base._arguments import as_rows
from pertura.model.base._effects import EffectSums, effect_table, log2_fold_change, posterior_spread
from pertura.model.base._predict import quantiles, rescale, seeded
from pertura.model.base._write import reserve

CPU = torch.device("cpu")


def vocabulary(**arguments):
    labels = pd.Series(["ctrl", "A", "B", "A+B", "C"])
    return build_vocabulary(labels, "ctrl", **arguments)


# -- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 25])
@pytest.mark.parametrize("level", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_quantiles_are_those_of_torch(n, level):
    x = torch.randn(n, 7, 3, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    (found,) = quantiles(x, [level])
    torch.testing.assert_close(found, torch.quantile(x, level, dim=0))
    assert torch.equal(x, before)


def test_quantiles_of_more_than_torch_takes():
    """torch.quantile stopped at 16 million numbers until torch 2.15."""
    x = torch.arange(17_000_000, dtype=torch.float32).reshape(17, -1)
    assert torch.equal(quantiles(x, [0.5])[0], x[8])


def test_seeded_draws():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draws = []
    for seed in (3, 3, 4, [3, 1]):
        with seeded(seed, CPU):
            draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(KeyError), seeded(3, CPU):
        raise KeyError
    assert torch.equal(before, torch.get_rng_state())


def test_rescale():
    counts = torch.tensor([[[2.0, 6.0, 0.0], [0.0, 0.0, 0.0]]])
    library = torch.tensor([[16.0], [5.0]])
    relative = rescale(counts, "counts", "log1p", library)
    torch.testing.assert_close(relative[0, 0], torch.log1p(torch.tensor([1250.0, 3750.0, 0.0])))
    torch.testing.assert_close(rescale(relative, "log1p", "counts", library), counts)
    for scale in ("counts", "log1p", "layer"):
        assert rescale(counts, scale, scale, library) is counts
    assert rescale(counts, "layer", "log1p", library) is counts
    with pytest.raises(ValueError, match="no way from the scale 'log1p' to 'layer'"):
        rescale(counts, "log1p", "layer", library)


def test_rows():
    np.testing.assert_array_equal(as_rows(4, None), np.arange(4))
    np.testing.assert_array_equal(as_rows(4, [False, True, False, True]), [1, 3])
    np.testing.assert_array_equal(as_rows(4, pd.Series([3, 0], index=["x", "y"])), [3, 0])
    assert as_rows(4, np.array([1], dtype=np.uint8)).dtype == np.int64


# -- effects --------------------------------------------------------------------------------------------------------


def test_sums_and_table_in_closed_form():
    """Two contexts of three cells each, one of which does not count; two draws."""
    rng = np.random.default_rng(0)
    control, perturbed = (torch.as_tensor(rng.uniform(1, 2, size=(2, 6, 4)).astype(np.float32)) for _ in "ab")
    context = np.array([2, 2, 2, 5, 5, 5])
    counted = np.array([True, True, False, True, True, True])
    sums = EffectSums(1, 2, 4, np.array([2, 5]))
    for part in (slice(0, 4), slice(4, 6)):
        weights = sums.weights(context[part], counted[part], control)
        sums.add_cells(weights, torch.full((part.stop - part.start, 1), 10.0))
        sums.add_control(weights, control[:, part])
        sums.add(0, weights, perturbed[:, part])
    names = ["a", "b", "c", "d", "e", "f"]
    table = effect_table(
        sums,
        [Perturbation("A", (1.0,))],
        contexts=names,
        genes=pd.Index(list("wxyz")),
        discrepancy=Discrepancy(None, vocabulary(), names),
        has_dose=False,
        ci=0.9,
        delta=0.1,
        scale="layer",
    )
    assert table["context"].tolist() == ["c"] * 4 + ["f"] * 4
    for name, rows in (("c", [0, 1]), ("f", [3, 4, 5])):
        own = table[table["context"] == name]
        change = (perturbed - control)[:, rows].mean(1).numpy()
        np.testing.assert_allclose(own["lfc_mean"], change.mean(0), rtol=1e-5)
        np.testing.assert_allclose(own["lfc_sd"], change.std(0, ddof=1), rtol=1e-4)
        np.testing.assert_allclose(own["mean_control"], control[:, rows].mean((0, 1)), rtol=1e-5)
    assert "dose" not in table


def test_fold_changes_are_those_of_scanpy():
    import scanpy as sc
    from anndata import AnnData

    rng = np.random.default_rng(0)
    values = np.log1p(rng.poisson(3.0, size=(60, 5))).astype(np.float32)
    values[:30, 2] += 1
    adata = AnnData(values, obs=pd.DataFrame({"g": pd.Categorical(["p"] * 30 + ["c"] * 30)}))
    adata.uns["log1p"] = {"base": None}
    sc.tl.rank_genes_groups(adata, "g", groups=["p"], reference="c", method="t-test")
    table = sc.get.rank_genes_groups_df(adata, "p").set_index("names").loc[adata.var_names]
    found = log2_fold_change(values[30:].mean(0), values[:30].mean(0), "log1p")
    np.testing.assert_allclose(found, table["logfoldchanges"], rtol=1e-3)


def test_amplitude_of_draws_apart_from_errors_of_genes():
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(2, 300))
    amplitude = 1 + np.array([0.5, 0.0])[:, None] * rng.normal(size=(400, 2, 1))
    draws = amplitude * effect + 0.3 * rng.normal(size=(400, 2, 300))
    total, shared, own = posterior_spread(draws, draws.mean(0))
    np.testing.assert_allclose(total, draws.var(0, ddof=1))
    assert np.sqrt(shared) == pytest.approx([0.5, 0.0], abs=0.05)
    np.testing.assert_allclose(np.sqrt(own), 0.3, rtol=0.15)
    # of one gene that changes it is not known what is shared
    alone = np.zeros((50, 1, 4))
    alone[..., 0] = 2 + rng.normal(size=(50, 1))
    total, shared, own = posterior_spread(alone, alone.mean(0))
    assert own[0, 0] == total[0, 0] > 0.5 and shared[0] < 0.05


def test_ranked_effects():
    table = pd.DataFrame(
        {
            "gene": ["a", "b", "c"] * 2,
            "context": ["x"] * 3 + ["y"] * 3,
            "lfc_mean": [1.0, -2.0, 0.1, 0.0, 3.0, 1.0],
            "gene_sd": [1.0, 1.0, 0.1, 0.0, 1.0, 2.0],
            "log2fc": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        }
    )
    found = ranked_effects(table, "context", {"groupby": "g"})
    assert found["names"]["x"].tolist() == ["a", "c", "b"]
    assert found["names"]["y"].tolist() == ["b", "c", "a"]
    np.testing.assert_allclose(found["scores"]["x"], [1.0, 1.0, -2.0])
    assert found["logfoldchanges"]["y"].tolist() == [5.0, 6.0, 4.0]
    np.testing.assert_allclose(found["scores"]["y"], [3.0, 0.5, 0.0])
    from scipy import stats

    p = dict(zip(found["names"]["x"], found["pvals"]["x"], strict=True))
    np.testing.assert_allclose([p["a"], p["b"]], stats.norm.sf([1, 2]))
    adjusted = dict(zip(found["names"]["x"], found["pvals_adj"]["x"], strict=True))
    np.testing.assert_allclose(adjusted["b"], p["b"])
    np.testing.assert_allclose(max(adjusted.values()), np.mean(list(p.values())))


def test_reserve_knows_what_pertura_wrote():
    from anndata import AnnData

    adata = AnnData(np.ones((2, 2), np.float32), layers={"a": np.ones((2, 2)), "b": np.ones((2, 2))})
    adata.uns["mine"] = {"by": "someone", "wrote": ["layers/a"]}
    adata.uns["result"] = {"by": "pertura", "wrote": np.array(["layers/b"])}
    reserve(adata, {"layers": ["b", "c"]}, overwrite=False)
    with pytest.raises(ValueError, match=r"adata.layers\['a'\] exists"):
        reserve(adata, {"layers": ["a", "b"]}, overwrite=False)
    reserve(adata, {"layers": ["a"]}, overwrite=True)
