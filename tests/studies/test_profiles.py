"""Studies of bulk profiles: what is held out, and the simple answers where they are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, concat
from scipy import sparse
from scipy.stats import mannwhitneyu, spearmanr

from pertura.benchmark import ModelSpec, Results, parse_model

NAMES = [f"d{i:02d}" for i in range(12)]
STRENGTH = {"Low": 0.2, "Middle": 0.6, "High": 1.0}


@pytest.fixture
def screen():
    """Twelve compounds, three doses with effects in proportion to the logarithm, a signature that is the effect and noise."""
    from _common import LEVELS, Screen

    rng = np.random.default_rng(0)
    truth = pd.DataFrame(rng.normal(size=(12, 15)) + 1.0, index=NAMES, columns=[f"g{i}" for i in range(15)])
    rows = [("control", "", 0.0)] * 10 + [(n, lv, d) for n in NAMES for lv, d in LEVELS.items() for _ in range(2)]
    obs = pd.DataFrame(rows, columns=["perturbation", "condition", "level"], index=[f"p{i}" for i in range(len(rows))])
    x = np.stack([truth.loc[n] * STRENGTH[c] if c else np.zeros(15) for n, c, _ in rows])
    x = (5 + x + 0.05 * rng.normal(size=x.shape)).astype(np.float32)
    effects = {lv: truth * s for lv, s in STRENGTH.items()} | {"other": truth + 0.1 * rng.normal(size=truth.shape)}
    adata = AnnData(x, obs=obs, var=pd.DataFrame(index=truth.columns))
    reproducible = pd.Series(np.linspace(0, 1, 12), index=NAMES)
    return Screen(
        adata, "simulated", effects, {"other": ("other",), "Low": ("Low",)}, reproducible, {"dose_key": "level"}
    )


def test_held_out_compounds(screen, tmp_path):
    import compounds as study

    out = tmp_path / "found.csv"
    models = {"DrugAAE": study.drugaae(1, n_latent=4)}
    options = {"seeds": 1, "n_folds": 3, "descriptions": ["other"], "out": out, "progress": False}
    found = study.study(screen, models, **options)
    assert found.groupby(["dose", "model", "metric"])["perturbation"].nunique().eq(12).all()
    table = study.summary(found, ["mean effect", "ridge"], screen.reproducible, 0.5)
    chosen = (table["condition"] == "1.0") & (table["compounds"] == "all") & (table["metric"] == "pearson_effect")
    high = table[chosen].set_index("model")
    assert high.loc["copy of other", "mean"] > 0.95 > high.loc["mean effect", "mean"]
    assert high.loc["DrugAAE", "mean"] > high.loc["mean effect", "mean"]
    assert high.loc["DrugAAE", "over ridge"] == pytest.approx(high.loc["DrugAAE", "mean"] - high.loc["ridge", "mean"])
    assert set(table.loc[table["compounds"] == "replicates > 0.5", "n_conditions"]) == {6}
    assert set(table["condition"]) == {"0.04", "0.2", "1.0", "mean"}
    size = out.stat().st_size
    assert len(study.study(screen, models, **options)) == len(found) and out.stat().st_size == size


def test_conditions_that_describe_neither_train_nor_are_asked(screen):
    import compounds as study

    found = study.study(screen, {}, seeds=1, n_folds=3, descriptions=["Low"], progress=False)
    assert set(found["dose"]) == {"0.2", "1.0"}
    # the signature is the effect up to a factor: ridge and the copy have its order of genes
    value = found[found["metric"] == "pearson_effect"].groupby("model")["value"].mean()
    assert value["copy of Low"] > 0.99 and value["ridge"] > value["mean effect"]
    data, _ = study.described(screen, "Low")
    assert "Low" not in set(data.adata.obs["condition"])


def test_scores_of_compounds():
    import compounds as study

    truth = np.array([[1.0, 2, 4], [4, 1, 0], [0, 3, 1]])
    assert study.rank(truth, truth).tolist() == [1, 1, 1]
    assert study.rank(truth[[0, 0, 0]], truth)[1] == 0
    assert study.sign_accuracy([1.0, -1, 1], [2.0, 1, 1], np.zeros(3)) == pytest.approx(2 / 3)
    assert study.relative_error(np.zeros(3), truth, np.zeros(3)).tolist() == [1, 1, 1]


def test_nearest_neighbor_and_ridge(screen):
    import compounds as study

    rng = np.random.default_rng(1)
    data, complete = study.described(screen, "other")
    table = data.adata.uns[study.FEATURES] = data.adata.uns[study.FEATURES].astype(float)
    table.loc["d01"] = 2 * table.loc["d00"] + 0.01 * rng.normal(size=table.shape[1])
    table.loc["d02"] = 0.0
    simple = study.FromDescriptions(complete - {"d01", "d02"})
    measured = study.table_model(simple.neighbor)(data.adata, setup=data.keys, seed=0).mean["all", "1.0"]
    own = study.table_model(lambda found: found.effect)(data.adata, setup=data.keys, seed=0).mean["all", "1.0"]
    np.testing.assert_allclose(measured.loc["d01"], own.loc["d00"])
    np.testing.assert_allclose(measured.loc["d02"], own.drop(["d01", "d02"]).mean(), rtol=1e-5)


def test_held_out_dose(screen):
    import compounds as study

    found = study.study_dose(screen, {"DrugAAE": study.drugaae(1, n_latent=4)}, seeds=1, progress=False)
    assert set(found["dose"]) == {"0.2"} and found["perturbation"].nunique() == 12
    error = found[found["metric"] == "relative_error"].groupby("model")["value"].mean()
    # effects are on a line in log dose: interpolation is exact up to noise, the other doses are not
    assert error["interpolation in log dose"] < 0.01 < error["copy of High"]
    assert error["interpolation in log dose"] < error["DrugAAE"]


def test_a_time_at_which_some_compounds_are_known(screen):
    """What all effects have at that time is found from those that are known; compounds of one time are left out."""
    import compounds as study

    parts = []
    for hours, more in (("8h", 0.0), ("24h", 1.0)):
        part = screen.adata.copy()
        treated = (part.obs["perturbation"] != "control").to_numpy()
        part.X[treated] += more * np.linspace(-1, 1, part.n_vars)
        part.obs["hours"], part.obs_names = hours, part.obs_names + hours
        parts.append(part[(part.obs["perturbation"] != "d11").to_numpy() | (hours == "24h")])
    adata = concat(parts)
    given = replace(screen, adata=adata, setup={**screen.setup, "context_key": "hours"})
    models = {name: parse_model(name)[1] for name in ("MeanEffect", "TwoWayAdditive")}
    found = study.study_few(given, models, seeds=1, progress=False)
    assert set(found["context"]) == {"24h"} and set(found["dose"]) == {"0.04", "0.2", "1.0"}
    assert found["split"].nunique() == 3 and "d11" not in set(found["perturbation"])
    assert found.groupby("split")["perturbation"].nunique().eq(5).all()
    error = found[found["metric"] == "relative_error"].groupby("model")["value"].mean()
    assert error["TwoWayAdditive"] < 0.4 * error["MeanEffect"]


def test_target_areas(screen):
    import drug_targets as study
    from _common import Screen

    near = np.zeros((15, 15))
    near[:3, 3:] = near[3:, :3] = 1.0  # three genes have all edges
    screen.adata.varp["ppi"] = sparse.csr_matrix(near)
    known = pd.DataFrame(0.0, index=NAMES[:6], columns=screen.adata.var_names)
    known.iloc[:5, :3] = 1.0  # five drugs hit them; one hits a gene that no other drug does
    known.iloc[5, 8] = 1.0
    assert isinstance(screen, Screen)
    found = study.areas(screen, known, screen.effects["other"], seed=0, max_epochs=1)
    assert found["popularity"].tolist() == [1.0] * 5 + [pytest.approx(11 / 2 / 14)]
    assert found["degree"].tolist() == [1.0] * 5 + [pytest.approx(11 / 2 / 14)]
    assert set(found) == {"network", "signature", "neighbors", "degree", "popularity"} and found.notna().all().all()


# -- L1000 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def profiles():
    """Twelve compounds with two profiles, two with one; every compound has an effect of its own."""
    rng = np.random.default_rng(0)
    n_genes, names = 50, [f"drug{i}" for i in range(12) for _ in range(2)] + ["single1", "single2"]
    # of one plate
    controls = 8 + 2 * rng.normal(size=n_genes) + 0.1 * rng.normal(size=(4, n_genes))
    effect = {name: rng.normal(size=n_genes) + 0.7 for name in dict.fromkeys(names)}
    own = rng.integers(4, size=len(names))
    x = [controls[c] + effect[n] + 0.1 * rng.normal(size=n_genes) for c, n in zip(own, names, strict=True)]
    obs = pd.DataFrame({"perturbation": ["control"] * 4 + names, "dose": [0.0] * 4 + [10.0] * len(names)})
    obs.index = [f"p{i}" for i in range(len(obs))]
    obs["paired_control_index"] = [f"p{i}" for i in [0, 1, 2, 3, *own]]
    return AnnData(
        np.concatenate([controls, x]).astype(np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    )


def test_folds_keep_a_profile_of_every_compound_in_training():
    from l1000_profiles import compound_folds

    rng = np.random.default_rng(0)
    names = np.array(["control"] * 20 + ["a"] * 7 + ["b"] * 2 + ["c"] + [f"d{i}" for i in range(40) for _ in range(2)])
    names = rng.permutation(names)
    folds = compound_folds(names, 5)
    assert set(folds[np.isin(names, ["control", "c"])]) == {-1}
    rest = ~np.isin(names, ["control", "c"])
    assert set(folds[rest]) == set(range(5))
    for fold in range(5):
        assert set(names[folds == fold]) <= set(names[(folds != fold) & rest])


class Spy:
    """Predicts a ramp above the control profile; notes what it saw."""

    seen: list = []

    @classmethod
    def setup_anndata(cls, adata, *, perturbation_key, control, dose_key, pair_key):
        pairs = adata.obs.groupby(pair_key, observed=True)[perturbation_key].agg(list)
        assert all(labels.count("control") == 1 for labels in pairs)
        cls.seen.append(set(adata.obs_names))

    def __init__(self, adata):
        pass

    def train(self, **arguments):
        pass

    def predict_perturbation(self, perturbation, *, adata, dose, indices, **options):
        assert dose == 10.0 and (adata.obs["perturbation"] == "control").all()
        part = adata[indices]
        return AnnData(X=part.X + 1.0 * np.arange(part.n_vars), obs=part.obs.copy(), var=part.var.copy())


def test_l1000(profiles, tmp_path):
    import l1000_profiles as study

    Spy.seen.clear()
    models = {"spy": ModelSpec(Spy, stochastic=False)}
    path = tmp_path / "l1000.csv"
    found = study.study(profiles, models, seeds=1, n_folds=3, results=Results(path))
    held = found.groupby("held_out")["context"].agg(set)
    assert set().union(*held) == set(profiles.obs_names[4:28]) and sum(map(len, held)) == 24
    data = study.Profiles(profiles)
    reference = set(profiles.obs_names[data.is_reference])
    assert len(reference) == 2 and reference < set(profiles.obs_names[:4])
    for seen, out in zip(Spy.seen, held, strict=True):
        assert not seen & out and seen | out == set(profiles.obs_names) - reference
    # values are those of the definition, from the profile's own control
    for row in found.query("metric == 'spearman' and model in ['spy', 'identity']").itertuples():
        truth = profiles[row.context].X.ravel()
        paired = profiles.obs_names[data.control[profiles.obs_names.get_loc(row.context)]]
        assert paired not in reference
        if profiles.obs.loc[row.context, "paired_control_index"] not in reference:
            assert paired == profiles.obs.loc[row.context, "paired_control_index"]
        own = profiles[paired].X.ravel()
        own = own + np.arange(50) * (row.model == "spy")
        assert row.value == pytest.approx(spearmanr(own, truth).statistic, abs=1e-6)
    for row in found.query("metric == 'pearson_effect' and model == 'spy'").itertuples():
        truth = profiles[row.context].X.ravel() - profiles[data.is_reference].X.mean(0)
        assert row.value == pytest.approx(np.corrcoef(np.arange(50), truth)[0, 1], abs=1e-5)
    effect = found[found["metric"] == "pearson_effect"].groupby("model")["value"].mean()
    assert effect["identity"] == 0 and effect["compound_mean_effect"] > 0.95 > effect["mean_effect"]
    study.study(profiles, models, seeds=1, n_folds=3, results=Results(path))
    assert len(Spy.seen) == 3
    table = study.summary(found).set_index(["metric", "model"])
    wide = found[found["metric"] == "spearman"].pivot(index="context", columns="model", values="value")
    row = table.loc[("spearman", "compound_mean_effect")]
    assert row["gain"] == pytest.approx((wide["compound_mean_effect"] - wide["identity"]).mean())
    assert row["gain_low"] < row["gain"] < row["gain_high"] and row["n_profiles"] == 24
    expected = mannwhitneyu(wide["compound_mean_effect"], wide["identity"], alternative="greater").pvalue
    assert row["p_identity"] == pytest.approx(expected) and np.isnan(table.loc[("spearman", "identity"), "p_identity"])


def test_l1000_without_measurement_noise(profiles):
    """The paper's prediction and identity baseline: expectations, of the own control and the asked dose."""
    import l1000_profiles as study

    from pertura.model import PertVAE

    models = {"PertVAE": ModelSpec(PertVAE, init={"n_latent": 5}, train={"max_epochs": 2})}
    found = study.study(profiles, models, seeds=1, n_folds=2, results=Results())
    assert {"PertVAE", "PertVAE mean", "PertVAE reconstruction"} <= set(found["model"])
    wide = found[found["metric"] == "spearman"].pivot(index="context", columns="model", values="value")
    assert wide.notna().all(axis=None)
    # hardly trained, the decoder gives the mean profile: noise is taken out and not put back
    assert wide["PertVAE mean"].mean() == pytest.approx(wide["PertVAE reconstruction"].mean(), abs=0.1)
    assert (wide["PertVAE mean"] != wide["PertVAE"]).any()


def test_descriptions_and_doses_have_other_controls_than_the_truth(monkeypatch):
    """Profiles that are nothing but the noise of their controls: effects, descriptions and doses have none of it in common."""
    import compounds as study
    from _common import CONTROL, OTHER_CONTROLS, tggates

    from pertura import datasets

    rng = np.random.default_rng(0)
    rows = [
        (CONTROL if lv == "Control" else f"d{e}", f"d{e}", lv, t, r, e)
        for e in range(40)
        for t in (8.0, 24.0)
        for lv in ("Control", "Low", "Middle", "High")
        for r in (1, 2)
    ]
    obs = pd.DataFrame(rows, columns=["perturbation", "compound", "dose_level", "time", "replicate", "exp_id"])
    obs.index = [f"p{i}" for i in range(len(obs))]
    x = np.where((obs["perturbation"] == CONTROL).to_numpy()[:, None], rng.normal(size=(len(obs), 60)), 0.0)
    monkeypatch.setattr(datasets, "tggates_hepatocytes", lambda: AnnData(x.astype(np.float32), obs=obs.copy()))
    screen = tggates()
    treated = (screen.adata.obs["perturbation"] != CONTROL).to_numpy()
    label = screen.adata.obs["perturbation"].to_numpy()[treated]
    asked = pd.DataFrame(np.asarray(screen.adata.X)[treated]).groupby(label).mean()
    described = screen.effects["24h Middle"].loc[asked.index]
    alike = [np.corrcoef(asked.loc[n], described.loc[n])[0, 1] for n in asked.index]
    assert abs(np.mean(alike)) < 0.1
    other = pd.DataFrame(screen.adata.layers[OTHER_CONTROLS][treated]).groupby(label).mean()
    np.testing.assert_allclose(other - other.mean(), described.to_numpy() - described.to_numpy().mean(0), atol=1e-5)
    monkeypatch.setattr(study, "_run", lambda data, *rest: pd.DataFrame({"x": [data.adata]}))
    every = tggates(every=True)
    ((adata,),) = study.study_dose(every, {}, seeds=1).to_numpy()
    held = (adata.obs["level"] == 0.2).to_numpy()
    assert (adata.X[held] == every.adata.X[held]).all()
    assert (adata.X[~held] == every.adata.layers[OTHER_CONTROLS][~held]).all()


def test_controls_of_each_batch_are_halved():
    from _common import CONTROL, held_out_controls

    from pertura.benchmark import Dataset

    obs = pd.DataFrame({"perturbation": [CONTROL] * 20 + ["a"] * 20, "batch": ["x", "x", "y", "y"] * 10})
    obs.index = obs.index.astype(str)
    adata = AnnData(np.zeros((40, 2), np.float32), obs=obs)
    there = held_out_controls(Dataset(adata, "", "perturbation", CONTROL), 3, "batch")
    assert obs[there].value_counts().to_dict() == {(CONTROL, "x"): 5, (CONTROL, "y"): 5}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_simulated_compounds_are_linear_in_their_descriptions_or_not():
    import simulated_compounds as study

    values = {}
    for linear in (True, False):
        _, described, truth = study.simulate(linear, 100, n_genes=20)
        x, y = described.to_numpy(), truth.to_numpy()
        found = study.from_descriptions(x[:80], y[:80], x[80:])
        values[linear] = {name: np.corrcoef(v.ravel(), y[80:].ravel())[0, 1] for name, v in found.items()}
    assert values[True]["ridge"] > 0.75 > 0.6 > values[False]["ridge"], values
    assert values[False]["process of squared distance"] > values[False]["ridge"] + 0.2
    found = study.study(False, 0, n_compounds=30, max_epochs=1).set_index("method")
    assert np.isfinite(found[["pearson", "error"]]).all(axis=None) and found["share"].nunique() == 1
    # vectors of drugs that no left-out drug bears out have no part
    assert found.loc["DrugAAE", "pearson"] == found.loc["DrugAAE, closed form alone", "pearson"]
