from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.stats import mannwhitneyu, spearmanr

from pertura import benchmark as bm
from pertura.benchmark._l1000 import compound_folds, rowwise_correlation


@pytest.fixture
def profiles():
    """Twelve compounds with two profiles, two with one; every compound has an effect of its own."""
    rng = np.random.default_rng(0)
    n_genes, names = 50, [f"drug{i}" for i in range(12) for _ in range(2)] + ["single1", "single2"]
    controls = 8 + 2 * rng.normal(size=(4, n_genes))
    effect = {name: rng.normal(size=n_genes) + 0.7 for name in set(names)}
    own = rng.integers(4, size=len(names))
    x = np.concatenate(
        [controls, [controls[c] + effect[n] + 0.1 * rng.normal(size=n_genes) for c, n in zip(own, names, strict=True)]]
    )
    obs = pd.DataFrame({"perturbation": ["control"] * 4 + names, "dose": [0.0] * 4 + [10.0] * len(names)})
    obs.index = [f"p{i}" for i in range(len(obs))]
    obs["paired_control_index"] = [f"p{i}" for i in [0, 1, 2, 3, *own]]
    var = pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    return AnnData(X=x.astype(np.float32), obs=obs, var=var)


def test_folds_keep_a_profile_of_every_compound_in_training():
    rng = np.random.default_rng(0)
    names = np.array(["control"] * 20 + ["a"] * 7 + ["b"] * 2 + ["c"] + [f"d{i}" for i in range(40) for _ in range(2)])
    names = rng.permutation(names)
    folds = compound_folds(names, 5)
    assert set(folds[np.isin(names, ["control", "c"])]) == {-1}
    rest = ~np.isin(names, ["control", "c"])
    assert set(folds[rest]) == set(range(5))
    for fold in range(5):
        assert set(names[folds == fold]) <= set(names[(folds != fold) & rest])
    with pytest.raises(ValueError, match="`n_folds`"):
        compound_folds(names, 1)


class Spy:
    """Knows the mean effect of each compound; refuses to see what is held out."""

    seen: list = []
    asked: list = []

    @classmethod
    def setup_anndata(cls, adata, *, perturbation_key, control, dose_key, pair_key):
        cls.pairs = adata.obs.groupby(pair_key, observed=True)[perturbation_key].agg(list)
        cls.seen.append(set(adata.obs_names))

    def __init__(self, adata):
        self.adata = adata

    def train(self, **arguments):
        pass

    def predict_perturbation(self, perturbation, *, adata, indices, dose, **options):
        assert dose == 10.0 and (adata.obs["perturbation"] == "control").all()
        self.asked.append((perturbation, tuple(adata.obs_names[indices])))
        part = adata[indices]
        return AnnData(X=part.X + 1.0 * np.arange(part.n_vars), obs=part.obs.copy(), var=part.var.copy())


def test_protocol(profiles, tmp_path):
    Spy.seen.clear(), Spy.asked.clear()
    path = tmp_path / "l1000.csv"
    spec = {"spy": bm.ModelSpec(Spy, stochastic=False)}
    options = {"models": spec, "n_folds": 3, "seeds": 1, "out": path, "progress": False}
    table = bm.run_l1000(profiles, **options)
    assert len(Spy.seen) == 3
    held = table.groupby("held_out")["profile"].agg(set)
    assert not held.iloc[0] & held.iloc[1]
    assert set().union(*held) == set(profiles.obs_names[4:28])
    for seen, (_, out) in zip(Spy.seen, held.items(), strict=True):
        assert not seen & out
        assert seen | out == set(profiles.obs_names)
    # Pairs: each identifier has exactly one control.
    assert all(labels.count("control") == 1 for labels in Spy.pairs)
    # Values are those of the definitions, from the profile's own control.
    for row in table[table["metric"] == "spearman"].sample(40, random_state=0).itertuples():
        truth = profiles[row.profile].X.ravel()
        own = profiles[profiles.obs.loc[row.profile, "paired_control_index"]].X.ravel()
        if row.model == "spy":
            own = own + np.arange(50)
        elif row.model != "identity":
            continue
        assert row.value == pytest.approx(spearmanr(own, truth).statistic, abs=1e-6)
    effect = table[table["metric"] == "pearson_effect"].groupby("model")["value"].mean()
    assert effect["identity"] == 0
    assert effect["compound_mean_effect"] > 0.95 > effect["mean_effect"]
    again = bm.run_l1000(profiles, **options)
    assert len(Spy.seen) == 3
    pd.testing.assert_series_equal(again["value"], table["value"])
    with pytest.raises(ValueError, match="`out`"):
        bm.run_l1000(profiles, **{**options, "n_folds": 2})


def test_pertvae(profiles):
    """The paper's prediction and identity baseline: decoded means, of the own control and the asked dose."""
    from pertura.model import PertVAE

    spec = bm.ModelSpec(PertVAE, init={"n_latent": 5}, train={"max_epochs": 2})
    table = bm.run_l1000(profiles, models={"PertVAE": spec}, n_folds=2, seeds=1, progress=False)
    assert {"PertVAE", "PertVAE mean", "PertVAE reconstruction", "identity"} <= set(table["model"])
    effect = table[table["metric"] == "pearson_effect"].pivot(index="profile", columns="model", values="value")
    assert effect.notna().all().all()
    # Hardly trained, the decoder gives the mean profile: noise taken out, not put back.
    values = table[table["metric"] == "spearman"].groupby("model")["value"].mean()
    assert values["PertVAE mean"] == pytest.approx(values["PertVAE reconstruction"], abs=0.1)
    s = bm.summarise_l1000(table).set_index(["metric", "model"])["p_reconstruction"]
    assert np.isfinite(s[("spearman", "PertVAE")]) and np.isfinite(s[("spearman", "PertVAE mean")])
    assert np.isnan(s[("spearman", "PertVAE reconstruction")])


def test_decoded_means_are_matched_to_their_profiles(profiles):
    from pertura.benchmark._l1000 import _Profiles
    from pertura.model import PertVAE

    data = _Profiles.of(profiles)
    test = np.flatnonzero(compound_folds(data.perturbation, 2) == 0)[::-1]
    spec = bm.ModelSpec(PertVAE, init={"n_latent": 5}, train={"max_epochs": 2})
    captured = {}

    class Keep(PertVAE):
        def train(self, **arguments):
            captured["model"] = self
            super().train(**arguments)

    result = data.fit(bm.ModelSpec(Keep, init=spec.init, train=spec.train), "m", test, 0)
    draws = (
        captured["model"]
        .posterior_predictive_sample(data.training(test)[:4].copy(), n_samples=2000, seed=1)
        .todense()
        .mean(2)
    )
    own = data.control[test]
    # means of a few draws of noise, the same in all states: an absolute tolerance
    np.testing.assert_allclose(result["m reconstruction"], draws[own], atol=0.4)
    # One control, several compounds: the same reconstruction, another prediction.
    first, second = np.flatnonzero(own == np.bincount(own).argmax())[:2]
    np.testing.assert_array_equal(result["m reconstruction"][first], result["m reconstruction"][second])
    assert np.abs(result["m mean"][first] - result["m mean"][second]).max() > 1e-6


def test_summary(profiles):
    table = bm.run_l1000(profiles, models={}, n_folds=2, seeds=1, progress=False)
    s = bm.summarise_l1000(table).set_index(["metric", "model"])
    values = table[table["metric"] == "spearman"].pivot(index="profile", columns="model", values="value")
    row = s.loc[("spearman", "compound_mean_effect")]
    assert row["mean"] == pytest.approx(values["compound_mean_effect"].mean())
    assert row["gain"] == pytest.approx((values["compound_mean_effect"] - values["identity"]).mean())
    assert row["gain_low"] < row["gain"] < row["gain_high"]
    expected = mannwhitneyu(values["compound_mean_effect"], values["identity"], alternative="greater").pvalue
    assert row["p_identity"] == pytest.approx(expected) and expected < 1e-3
    assert np.isnan(s.loc[("spearman", "identity"), "p_identity"])
    assert row["n_profiles"] == 24


def test_wrong_profiles(profiles):
    dose = profiles.obs.pop("dose")
    with pytest.raises(ValueError, match="no column 'dose'"):
        bm.run_l1000(profiles, models={})
    profiles.obs["dose"] = dose
    profiles.obs["paired_control_index"] = "p9"
    with pytest.raises(ValueError, match="no control profile"):
        bm.run_l1000(profiles, models={})


def test_rowwise_correlation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 9))
    a[3] = 2.0
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a[:3], b[:3], strict=True)] + [0]
    np.testing.assert_allclose(rowwise_correlation(a, b), expected)
