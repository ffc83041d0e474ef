from __future__ import annotations

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from pertura import pl


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def scanpy_settings():
    before = sc.settings.autoshow, sc.settings.figdir
    yield sc.settings
    sc.settings.autoshow, sc.settings.figdir = before


@pytest.fixture
def effects():
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(40)]
    truth = rng.normal(size=40)
    about = {"gene": genes, "perturbation": "stim", "context": "B cells"}
    predicted = pd.DataFrame({**about, "lfc_mean": truth * 0.8, "lfc_sd": 0.1})
    predicted = predicted.assign(ci_low=predicted["lfc_mean"] - 0.2, ci_high=predicted["lfc_mean"] + 0.2)
    measured = pd.DataFrame({**about, "effect": truth, "se": 0.05})
    return predicted, measured.sample(frac=1, random_state=0)


@pytest.fixture
def summary():
    values = {"NoChange": 0.0, "MeanEffect": 0.6, "PertVAE": 0.8, "ceiling": 0.95}
    rows = [
        {"metric": "pearson_effect_top", "model": m, "mean": v, "low": v - 0.1, "high": v + 0.1}
        for m, v in values.items()
    ]
    rows += [{"metric": "mse", "model": m, "mean": 1 - v, "low": np.nan, "high": np.nan} for m, v in values.items()]
    rows += [{"metric": "interval_coverage", "model": m, "mean": 0.8, "low": 0.7, "high": 0.9} for m in values]
    return pd.DataFrame(rows)


def test_effect_scatter_draws_what_it_says(effects):
    predicted, measured = effects
    ax = pl.effect_scatter(predicted, measured, n_labels=5, n_intervals=12, show=False)
    points = ax.collections[1].get_offsets()
    assert len(points) == 40
    np.testing.assert_allclose(points[:, 1], points[:, 0] * 0.8)
    segments = np.array(ax.collections[0].get_segments())
    assert len(segments) == 12
    np.testing.assert_allclose(np.ptp(segments[:, :, 1], axis=1), 0.4)
    strongest = measured.set_index("gene")["effect"].abs().nlargest(12)
    np.testing.assert_allclose(np.sort(np.abs(segments[:, 0, 0])), np.sort(strongest))
    names = {t.get_text() for t in ax.texts if t.get_text().startswith("g")}
    assert names == set(strongest.index[:5])
    assert any(t.get_text() == "r = 1.00" for t in ax.texts)
    assert ax.get_title() == "stim, B cells"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("measured effect", "predicted effect")


def test_effect_scatter_chooses(effects):
    predicted, measured = effects
    two = [pd.concat([t, t.assign(context="T cells")]) for t in effects]
    with pytest.raises(ValueError, match="`context`.*name one"):
        pl.effect_scatter(*two, show=False)
    ax = pl.effect_scatter(*two, context="T cells", genes=["g3"], show=False)
    assert ax.get_title() == "stim, T cells"
    assert [t.get_text() for t in ax.texts if t.get_text().startswith("g")] == ["g3"]
    with pytest.raises(ValueError, match="`context`.*no 'unheard'"):
        pl.effect_scatter(predicted, measured, context="unheard", show=False)
    with pytest.raises(ValueError, match="`genes`"):
        pl.effect_scatter(predicted, measured, genes=["unheard"], show=False)


def test_benchmark_orders_and_marks(summary):
    ax = pl.benchmark(summary, "pearson_effect_top", show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["PertVAE", "MeanEffect", "NoChange"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == [0.8, 0.6, 0.0]
    # Baselines are grey.
    assert [line.get_color() for line in dots] == ["C0", "0.5", "0.5"]
    marks = {line.get_label(): line.get_xdata()[0] for line in ax.lines if not line.get_label().startswith("_")}
    assert marks == {"MeanEffect": 0.6, "ceiling": 0.95}
    intervals = [
        tuple(line.get_xdata()) for line in ax.lines if line.get_marker() == "None" and len(set(line.get_ydata())) == 1
    ]
    assert (pytest.approx(0.7), pytest.approx(0.9)) in intervals
    ax = pl.benchmark(summary, "mse", show=False)  # smaller is better
    assert [t.get_text() for t in ax.get_yticklabels()] == ["PertVAE", "MeanEffect", "NoChange"]
    ax = pl.benchmark(summary, "mse", models=["NoChange", "PertVAE"], title="Kang", show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["NoChange", "PertVAE"]
    assert ax.get_title() == "Kang"
    ax = pl.benchmark(summary, "interval_coverage", show=False)
    assert 0.9 in [line.get_xdata()[0] for line in ax.lines if line.get_label() == "nominal"]


def test_benchmark_refuses(summary):
    with pytest.raises(ValueError, match="`metric`"):
        pl.benchmark(summary, "unheard", show=False)
    with pytest.raises(ValueError, match="several datasets"):
        pl.benchmark(pd.concat([summary, summary]), "mse", show=False)
    with pytest.raises(ValueError, match="`models`"):
        pl.benchmark(summary, "mse", models=["unheard"], show=False)


def test_calibration():
    curve = pd.DataFrame({"level": [0.9, 0.5], "coverage": [0.7, 0.4]})
    ax = pl.calibration({"PertVAE": curve, "other": curve}, title="Kang", show=False)
    drawn = ax.lines[1]
    assert drawn.get_xdata().tolist() == [0.5, 0.9] and drawn.get_ydata().tolist() == [0.4, 0.7]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["PertVAE", "other"]
    assert pl.calibration(curve, show=False).get_legend() is None
    with pytest.raises(ValueError, match="`curves`"):
        pl.calibration(curve.drop(columns="coverage"), show=False)


def test_showing_and_saving(effects, tmp_path, monkeypatch, scanpy_settings):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    scanpy_settings.autoshow, scanpy_settings.figdir = True, tmp_path
    assert pl.effect_scatter(*effects) is None and shown == [1]
    assert pl.effect_scatter(*effects, show=False) is not None and shown == [1]
    figure, given = plt.subplots()
    assert pl.effect_scatter(*effects, ax=given) is given and shown == [1]
    assert pl.effect_scatter(*effects, ax=given, show=True) is None and shown == [1, 1]
    pl.effect_scatter(*effects, save=True)
    pl.effect_scatter(*effects, save="_kang.png")
    pl.effect_scatter(*effects, save=tmp_path / "deep" / "own.png")
    assert shown == [1, 1]
    ending = scanpy_settings.file_format_figs
    assert {p.name for p in tmp_path.rglob("*.*")} == {f"effect_scatter.{ending}", "effect_scatter_kang.png", "own.png"}
    scanpy_settings.autoshow = False
    assert pl.effect_scatter(*effects) is not None and shown == [1, 1]


def test_gene_importance_shows_the_strongest_on_top():
    table = pd.DataFrame(
        {"importance": [0.1, 0.5, 0.3], "direction": [1.0, -0.9, 0.2]}, index=pd.Index(["a", "b", "c"], name="gene")
    )
    ax = pl.gene_importance(table, n_genes=2, show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["c", "b"]
    assert [bar.get_width() for bar in ax.patches] == [0.3, 0.5]
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    with pytest.raises(ValueError, match="`table` lacks the columns"):
        pl.gene_importance(table[["importance"]])


def test_contexts_are_named_and_coloured():
    table = pd.DataFrame({"PC1": [1.0, -1.0], "PC2": [0.5, 0.0]}, index=["x", "y"])
    ax = pl.contexts(table, color={"x": 2.0, "y": 1.0}, label="response", show=False)
    assert {t.get_text() for t in ax.texts} == {"x", "y"}
    np.testing.assert_allclose(ax.collections[0].get_offsets(), table.to_numpy())
    assert list(ax.collections[0].get_array()) == [2.0, 1.0]
    assert len(pl.contexts(table[["PC1"]], show=False).collections) == 1
    with pytest.raises(ValueError, match="`table` has no column 'PC1'"):
        pl.contexts(table[["PC2"]])


def test_plots_of_drugs():
    table = pd.DataFrame(
        {
            "perturbation": "a",
            "context": "all",
            "gene": ["g1", "g1", "g2", "g2"],
            "dose": [1.0, 10.0, 1.0, 10.0],
            "lfc_mean": [0.1, 0.5, 0.0, -0.4],
            "ci_low": [0.0, 0.3, -0.1, -0.6],
            "ci_high": [0.2, 0.7, 0.1, -0.2],
        }
    )
    ax = pl.dose_response(table, ["g1", "g2"], show=False)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.1, 0.5])
    assert ax.get_xscale() == "log"
    with pytest.raises(ValueError, match="no row of these genes"):
        pl.dose_response(table, ["g3"], show=False)
    rng = np.random.default_rng(0)
    vectors = pd.DataFrame(rng.normal(size=(6, 3)), index=list("abcdef")).assign(trained=[True] * 5 + [False])
    ax = pl.drug_map(vectors, labels=["f"], show=False)
    assert sum(len(c.get_offsets()) for c in ax.collections) == 6
    scores = pd.DataFrame([[3.0, 1.0, 2.0]], index=["a"], columns=["g1", "g2", "g3"])
    ax = pl.target_ranking(scores, "a", known=["g3"], n_genes=2, show=False)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["g3", "g1"]
    with pytest.raises(ValueError, match="`perturbation`"):
        pl.target_ranking(scores, "b")


def test_dose_response_of_several_contexts():
    one = {"gene": "g1", "dose": [1.0, 10.0], "lfc_mean": [0.1, 0.5], "ci_low": [0.0, 0.3], "ci_high": [0.2, 0.7]}
    parts = [
        pd.DataFrame({**one, "context": c, "perturbation": "a"}).assign(lfc_mean=[0.1, i]) for i, c in enumerate("xyz")
    ]
    table = pd.concat(parts)
    measured = pd.DataFrame({"gene": "g1", "dose": ["10"], "effect": [7.0], "context": "y"})
    axes = pl.dose_response(table, ["g1"], measured=measured, n_columns=2, show=False)
    assert [ax.get_title() for ax in axes] == ["x", "y", "z"]
    assert [ax.lines[0].get_ydata()[1] for ax in axes] == [0, 1, 2]
    drawn = [[line.get_ydata().tolist() for line in ax.lines if line.get_marker() == "o"] for ax in axes]
    assert drawn == [[[]], [[7.0]], [[]]]
    assert len(axes[0].figure.axes) == 3
    with pytest.raises(ValueError, match="`ax` holds one panel, but there are 3"):
        pl.dose_response(table, ["g1"], ax=axes[0])
    assert pl.dose_response(table, ["g1"], context="y", ax=axes[0]).get_title() == "a"
