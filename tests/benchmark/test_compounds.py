"""Held-out compounds and doses, on a screen whose effects are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from pertura.benchmark import (
    Screen,
    run_compounds,
    run_doses,
    summarise_compounds,
    tggates_conditions,
    tggates_screen,
)
from pertura.benchmark._drug_targets import target_areas

NAMES = [f"d{i:02d}" for i in range(12)]
DOSES = {"Low": 0.04, "Middle": 0.2, "High": 1.0}


@pytest.fixture(scope="module")
def screen() -> Screen:
    """Twelve compounds, three doses with effects in proportion to the logarithm, a signature that is the effect and noise."""
    rng = np.random.default_rng(0)
    truth = pd.DataFrame(rng.normal(size=(12, 15)) + 1.0, index=NAMES, columns=[f"g{i}" for i in range(15)])
    strength = {"Low": 0.2, "Middle": 0.6, "High": 1.0}
    rows = [("control", "", 0.0)] * 10 + [(n, lv, d) for n in NAMES for lv, d in DOSES.items() for _ in range(2)]
    obs = pd.DataFrame(rows, columns=["perturbation", "condition", "level"], index=[f"p{i}" for i in range(len(rows))])
    x = np.stack([truth.loc[n] * strength[c] if c else np.zeros(15) for n, c, _ in rows])
    x = 5 + x + 0.05 * rng.normal(size=x.shape)
    return Screen(
        AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=truth.columns)),
        {lv: truth * strength[lv] for lv in ("High", "Middle", "Low")},
        {lv: (DOSES[lv], None) for lv in ("High", "Middle", "Low")},
        {"other": truth + 0.1 * rng.normal(size=truth.shape), "Low": truth * 0.2},
        {"other": ("other",), "Low": ("Low",)},
        pd.Series(np.linspace(0, 1, 12), index=NAMES),
        {"dose_key": "level"},
    )


def test_held_out_compounds(screen, tmp_path):
    out = tmp_path / "found.csv"
    options = {"seeds": 1, "n_folds": 3, "model": {"n_latent": 4}, "train": {"max_epochs": 1}, "out": out}
    found = run_compounds(screen, descriptions=["other"], **options)
    assert found.groupby(["condition", "method"])["compound"].nunique().eq(12).all()
    table = summarise_compounds(found, agreeing=0.5)
    high = table[(table["condition"] == "High") & (table["compounds"] == "all")].set_index("method")
    assert high.loc["copy of other", "pearson"] > 0.95
    assert high.loc["DrugAAE", "pearson"] > 0.9 > high.loc["mean effect", "pearson"]
    assert high.loc["DrugAAE", "over_mean"] == pytest.approx(
        high.loc["DrugAAE", "pearson"] - high.loc["mean effect", "pearson"]
    )
    assert high.loc["DrugAAE", "error"] < 0.5
    assert set(table.loc[table["compounds"] == "replicates > 0.5", "n_compounds"]) == {6}
    chosen = found[found["method"] == "DrugAAE"]
    assert chosen["gene_by_gene"].all() and chosen["network"].notna().all()
    size = out.stat().st_size
    assert len(run_compounds(screen, descriptions=["other"], **options)) == len(found) and out.stat().st_size == size


def test_conditions_that_describe_are_not_asked(screen):
    found = run_compounds(screen, descriptions=["Low"], seeds=1, n_folds=3)
    assert set(found["condition"]) == {"High", "Middle"} and "DrugAAE" not in set(found["method"])
    with pytest.raises(ValueError, match="`descriptions`"):
        run_compounds(screen, descriptions=["smell"])


def test_held_out_dose(screen):
    found = run_doses(screen, seeds=1, model={"n_latent": 4}, train={"max_epochs": 1})
    assert set(found["condition"]) == {"Middle"}
    error = summarise_compounds(found).set_index("method")["error"]
    # effects are on a line in log dose: interpolation is exact, both neighbours are not
    assert error["interpolation in log dose"] < 1e-9 < error["DrugAAE"] < error["copy of High"]
    with pytest.raises(ValueError, match="`dose`"):
        run_doses(screen, dose=1.0)


def test_target_areas(screen):
    adata = screen.adata.copy()
    near = np.zeros((15, 15))
    near[:3, 3:] = near[3:, :3] = 1.0  # three genes have all edges
    adata.varp["ppi"] = sparse.csr_matrix(near)
    known = pd.DataFrame(0.0, index=NAMES[:6], columns=adata.var_names)
    known.iloc[:5, :3] = 1.0  # five drugs hit them; one hits a gene that no other drug does
    known.iloc[5, 8] = 1.0
    own = replace(screen, adata=adata, setup={**screen.setup, "ppi_key": "ppi"})
    found = target_areas(own, known, screen.signatures["other"], 0, 1)
    assert found["popularity"].tolist() == [1.0] * 5 + [pytest.approx(11 / 2 / 14)]
    assert found["degree"].tolist() == [1.0] * 5 + [pytest.approx(11 / 2 / 14)]
    assert set(found) == {"network", "signature", "neighbors", "degree", "popularity"} and found.notna().all().all()


@pytest.mark.slow
def test_hepatocytes(load_dataset):
    load_dataset("tggates_hepatocytes")
    load_dataset("repurposing_hub")
    screen = tggates_screen()
    assert list(screen.descriptions) == ["text", "8h High", "8h High + 24h Middle"]
    options = {"seeds": 1, "n_folds": 2, "model": {}, "train": {"max_epochs": 2}}
    found = run_compounds(screen, descriptions=["text", "8h High + 24h Middle"], **options)
    pearson = summarise_compounds(found).set_index(["description", "method"])["pearson"]
    text, both = pearson["text"], pearson["8h High + 24h Middle"]
    assert text["DrugAAE"] > text["mean effect"] - 0.01
    assert both["DrugAAE"] > both["ridge"] + 0.03 and both["DrugAAE"] > 0.6
    assert len(tggates_conditions().effects) == 9
