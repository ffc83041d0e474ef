from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from pertura import metrics as mt

KEYS = {"perturbation_key": "condition", "control": "ctrl"}


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 7)) + 3
    obs = pd.DataFrame({"condition": ["ctrl", "stim", "stim"] * 20, "cell_type": ["a"] * 30 + ["b"] * 30})
    obs.index = obs.index.astype(str)
    return AnnData(X=sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(7)]))


def test_measured_effect_by_hand(cells):
    table = mt.measured_effect(cells, "stim", context_key="cell_type", **KEYS).set_index(["context", "gene"])
    x = cells[30:].X.toarray()
    stim, ctrl = x[cells.obs["condition"][30:] == "stim"], x[cells.obs["condition"][30:] == "ctrl"]
    own = table.loc["b"]
    np.testing.assert_allclose(own["effect"], stim.mean(0) - ctrl.mean(0))
    se = np.sqrt(stim.var(0, ddof=1) / len(stim) + ctrl.var(0, ddof=1) / len(ctrl))
    np.testing.assert_allclose(own["se"], se)
    assert (own["n_perturbed"] == 20).all() and (own["n_control"] == 10).all()
    assert list(own.index) == list(cells.var_names)
    whole = mt.measured_effect(cells, **KEYS)
    assert set(whole["context"]) == {"all"} and len(whole) == 7


def test_measured_effect_refuses(cells):
    with pytest.raises(ValueError, match="`perturbation_key`"):
        mt.measured_effect(cells, perturbation_key="unheard", control="ctrl")
    with pytest.raises(ValueError, match="`perturbation`: no cell .* is 'stimm'; it holds stim. Did you mean 'stim'"):
        mt.measured_effect(cells, "stimm", **KEYS)
    with pytest.raises(ValueError, match="at least 50 cells of both 'stim'"):
        mt.measured_effect(cells, min_cells=50, **KEYS)
    cells.X *= 0
    cells.X += sparse.csr_matrix(np.full(cells.shape, 30.0))
    with pytest.warns(UserWarning, match="raw counts"):
        mt.measured_effect(cells, **KEYS)


def test_measured_effects_of_all_read_labels_as_models_do(cells):
    label = np.array(["ctrl", "A", "B+A", "A+B", "A+ctrl", "B+B"])[np.arange(60) % 6]
    cells.obs["condition"] = label
    cells.obs.loc["0", "condition"] = "rare"
    table = mt.measured_effect(cells, **KEYS)
    assert list(dict.fromkeys(table["perturbation"])) == ["A", "A+B", "B"]
    assert table.attrs["left_out"] == ["rare in all"]
    number = table.groupby("perturbation")["n_perturbed"].unique()
    assert number["A"] == [20] and number["A+B"] == [20] and number["B"] == [10]
    x, label = cells.X.toarray(), cells.obs["condition"].to_numpy()
    pair = table[table["perturbation"] == "A+B"]
    by_hand = x[np.isin(label, ["B+A", "A+B"])].mean(0) - x[label == "ctrl"].mean(0)
    np.testing.assert_allclose(pair["effect"], by_hand)
    pd.testing.assert_frame_equal(mt.measured_effect(cells, ["B+A"], **KEYS), pair.reset_index(drop=True))


def test_effects_as_anndata(cells):
    cells.obs["condition"] = np.array(["ctrl", "A", "B"])[np.arange(60) % 3]
    table = mt.measured_effect(cells, context_key="cell_type", **KEYS)
    # the order of the rows does not matter
    screen = mt.effects_to_anndata(table.sample(frac=1.0, random_state=0))
    assert set(screen.obs_names) == {"A | a", "A | b", "B | a", "B | b"}
    own = table[(table["perturbation"] == "B") & (table["context"] == "a")].set_index("gene")
    row = screen["B | a", own.index]
    np.testing.assert_allclose(row.X[0], own["effect"], rtol=1e-6)
    np.testing.assert_allclose(row.layers["se"][0], own["se"], rtol=1e-6)
    assert (row.obs["n_perturbed"] == 10).all() and (row.obs["perturbation"] == "B").all()
    ranked = sc.get.rank_genes_groups_df(screen, group="B | a")
    z = own["effect"] / own["se"]
    assert ranked["names"].tolist() == z.sort_values(ascending=False).index.tolist()
    sc.pl.rank_genes_groups_heatmap(screen, n_genes=2, show=False)
    sc.pl.dotplot(screen, ["g0", "g1"], groupby="perturbation", show=False)
    with pytest.raises(ValueError, match="same gene twice"):
        mt.effects_to_anndata(pd.concat([table, table]))
    with pytest.raises(ValueError, match="lacks the columns \\['gene'\\]"):
        mt.effects_to_anndata(table.drop(columns="gene"))


def effects(sd, bias=0.0, n=4000, se=0.3, scale=1.0):
    """Predictions with posterior sd `sd * scale` claimed as `sd`, measured with error `se`."""
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(n)]
    truth = rng.normal(size=n)
    predicted = pd.DataFrame({"gene": genes, "lfc_mean": truth + bias + sd * scale * rng.normal(size=n), "lfc_sd": sd})
    measured = pd.DataFrame({"gene": genes, "effect": truth + se * rng.normal(size=n), "se": se})
    about = {"perturbation": "stim", "context": "a"}
    return predicted.assign(**about), measured.assign(**about)


def test_calibrated_intervals_cover_their_level():
    curve = mt.effect_calibration(*effects(0.4))
    np.testing.assert_allclose(curve["coverage"], curve["level"], atol=0.025)
    assert curve["width"].iloc[-1] == pytest.approx(2 * 1.96 * 0.4, rel=1e-3)
    narrow = mt.effect_calibration(*effects(0.4, scale=3.0))
    assert (narrow["coverage"] < narrow["level"] - 0.02).all()
    ignoring = effects(0.4)
    ignoring[1]["se"] = 0.0
    assert (mt.effect_calibration(*ignoring)["coverage"][5:] < curve["coverage"][5:]).all()


def test_calibration_on_the_strongest_genes():
    predicted, measured = effects(0.1, se=0.01)
    strong = measured["effect"].abs() > measured["effect"].abs().quantile(0.99)
    predicted.loc[strong, "lfc_mean"] = 0.0  # the strongest effects are missed
    assert mt.effect_calibration(predicted, measured, levels=[0.9], top=40)["coverage"].item() == 0
    assert mt.effect_calibration(predicted, measured, levels=[0.9])["coverage"].item() > 0.85


def test_tables_that_do_not_match():
    predicted, measured = effects(0.1, n=5)
    with pytest.raises(ValueError, match="no gene"):
        mt.effect_calibration(predicted, measured.assign(gene="x" + measured["gene"]))
    with pytest.raises(ValueError, match="`levels`"):
        mt.effect_calibration(predicted, measured, levels=[90])
    # Several contexts are matched by name.
    both = [pd.concat([t, t.assign(context="b")]) for t in (predicted, measured)]
    both[1].loc[both[1]["context"] == "b", "effect"] += 100
    assert mt.effect_calibration(*both, levels=[0.999])["coverage"].item() == pytest.approx(0.5)
