"""DrugAAE: recovery of planted drug classes and targets, the adversary, missing modalities, plots and scores."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from pertura import priors
from pertura.model import DrugAAE

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
WORDS = ("statin lipid", "kinase growth", "steroid nuclear", "channel nerve", "proteasome protein")


def drug_screen(
    n_genes: int = 80, n_drugs: int = 40, n_cells: int = 12, n_control: int = 200, n_held_out: int = 10, seed: int = 0
) -> AnnData:
    """Drugs of five classes: words of a class in the text, its two targets' network neighbourhoods move.

    ``uns["truth"]``: effect of each drug on log-expression; ``uns["targets"]``; ``uns["text"]``; ``uns["held_out"]``.
    """
    rng = np.random.default_rng(seed)
    half = sparse.random(n_genes, n_genes, 0.03, random_state=seed, data_rvs=lambda n: np.ones(n))
    network = ((half + half.T) > 0).astype(float)
    network.setdiag(0)
    targets = rng.permutation(n_genes)[: 2 * len(WORDS)].reshape(len(WORDS), 2)
    hit = np.zeros((len(WORDS), n_genes))
    np.put_along_axis(hit, targets, rng.choice([-1.5, 1.5], targets.shape), 1)
    degree = np.asarray(network.sum(1)).ravel() + 1
    walk = network.toarray() / degree[:, None]
    class_effect = hit + 0.5 * hit @ walk * 2 + 0.25 * hit @ walk @ walk * 2
    label = np.arange(n_drugs) % len(WORDS)
    names = [f"drug{i:02d}" for i in range(n_drugs)]
    truth = (
        class_effect[label] * rng.uniform(0.7, 1.3, (n_drugs, 1))
        + rng.normal(0, 0.05, (n_drugs, n_genes))
        + 0.3 * (np.arange(n_genes) < 5)
    )
    base = rng.normal(1.0, 0.7, n_genes)
    what = np.r_[np.full(n_control, -1), np.repeat(np.arange(n_drugs), n_cells)]
    state = rng.normal(size=(len(what), 2)) @ rng.normal(0, 0.3, (2, n_genes))
    rate = np.exp(base + state + np.where(what[:, None] >= 0, truth[what], 0.0))
    counts = rng.poisson(rate / rate.sum(1, keepdims=True) * rng.lognormal(7.0, 0.2, (len(what), 1)))
    obs = pd.DataFrame(
        {"drug": ["control" if w < 0 else names[w] for w in what]}, index=[f"c{i}" for i in range(len(what))]
    )
    adata = AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))
    adata.varp["ppi"] = sparse.csr_matrix(network)
    adata.uns["truth"] = pd.DataFrame(truth, index=names, columns=adata.var_names)
    adata.uns["targets"] = pd.DataFrame(hit[label] != 0, index=names, columns=adata.var_names)
    noise = [" ".join(rng.choice(["oral", "once", "daily", "adult", "tablet", "dose"], 3)) for _ in names]
    adata.uns["text"] = pd.Series([f"{WORDS[c]} {extra}" for c, extra in zip(label, noise, strict=True)], index=names)
    adata.uns["held_out"] = names[n_drugs - n_held_out :]
    return adata


def fit(adata: AnnData, table: pd.DataFrame | None, *, epochs: int = 12, **options) -> DrugAAE:
    known = adata[~adata.obs["drug"].isin(adata.uns["held_out"])].copy()
    if table is not None:
        known.uns["drugs"] = table
    DrugAAE.setup_anndata(
        known,
        perturbation_key="drug",
        control="control",
        ppi_key="ppi",
        perturbation_features_key=None if table is None else "drugs",
    )
    torch.manual_seed(0)
    model = DrugAAE(known, **options)
    model.train(max_epochs=epochs, **QUIET)
    return model


def predicted(model: DrugAAE, names: list[str]) -> np.ndarray:
    found = model.get_perturbation_effect(names, n_samples=2)
    wide = found.pivot_table(index="perturbation", columns="gene", values="lfc_mean", sort=False)
    return wide.loc[names, model.gene_names].to_numpy()


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]))


@pytest.fixture(scope="module")
def screen() -> AnnData:
    return drug_screen()


@pytest.fixture(scope="module")
def model(screen) -> DrugAAE:
    return fit(screen, priors.drug_table(screen.uns["text"].index, text=screen.uns["text"]))


def test_unseen_drugs_of_known_classes(screen, model):
    names = screen.uns["held_out"]
    truth = screen.uns["truth"]
    mean = np.tile(truth.drop(names).mean().to_numpy(), (len(names), 1))
    score = pearson(predicted(model, names), truth.loc[names].to_numpy())
    assert score > 0.75
    assert score > pearson(mean, truth.loc[names].to_numpy()) + 0.3


def test_targets_of_unseen_drugs(screen, model):
    names = screen.uns["held_out"]
    score = model.get_drug_target_scores(names)
    auc = [roc_auc_score(screen.uns["targets"].loc[n], score.loc[n]) for n in names]
    assert np.mean(auc) >= 0.8
    other = model.get_drug_target_scores(names, method="signature")
    assert other.shape == score.shape and np.isfinite(other).all().all()
    with pytest.raises(ValueError, match="`method`"):
        model.get_drug_target_scores(names, method="best")


def test_targets_of_similar_drugs(screen, model):
    names, known = screen.uns["held_out"], screen.uns["targets"]
    score = model.get_drug_target_scores(names, method="neighbors", known_targets=known.drop(names))
    popular = known.drop(names).sum()
    auc = lambda table: np.mean([roc_auc_score(known.loc[n], table.loc[n]) for n in names])  # noqa: E731
    assert auc(score) > 0.97 > auc(pd.DataFrame([popular] * len(names), index=names))
    # what is known of the drug itself does not enter
    lie = known.copy()
    lie.loc[names[0]] = ~known.loc[names[0]]
    both = (model.get_drug_target_scores(names[:1], method="neighbors", known_targets=t) for t in (known, lie))
    pd.testing.assert_frame_equal(*both)
    for options in ({"method": "neighbors"}, {"known_targets": known}):
        with pytest.raises(ValueError, match="`known_targets`"):
            model.get_drug_target_scores(names, **options)
    with pytest.raises(ValueError, match="no drug of `known_targets`"):
        model.get_drug_target_scores(names, method="neighbors", known_targets=known.add_prefix("x", axis=0))


def test_what_shuffled_texts_say_is_not_believed(screen):
    text = screen.uns["text"]
    shuffled = pd.Series(np.random.default_rng(1).permutation(text.to_numpy()), index=text.index)
    model = fit(screen, priors.drug_table(text.index, text=shuffled), epochs=2)
    assert model.description_["share"] == 0
    names = screen.uns["held_out"]
    assert pearson(predicted(model, names[:2]), predicted(model, names[2:4])) > 0.95


def measured(adata: AnnData, names: list[str]) -> np.ndarray:
    x = np.log1p(1e4 * adata.X / adata.X.sum(1, keepdims=True))
    means = pd.DataFrame(x).groupby(adata.obs["drug"].to_numpy()).mean()
    return (means.loc[names] - means.loc["control"]).to_numpy()


def test_trained_drugs_have_their_measured_effect(screen, model):
    names = list(model.vocabulary.names)
    found, own = predicted(model, names), measured(model.adata, names)
    assert pearson(found, own) > 0.95
    assert ((found - own) ** 2).sum() < 0.15 * (own**2).sum()


def test_own_perturbation_gives_the_counts_back(model):
    rows = np.flatnonzero(model.adata.obs["drug"].isin(["control", "drug03"]))[-40:]
    for name in ("control", "drug03"):
        own = rows[(model.adata.obs["drug"] == name).to_numpy()[rows]]
        found = model.predict_perturbation(name, indices=own, scale="counts", ci=None, return_anndata=True)
        assert len(own) and np.array_equal(found.X, model.adata.X[own])


def test_effects_are_means_of_predictions_from_controls(screen, model):
    name = screen.uns["held_out"][0]
    rows = np.flatnonzero(model.adata.obs["drug"] == "control")
    cells = model.predict_perturbation(name, indices=rows, ci=None, return_anndata=True)
    x = model.adata.X[rows]
    own = np.log1p(1e4 * x / x.sum(1, keepdims=True))
    table = model.get_perturbation_effect(name, n_samples=4).set_index("gene").loc[model.gene_names, "lfc_mean"]
    np.testing.assert_allclose((cells.X - own).mean(0), table, atol=0.01, rtol=0.01)


def test_log_likelihood_of_a_cell_knows_its_drug(model):
    rows = np.flatnonzero(model.adata.obs["drug"] != "control")[::3]
    own = model.get_marginal_ll(indices=rows, n_samples=20)
    other = model.adata.copy()
    labels = other.obs["drug"].to_numpy(object)
    treated = labels != "control"
    labels[treated] = np.roll(labels[treated], 24)
    other.obs["drug"] = labels
    assert (
        own.shape == rows.shape and own.mean() > model.get_marginal_ll(other, indices=rows, n_samples=20).mean() + 1.0
    )


def test_dose_and_batch_matter():
    """Effects rise with the dose; cells of different batches are decoded apart."""
    adata = drug_screen(n_genes=40, n_drugs=5, n_cells=30, n_control=100, n_held_out=0)
    rng = np.random.default_rng(0)
    adata.obs["dose"] = np.where(adata.obs["drug"] == "control", 0.0, rng.choice([1.0, 10.0], adata.n_obs))
    control = adata.X[adata.obs["drug"] == "control"].mean(0)
    low = (adata.obs["dose"] == 1.0).to_numpy()
    adata.X[low] = rng.poisson(0.9 * control + 0.1 * adata.X[low])
    adata.obs["batch"] = rng.choice(["b1", "b2"], adata.n_obs)
    adata.X[(adata.obs["batch"] == "b2").to_numpy(), :5] *= 4
    keys = {"perturbation_key": "drug", "control": "control", "dose_key": "dose"}
    DrugAAE.setup_anndata(adata, batch_key="batch", **keys)
    torch.manual_seed(0)
    model = DrugAAE(adata)
    model.train(max_epochs=15, **QUIET)
    name = model.vocabulary.names[0]
    table = model.get_perturbation_effect(name, dose=[0.0, 1.0, 5.0, 10.0], n_samples=2)
    size = table.assign(size=table["lfc_mean"].abs()).groupby("dose")["size"].mean()
    assert size["0"] < 1e-6 < size["1"] < size["5"] < size["10"] and size["1"] < 0.5 * size["10"]
    rows = np.flatnonzero(adata.obs["drug"] == "control")
    expected = model.predict_perturbation("control", indices=rows, ci=None, noise="none", return_anndata=True)
    of_batch = pd.DataFrame(expected.X[:, :5]).groupby(adata.obs["batch"].to_numpy()[rows]).mean()
    assert (of_batch.loc["b2"] - of_batch.loc["b1"]).mean() > 0.5


def test_missing_text_is_the_mean_effect(screen):
    text = screen.uns["text"].copy()
    names = screen.uns["held_out"]
    text[names[0]] = ""
    model = fit(screen, priors.drug_table(text.index, text=text), epochs=2)
    found = predicted(model, names[:2])
    truth = screen.uns["truth"]
    mean = truth.drop(names).mean().to_numpy()
    assert np.corrcoef(found[0], mean)[0, 1] > np.corrcoef(found[1], mean)[0, 1]
    assert np.isfinite(found).all()
    assert model.get_reliability(names[0]).attrs["reliability"] == 0
    assert model.get_reliability(names[1]).attrs["reliability"] > 0.2


def test_nearest_drugs_are_of_the_class(screen, model):
    name = screen.uns["held_out"][0]
    text = screen.uns["text"]
    neighbors = model.get_reliability(name)["neighbor"]
    assert all(text[n].split()[0] == text[name].split()[0] for n in neighbors)
    asked = model.predict_perturbation([name, "drug00"], n_samples=2, return_anndata=True, indices=range(3)).uns
    np.testing.assert_allclose(
        asked["prediction"]["reliability"], [model.get_reliability(name).attrs["reliability"], 1]
    )
    assert model.get_reliability("drug00").attrs["reliability"] == 1


def test_embeddings(screen, model):
    table = model.get_drug_embedding()
    assert list(table.index) == [*model.vocabulary.names, *screen.uns["held_out"]]
    assert not table.loc[screen.uns["held_out"], "trained"].any() and table.loc["drug00", "trained"]
    assert model.get_gene_embedding().shape == (screen.n_vars, 32)


def cells_along_the_axes_of_drugs(n_drugs: int = 3, n_cells: int = 80, n_genes: int = 30, seed: int = 0) -> AnnData:
    """Cells differ, before any drug, along the very axes that the drugs move: who sees expression alone can not tell."""
    rng = np.random.default_rng(seed)
    axes = np.zeros((n_drugs, n_genes))
    for i in range(n_drugs):
        axes[i, 8 * i : 8 * i + 8] = rng.choice([-1.0, 1.0], 8)
    what = np.repeat(np.arange(-1, n_drugs), n_cells)
    log_rate = rng.normal(1.0, 0.5, n_genes) + 0.25 * rng.normal(size=(len(what), n_drugs)) @ axes
    rate = np.exp(log_rate + np.where(what[:, None] >= 0, axes[what], 0.0))
    counts = rng.poisson(150 * rate / rate.sum(1, keepdims=True)).astype(np.float32)
    obs = pd.DataFrame({"drug": np.where(what < 0, "control", [f"drug{w}" for w in what])})
    obs.index = obs.index.astype(str)
    return AnnData(counts, obs=obs)


def test_adversary_takes_the_perturbation_out_of_the_basal_state():
    adata = cells_along_the_axes_of_drugs()
    label = adata.obs["drug"].to_numpy(str)
    train, test = np.split(np.random.default_rng(1).permutation(len(label)), [240])

    def probe(x: np.ndarray) -> float:
        """Share of held-out cells, four labels equally often, whose label a linear classifier finds."""
        x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
        classifier = LogisticRegression(class_weight="balanced", max_iter=500).fit(x[train], label[train])
        return balanced_accuracy_score(label[test], classifier.predict(x[test]))

    basal, perturbed = {}, {}
    for weight in (0.0, 1000.0):
        known = adata.copy()
        DrugAAE.setup_anndata(known, perturbation_key="drug", control="control")
        torch.manual_seed(0)
        # without the closed form the guide sees raw expression: the adversary alone can take the perturbation out
        model = DrugAAE(known, preset="paper", n_latent=4, discriminator_hidden=(32, 32), adversary_weight=weight)
        model.train(
            max_epochs=50,
            lr=3e-3,
            batch_size=128,
            datasplitter_kwargs={"external_indexing": [np.sort(train)]},
            plan_kwargs={"warmup_start": 0.0, "warmup_end": 0.2, "n_discriminator_steps": 5 if weight else 1},
            **QUIET,
        )
        basal[weight], perturbed[weight] = (
            probe(model.get_latent_representation(kind=k, n_samples=30)) for k in ("basal", "perturbed")
        )
    assert basal[0.0] > 0.7, (basal, perturbed)
    # chance is 0.25; means over antithetic draws are exact, and show what the noise of the posterior hides
    assert basal[1000.0] < min(0.6, basal[0.0] - 0.25), (basal, perturbed)
    assert perturbed[1000.0] > 0.85, (basal, perturbed)


@pytest.mark.slow
def test_ablations():
    """What each part adds to effects and targets of unseen drugs; ``--log-cli-level=INFO`` shows the table."""
    rows = []
    for seed in (0, 1):
        screen = drug_screen(seed=seed)
        text, truth, names = (screen.uns[k] for k in ("text", "truth", "held_out"))
        rng = np.random.default_rng(seed)
        signatures = truth + rng.normal(0, 0.5, truth.shape)
        mixed = pd.Series(rng.permutation(text.to_numpy()), index=text.index)
        other = screen.copy()
        order = rng.permutation(screen.n_vars)
        other.varp["ppi"] = sparse.csr_matrix(screen.varp["ppi"])[order][:, order]
        by_text = priors.drug_table(text.index, text=text)
        settings = {
            "text": (screen, by_text, {}),
            "text and signature": (screen, priors.drug_table(text.index, text=text, signatures=signatures), {}),
            "signature, no text": (screen, priors.drug_table(text.index, signatures=signatures), {}),
            "shuffled text": (screen, priors.drug_table(text.index, text=mixed), {}),
            "shuffled interactions": (other, by_text, {}),
            "no adversary": (screen, by_text, {"adversary_weight": 0.0}),
            "paper": (screen, by_text, {"preset": "paper"}),
        }
        for setting, (adata, table, options) in settings.items():
            model = fit(adata, table, **options)
            score = model.get_drug_target_scores(names)
            auc = np.mean([roc_auc_score(screen.uns["targets"].loc[n], score.loc[n]) for n in names])
            effect = pearson(predicted(model, names), truth.loc[names].to_numpy())
            rows.append({"setting": setting, "effect": effect, "targets": auc})
    found = pd.DataFrame(rows).groupby("setting", sort=False).mean()
    logging.getLogger(__name__).info("\n%s", found.round(2))
    effect = found["effect"]
    assert effect["text"] > effect["signature, no text"] > effect["shuffled text"] + 0.1
    assert effect["text"] > effect["paper"] + 0.3
    assert found.loc["text", "targets"] > 0.95 > found.loc["shuffled text", "targets"]


def test_interactions_survive_saving_and_training_goes_on(screen, model, tmp_path):
    model.save(tmp_path / "model")
    loaded = DrugAAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    torch.testing.assert_close(loaded.module.genes(), model.module.genes())
    assert loaded.description_ == model.description_
    # data to load it with need no interactions
    known = model.adata.copy()
    del known.varp["ppi"]
    loaded = DrugAAE.load(tmp_path / "model", adata=known, accelerator="cpu")
    torch.testing.assert_close(loaded.module.genes(), model.module.genes())
    names = screen.uns["held_out"][:2]
    np.testing.assert_allclose(predicted(loaded, names), predicted(model, names), rtol=1e-5, atol=1e-6)
    loaded.train(max_epochs=1, **QUIET)
    assert np.isfinite(predicted(loaded, names)).all()
    assert not torch.equal(loaded.module.genes(), model.module.genes())


def test_paper_preset_is_vectors_alone(screen, model):
    adata = screen.copy()
    DrugAAE.setup_anndata(adata, perturbation_key="drug", control="control")
    paper = DrugAAE(adata, preset="paper")
    assert paper.module.closed_form.n_components == 0 and paper.module.counterfactual_weight == 0
    assert model.module.closed_form.n_components > 0 and model.module.counterfactual_weight == 1
    assert DrugAAE(adata, preset="paper", n_latent=7).module.n_latent == 7


@pytest.mark.parametrize(("key", "value"), [("absent", None), ("bad", -1.0)])
def test_wrong_interactions(screen, key, value):
    adata = screen.copy()
    if value is not None:
        adata.varp[key] = adata.varp["ppi"] * value
    with pytest.raises(ValueError, match="`ppi_key`"):
        DrugAAE.setup_anndata(adata, perturbation_key="drug", control="control", ppi_key=key)
