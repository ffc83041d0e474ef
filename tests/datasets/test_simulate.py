from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse
from scipy.stats import binom

from pertura.datasets import simulate, true_effects, true_network
from pertura.datasets._simulate_truth import ExpectedLog1p


def dense(adata: ad.AnnData) -> np.ndarray:
    return adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)


def group(adata: ad.AnnData, perturbation: str, context: str, dose: float | None = None) -> np.ndarray:
    obs = adata.obs
    rows = (obs["perturbation"] == perturbation) & (obs["cell_type"] == context) & obs["qc_pass"]
    if dose is not None:
        rows &= obs["dose"] == dose
    return dense(adata[rows.to_numpy()])


def z_scores(adata: ad.AnnData) -> np.ndarray:
    """Observed minus true effect in standard errors: conditions x genes."""
    truth, truth_se = true_effects(adata), true_effects(adata, kind="effect_se")
    scores = []
    for key in truth.index:
        perturbed = group(adata, key[0], key[-1], key[1] if "dose" in truth.index.names else None)
        control = group(adata, "control", key[-1])
        variance = perturbed.var(axis=0) / len(perturbed) + control.var(axis=0) / len(control)
        observed = perturbed.mean(axis=0) - control.mean(axis=0)
        scores.append((observed - truth.loc[key]) / np.sqrt(variance + truth_se.loc[key] ** 2))
    return np.array(scores)


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    """Everything at once, small."""
    return simulate(
        n_cells_per_condition=60,
        n_genes=80,
        n_regulators=12,
        n_perturbations=6,
        combinations=3,
        doses=[0, 1, 10],
        frac_qc_failed=0.25,
        n_batches=3,
        seed=4,
    )


def test_same_seed_same_data_and_other_seed_other_data() -> None:
    first, again, other = (simulate(n_cells_per_condition=10, seed=seed) for seed in (1, 1, 2))
    assert (first.layers["counts"] != again.layers["counts"]).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    pd.testing.assert_frame_equal(true_effects(first), true_effects(again))
    assert (first.varp["true_grn"] != other.varp["true_grn"]).nnz > 0


@pytest.mark.parametrize("changed", [{"cell_seed": 7}, {"n_cells_per_condition": 15}])
def test_more_or_other_cells_of_the_same_world(changed: dict) -> None:
    first = simulate(n_cells_per_condition=10)
    other = simulate(**({"n_cells_per_condition": 10} | changed))
    pd.testing.assert_frame_equal(true_effects(first), true_effects(other))
    n = min(first.n_obs, other.n_obs)
    assert (first.layers["counts"][:n] != other.layers["counts"][:n]).nnz > 1000


def test_options_that_come_later_leave_the_network_alone() -> None:
    plain = simulate(n_cells_per_condition=2)
    other = simulate(
        n_cells_per_condition=2,
        perturbation_type="drug",
        doses=[1],
        n_batches=4,
        n_contexts=5,
        interaction=1.0,
    )
    assert (plain.varp["true_grn"] != other.varp["true_grn"]).nnz == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dispersion": 0.0, "library_size": 300.0, "library_size_sd": 100.0},
        {"dispersion": 1.0, "library_size": 20_000.0, "library_size_sd": 15_000.0, "state_sd": 0.6},
        {"doses": [0, 1, 10], "combinations": 2, "batch_sd": 1.5, "frac_qc_failed": 0.3, "n_contexts": 2},
        {"perturbation_type": "drug", "n_drug_classes": 2, "acyclic": False},
        {"modality": "log", "perturbation_type": "activation"},
    ],
    ids=[
        "default",
        "shallow Poisson",
        "deep, overdispersed",
        "doses, pairs, QC, batches",
        "drugs, cycles",
        "log",
    ],
)
def test_truth_is_what_is_observed_within_sampling_error(options: dict) -> None:
    adata = simulate(n_cells_per_condition=1500, n_control_cells=3000, n_genes=60, n_perturbations=4, seed=3, **options)
    scores = z_scores(adata)
    assert abs(true_effects(adata)).max().max() > 0.5
    # Genes and conditions share cells (library, composition, controls): over seeds the mean score is 0.0 with
    # a standard deviation of 0.14; the scores' own standard deviation is 0.98.
    assert abs(scores.mean()) < 0.5
    assert 0.85 < scores.std() < 1.15
    assert abs(scores).max() < 5


def test_truth_is_not_merely_wide() -> None:
    """The test above would notice effects that are 10 % too large."""
    adata = simulate(n_cells_per_condition=1500, n_control_cells=3000, n_genes=60, n_perturbations=4, seed=3)
    adata.uns["truth"]["effect"] = 1.1 * adata.uns["truth"]["effect"]
    assert abs(z_scores(adata)).max() > 5


@pytest.mark.parametrize("depth", [150.0, 5000.0])
def test_control_mean_is_what_is_observed(depth: float) -> None:
    adata = simulate(
        n_cells_per_condition=10,
        n_control_cells=4000,
        n_genes=60,
        n_truth_cells=2000,
        library_size=depth,
        library_size_sd=depth / 5,
    )
    for row, context in enumerate(adata.obs["cell_type"].cat.categories):
        control = group(adata, "control", context)
        difference = control.mean(axis=0) - adata.uns["truth"]["control_mean"][row]
        error = control.std(axis=0) * np.sqrt(1 / len(control) + 1 / 2000)
        assert abs(difference / error).max() < 5
        assert abs(difference.mean()) < 0.03


def test_expectation_of_log1p_against_the_binomial_sum() -> None:
    table = ExpectedLog1p(100, 20_000)
    rng = np.random.default_rng(0)
    for total in (101, 500, 2_000, 19_000):
        share = np.exp(rng.uniform(np.log(1e-6), np.log(0.9), 40))
        count = np.arange(total + 1)[:, None]
        exact = (binom.pmf(count, total, share) * np.log1p(1e4 * count / total)).sum(axis=0)
        found = table(np.array([total]), np.log(total * share)[None, :])[0]
        np.testing.assert_allclose(found, exact, atol=2e-4)


def test_network_is_a_directed_acyclic_graph_with_a_bounded_gain() -> None:
    adata = simulate(n_cells_per_condition=2, n_genes=300, network_density=0.3, network_gain=0.8)
    weights = adata.varp["true_grn"]
    assert sparse.isspmatrix_csr(weights) and weights.dtype == np.float32
    regulators = adata.var["is_regulator"].to_numpy()
    square = weights.toarray()
    assert not square[~regulators].any() and not square.diagonal().any()
    assert abs(square).sum(axis=0).max() <= 0.8 + 1e-6
    assert not np.linalg.matrix_power((square != 0).astype(float), regulators.sum()).any()
    share = (square[regulators][:, ~regulators] != 0).mean()
    assert share == pytest.approx(0.3, abs=0.03)
    assert {-1.0, 1.0} == set(np.sign(weights.data))


def test_network_with_cycles_converges() -> None:
    adata = simulate(n_cells_per_condition=2, network_density=0.5, acyclic=False)
    square = adata.varp["true_grn"].toarray()
    assert np.trace(np.linalg.matrix_power((square != 0).astype(float), 2)) > 0
    assert 0 < abs(np.linalg.eigvals(square)).max() < 0.9


def test_log_rate_shift_is_the_propagated_direct_shift() -> None:
    adata = simulate(n_cells_per_condition=2, acyclic=False, perturbation_type="drug", n_targets=2)
    truth = adata.uns["truth"]
    total = np.linalg.inv(np.eye(adata.n_vars) - adata.varp["true_grn"].toarray())
    assert (truth["targets"].groupby("perturbation").size() == 2).all()
    shifts = true_effects(adata, kind="log_rate_shift")
    for (_drug, context), shift in shifts.iterrows():
        direct = np.zeros(adata.n_vars)
        mine = truth["targets"].query("perturbation == @_drug")
        direct[adata.var_names.get_indexer(mine["target"])] = mine["shift"]
        factor = truth["contexts"].loc[context, "response_factor"]
        np.testing.assert_allclose(shift, factor * direct @ total, atol=1e-4)


def test_cell_states_spread_through_the_network() -> None:
    """The structural equation x = x A + z of the controls: x (I - A) is white."""
    adata = simulate(
        n_cells_per_condition=1,
        n_control_cells=5000,
        n_genes=60,
        n_contexts=1,
        n_unresponsive_contexts=0,
        batch_sd=0.0,
        modality="log",
        noise_sd=0.0,
        state_sd=0.5,
    )
    state = group(adata, "control", "context_1") - adata.uns["truth"]["context_baseline"][0]
    innovation = state @ (np.eye(60) - adata.varp["true_grn"].toarray())
    np.testing.assert_allclose(np.cov(innovation.T), 0.25 * np.eye(60), atol=0.025)
    assert abs(np.cov(state.T) - 0.25 * np.eye(60)).max() > 0.15


@pytest.mark.parametrize(("kind", "sign"), [("knockout", -1), ("activation", 1)])
def test_target_and_its_downstream_genes_move_as_the_network_says(kind: str, sign: int) -> None:
    adata = simulate(n_cells_per_condition=400, n_contexts=1, n_unresponsive_contexts=0, perturbation_type=kind, seed=5)
    network = true_network(adata)
    effects = true_effects(adata)
    control = group(adata, "control", "context_1").mean(axis=0)
    for name in adata.obs["perturbation"].cat.categories[1:]:
        observed = pd.Series(group(adata, name, "context_1").mean(axis=0) - control, index=adata.var_names)
        assert sign * observed[name] > 0.3 and sign * effects.loc[(name, "context_1"), name] > 0.3
        # Genes with this regulator alone respond through the direct edge only.
        edges = network.query("source == @name").set_index("target")["weight"]
        alone = edges[~edges.index.isin(network.query("source != @name")["target"])]
        alone = alone[control[adata.var_names.get_indexer(alone.index)] > 2]
        assert (np.sign(observed[alone.index]) == sign * np.sign(alone)).all()
    assert adata.var["is_perturbed"].sum() == 10


def test_dose_zero_is_control_and_the_response_follows_the_hill_curve(screen: ad.AnnData) -> None:
    shifts = true_effects(screen, kind="log_rate_shift")
    assert not shifts.xs(0.0, level="dose").any(axis=None)
    assert abs(true_effects(screen).xs(0.0, level="dose")).max().max() < 1e-6
    settings = {"doses": [0, 1, 10], "n_genes": 80, "n_regulators": 12, "n_perturbations": 6, "seed": 4}
    steep = simulate(n_cells_per_condition=2, hill=2.0, **settings)
    for adata, n in ((screen, 1), (steep, 2)):
        shifts = true_effects(adata, kind="log_rate_shift").xs("context_1", level="cell_type")
        for name, (hill, ec50) in adata.uns["truth"]["perturbations"].iterrows():
            assert hill == n
            direct = adata.uns["truth"]["targets"].query("perturbation == @name")["shift"].item()
            factor = adata.uns["truth"]["contexts"].loc["context_1", "response_factor"]
            for dose in (1.0, 10.0):
                expected = factor * direct * dose**n / (dose**n + ec50**n)
                assert shifts.loc[(name, dose), name] == pytest.approx(expected, rel=1e-4)
    assert (screen.obs.loc[screen.obs["perturbation"] == "control", "dose"] == 0).all()


def test_combinations_add_up_unless_they_interact() -> None:
    names = simulate(n_cells_per_condition=2).obs["perturbation"].cat.categories
    wanted = [(names[1], names[3]), f"{names[4]}+{names[2]}"]
    options = {"n_cells_per_condition": 2, "combinations": wanted}
    for interaction in (0.0, 0.5):
        adata = simulate(interaction=interaction, effect_size=2.0, **options)
        assert list(adata.obs["perturbation"].cat.categories[-2:]) == ["+".join(wanted[0]), wanted[1]]
        shifts = true_effects(adata, kind="log_rate_shift").xs("context_1", level="cell_type")
        extra = adata.uns["truth"]["interactions"].set_index("perturbation")
        for pair in ("+".join(wanted[0]), wanted[1]):
            first, second = pair.split("+")
            beyond = shifts.loc[pair] - shifts.loc[first] - shifts.loc[second]
            if interaction == 0.0:
                np.testing.assert_allclose(beyond, 0, atol=1e-5)
                assert extra.empty
            else:
                factor = adata.uns["truth"]["contexts"].loc["context_1", "response_factor"]
                assert abs(extra.loc[pair, "shift"]) == 1.0
                assert extra.loc[pair, "target"] not in (first, second)
                assert beyond[extra.loc[pair, "target"]] == pytest.approx(factor * extra.loc[pair, "shift"])


def test_members_of_a_combination_interact_as_far_as_both_act() -> None:
    adata = simulate(n_cells_per_condition=2, combinations=2, interaction=1.0, doses=[1, 10], hill=1.5)
    truth = adata.uns["truth"]
    shifts = true_effects(adata, kind="log_rate_shift").xs("context_1", level="cell_type")
    factor = truth["contexts"].loc["context_1", "response_factor"]
    for extra in truth["interactions"].itertuples():
        members = extra.perturbation.split("+")
        ec50 = truth["perturbations"].loc[members, "ec50"].to_numpy()
        for dose in (1.0, 10.0):
            beyond = shifts.loc[(extra.perturbation, dose)] - sum(shifts.loc[(name, dose)] for name in members)
            response = (dose**1.5 / (dose**1.5 + ec50**1.5)).prod()
            assert beyond[extra.target] == pytest.approx(factor * response * extra.shift, rel=1e-4)


def test_contexts_respond_as_their_biomarkers_foretell() -> None:
    adata = simulate(n_cells_per_condition=300, n_contexts=6, n_unresponsive_contexts=3, seed=2)
    contexts = adata.uns["truth"]["contexts"]
    biomarkers = adata.var["is_biomarker"].to_numpy()
    baseline = adata.uns["truth"]["context_baseline"][:, biomarkers]
    activity = contexts["biomarker_activity"].to_numpy()
    np.testing.assert_allclose(contexts["response_factor"], 1 / (1 + np.exp(-3 * activity)))
    np.testing.assert_allclose(baseline - baseline[:1], (activity - activity[0])[:, None] * np.ones(10), atol=1e-5)
    control = np.array([group(adata, "control", c).mean(axis=0)[biomarkers].mean() for c in contexts.index])
    size = abs(true_effects(adata)).groupby(level="cell_type").mean().mean(axis=1).loc[contexts.index]
    assert size.iloc[:3].min() > 3 * size.iloc[3:].max()
    assert np.corrcoef(control, contexts["response_factor"])[0, 1] > 0.85


def test_without_biomarkers_nothing_foretells() -> None:
    adata = simulate(n_cells_per_condition=2, n_biomarkers=0, context_sd=0.0)
    baseline = adata.uns["truth"]["context_baseline"]
    assert not adata.var["is_biomarker"].any() and (baseline == baseline[0]).all()
    assert adata.uns["truth"]["contexts"]["response_factor"].nunique() == 3


def test_cells_that_fail_qc_show_the_artefact() -> None:
    adata = simulate(n_cells_per_condition=200, frac_qc_failed=0.3, qc_library_factor=0.25, library_size=8000.0)
    failed = ~adata.obs["qc_pass"].to_numpy()
    assert failed.mean() == pytest.approx(0.3, abs=0.02)
    ratio = adata.obs["total_counts"][failed].mean() / adata.obs["total_counts"][~failed].mean()
    assert ratio == pytest.approx(0.25, rel=0.03)
    artefact = adata.uns["truth"]["artefact_shift"]
    assert (artefact > 0).sum() == 10 and (artefact[adata.var["is_artefact"]] > 0).all()
    assert adata.var_names[artefact > 0].str.startswith("MT-").all()
    counts = adata.layers["counts"]
    share = [np.asarray(counts[rows].sum(axis=0)).ravel() / counts[rows].sum() for rows in (failed, ~failed)]
    change = np.log(share[0] / share[1])
    change -= np.median(change[artefact == 0])
    assert np.abs(change - artefact)[artefact > 0].max() < 0.3
    mitochondrial = counts[:, adata.var["is_artefact"].to_numpy()].sum(axis=1).A1 / counts.sum(axis=1).A1
    assert mitochondrial[failed].mean() > 2 * mitochondrial[~failed].mean()


def test_library_sizes_batches_and_overdispersion_are_as_asked() -> None:
    adata = simulate(
        n_cells_per_condition=1000,
        n_perturbations=2,
        n_contexts=1,
        n_unresponsive_contexts=0,
        library_size=1500.0,
        library_size_sd=500.0,
        state_sd=0.0,
        batch_sd=0.0,
        dispersion=0.5,
        effect_size=0.0,
        n_batches=4,
    )
    assert adata.obs["library_size"].mean() == pytest.approx(1500, rel=0.03)
    assert adata.obs["library_size"].std() == pytest.approx(500, rel=0.05)
    assert adata.obs["total_counts"].mean() == pytest.approx(1500, rel=0.03)
    np.testing.assert_array_equal(adata.obs["total_counts"], adata.layers["counts"].sum(axis=1).A1)
    # Negative binomial: the counts' variance beyond Poisson is the dispersion times the squared mean.
    log_rate = adata.uns["truth"]["context_baseline"][0].astype(float)
    mean = adata.obs["library_size"].to_numpy()[:, None] * np.exp(log_rate) / np.exp(log_rate).sum()
    residual = adata.layers["counts"].toarray() - mean
    top = mean.mean(axis=0) > 5
    dispersion = ((residual**2 - mean).mean(axis=0) / (mean**2).mean(axis=0))[top]
    assert dispersion.mean() == pytest.approx(0.5, rel=0.05)
    assert adata.obs["batch"].value_counts(normalize=True).between(0.22, 0.28).all()


def test_batches_shift_the_log_rates() -> None:
    adata = simulate(
        n_cells_per_condition=10,
        n_control_cells=4000,
        n_contexts=1,
        n_unresponsive_contexts=0,
        modality="log",
        n_batches=3,
        batch_sd=0.5,
    )
    shift = adata.uns["truth"]["batch_shift"]
    assert shift.std() == pytest.approx(0.5 * np.sqrt(2 / 3), rel=0.1)
    means = [dense(adata[adata.obs["batch"] == f"batch_{b}"]).mean(axis=0) for b in (1, 2, 3)]
    assert np.abs((means[0] - means[1]) - (shift[0] - shift[1])).max() < 0.15


def test_pairs_share_their_basal_state() -> None:
    adata = simulate(n_cells_per_condition=50, paired=True, modality="log", noise_sd=0.0, n_batches=3)
    shifts = true_effects(adata)
    control = adata[adata.obs["perturbation"] == "control"]
    control = pd.DataFrame(dense(control), index=control.obs["pair"].to_numpy())
    assert control.index.is_unique and len(control) == 600
    for name, context in shifts.index[:4]:
        rows = (adata.obs["perturbation"] == name) & (adata.obs["cell_type"] == context)
        before = control.loc[adata.obs.loc[rows, "pair"].to_numpy()]
        difference = dense(adata[rows.to_numpy()]) - before.to_numpy()
        np.testing.assert_allclose(difference, np.tile(shifts.loc[(name, context)], (50, 1)), atol=1e-4)


def test_drugs_of_a_class_resemble_each_other_and_their_text_names_no_gene() -> None:
    adata = simulate(
        n_cells_per_condition=2,
        perturbation_type="drug",
        n_perturbations=18,
        n_drug_classes=9,
        n_contexts=1,
        n_unresponsive_contexts=0,
    )
    drugs = adata.uns["drugs"]
    shifts = true_effects(adata, kind="log_rate_shift").droplevel("cell_type")
    likeness = np.corrcoef(shifts)
    same = drugs["drug_class"].to_numpy()[:, None] == drugs["drug_class"].to_numpy()[None, :]
    np.fill_diagonal(same, False)
    other = ~same & ~np.eye(18, dtype=bool)
    assert same.sum() == 18 and likeness[same].min() > 0.7
    assert abs(likeness[other]).mean() < 0.4
    assert drugs.loc[shifts.index, "drug_class"].to_dict() == adata.uns["truth"]["drug_class"]
    text = " ".join(drugs["description"])
    assert not any(gene in text for gene in adata.var_names)
    assert "drugs" not in simulate(n_cells_per_condition=2, perturbation_type="drug").uns


def test_matrices_are_sparse_single_precision_and_on_the_stated_scale(screen: ad.AnnData) -> None:
    counts = screen.layers["counts"]
    assert sparse.isspmatrix_csr(screen.X) and sparse.isspmatrix_csr(counts)
    assert screen.X.dtype == counts.dtype == np.float32
    assert (counts.data == np.round(counts.data)).all() and counts.data.min() >= 1
    assert screen.X.nnz == counts.nnz < 0.95 * np.prod(screen.shape)
    expected = ad.AnnData(counts.copy())
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    np.testing.assert_allclose(screen.X.data, expected.X.data, rtol=1e-5)
    log = simulate(n_cells_per_condition=2, modality="log")
    assert log.X.dtype == np.float32 and not sparse.issparse(log.X) and "counts" not in log.layers


def test_every_condition_has_its_cells(screen: ad.AnnData) -> None:
    sizes = screen.obs.groupby(["perturbation", "dose", "cell_type"], observed=True).size()
    assert (sizes.drop("control") == 60).all() and (sizes.loc["control"] == 240).all()
    assert len(sizes) == 9 * 3 * 3 + 3
    assert set(true_effects(screen).index) == set(sizes.drop("control").index)
    # Random order: no block of rows holds one condition.
    assert screen.obs["perturbation"].iloc[:100].nunique() > 5


def test_round_trip_through_h5ad(screen: ad.AnnData, tmp_path: Path) -> None:
    drugs = simulate(n_cells_per_condition=2, perturbation_type="drug", n_drug_classes=2, modality="log", paired=True)
    names = simulate(n_cells_per_condition=2).obs["perturbation"].cat.categories
    pairs = [(names[1], names[2])]
    listed = simulate(n_cells_per_condition=2, combinations=pairs, n_control_cells=3)
    for adata in (screen, drugs, listed):
        adata.write_h5ad(tmp_path / "simulated.h5ad")
        back = ad.read_h5ad(tmp_path / "simulated.h5ad")
        np.testing.assert_array_equal(dense(adata), dense(back))
        pd.testing.assert_frame_equal(adata.obs, back.obs)
        for kind in ("effect", "effect_se", "log_rate_shift"):
            pd.testing.assert_frame_equal(true_effects(adata, kind=kind), true_effects(back, kind=kind))
        pd.testing.assert_frame_equal(true_network(adata), true_network(back))
        truth = back.uns["truth"]
        for table in ("contexts", "perturbations", "targets", "conditions"):
            assert len(adata.uns["truth"][table]) == len(truth[table]) > 0
        settings = {name: list(v) if isinstance(v, np.ndarray) else v for name, v in truth["settings"].items()}
        np.testing.assert_array_equal(dense(adata), dense(simulate(**plain(settings))))


def plain(settings: dict) -> dict:
    """Settings as h5ad gives them back (NumPy scalars) as Python's own."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}


def test_readers_follow_the_genes_of_the_object(screen: ad.AnnData) -> None:
    genes = screen.var_names[::-3]
    subset = screen[:, genes].copy()
    assert list(true_effects(subset).columns) == list(genes)
    pd.testing.assert_frame_equal(true_effects(subset), true_effects(screen)[genes])
    edges = true_network(screen)
    kept = edges[edges["source"].isin(genes) & edges["target"].isin(genes)].reset_index(drop=True)
    pd.testing.assert_frame_equal(true_network(subset), kept)
    weights = pd.DataFrame(screen.varp["true_grn"].toarray(), screen.var_names, screen.var_names)
    for edge in edges.head(5).itertuples():
        assert weights.loc[edge.source, edge.target] == edge.weight != 0


def test_readers_refuse_what_was_not_simulated(screen: ad.AnnData) -> None:
    stranger = ad.AnnData(np.zeros((2, 2), dtype=np.float32))
    for reader in (true_effects, true_network):
        with pytest.raises(ValueError, match="`adata`"):
            reader(stranger)
    with pytest.raises(ValueError, match="`kind`"):
        true_effects(screen, kind="lfc")
    renamed = screen.copy()
    renamed.var_names = ["X" + name for name in renamed.var_names]
    with pytest.raises(ValueError, match="`adata` has 80 genes"):
        true_effects(renamed)


WRONG = {
    "n_cells_per_condition": 0,
    "n_control_cells": 0,
    "n_genes": 2.5,
    "n_regulators": 190,
    "network_density": 0.0,
    "network_gain": 1.0,
    "acyclic": "yes",
    "perturbation_type": "CRISPRi",
    "n_perturbations": 21,
    "effect_size": -1.0,
    "n_targets": 2,
    "n_drug_classes": 2,
    "combinations": 46,
    "interaction": float("nan"),
    "doses": [1.0, -1.0],
    "hill": 0.0,
    "n_contexts": True,
    "n_unresponsive_contexts": 4,
    "n_biomarkers": -1,
    "response_slope": -3,
    "baseline_sd": "1",
    "context_sd": -0.1,
    "state_sd": float("inf"),
    "n_batches": 0,
    "batch_sd": -0.1,
    "frac_qc_failed": 1.0,
    "n_artefact_genes": -1,
    "artefact_size": -1,
    "qc_library_factor": 0,
    "modality": "bulk",
    "library_size": 0,
    "library_size_sd": -1,
    "dispersion": -0.1,
    "noise_sd": None,
    "paired": 1,
    "n_truth_cells": 1,
    "seed": -1,
    "cell_seed": "a",
}


def test_every_argument_has_a_wrong_value_below() -> None:
    assert set(WRONG) == set(simulate.__kwdefaults__)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^`{name}` is .*; it must be "):
        simulate(**{name: WRONG[name]})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("combinations", {"combinations": ["TF01+NOBODY"]}),
        ("combinations", {"combinations": "TF01+TF02"}),
        (
            "combinations",
            {"combinations": [("TF1", "TF2"), ("TF2", "TF1")], "n_regulators": 9, "n_perturbations": 9},
        ),
        ("combinations", {"combinations": [("TF1", "TF1")], "n_regulators": 9, "n_perturbations": 9}),
        ("combinations", {"combinations": -1}),
        ("interaction", {"interaction": 1.0, "combinations": 1, "n_regulators": 2, "n_perturbations": 2}),
        ("doses", {"doses": []}),
        ("doses", {"doses": [0.0]}),
        ("doses", {"doses": [1, 1]}),
        ("doses", {"doses": "1"}),
        ("doses", {"doses": 1.0}),
        ("n_targets", {"perturbation_type": "drug", "n_targets": 21}),
        ("n_drug_classes", {"perturbation_type": "drug", "n_drug_classes": 11}),
        ("n_regulators", {"n_genes": 39}),
    ],
)
def test_arguments_that_contradict_each_other(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"^`{name}` is "):
        simulate(**arguments)


def test_hundred_thousand_cells_are_fast_and_lean() -> None:
    tracemalloc.start()
    start = time.process_time()
    adata = simulate(n_cells_per_condition=1000, n_control_cells=1000, n_regulators=40, n_perturbations=33)
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert adata.n_obs > 100_000
    assert seconds < 20
    size = sum(m.data.nbytes + m.indices.nbytes for m in (adata.X, adata.layers["counts"]))
    # The counts and their normalised copy, one more copy while chunks are joined, and the open chunk.
    assert peak < 1.5 * size + 200e6
    assert peak < 6 * adata.n_obs * adata.n_vars * 4
