"""A gene regulatory network from measured shifts, and the shifts from the table of conditions."""

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from pertura.data._cells import CellDataset
from pertura.effects import fit_network, fit_rows, fit_shifts, measure_covariation, own_shifts


def _planted(seed=0, n=12, n_genes=30):
    """Shifts by perturbations of the first n genes, spread through a sparse network, with noise."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.zeros(n_genes, n_genes, dtype=torch.float64)
    edges = torch.rand(n, n_genes, generator=g) < 0.15
    upper = torch.arange(n)[:, None] < torch.arange(n_genes)
    sign = torch.where(torch.rand(n, n_genes, generator=g) < 0.5, -1.0, 1.0)
    weights[:n] = 0.7 * edges * upper * sign
    shift = -1.5 * torch.linalg.inv(torch.eye(n_genes, dtype=torch.float64) - weights)[:n]
    shift = shift + 0.1 * torch.randn(n, n_genes, generator=g)
    precision = torch.full_like(shift, 100.0)
    precision[torch.arange(n), torch.arange(n)] = 0.0
    return weights[:n], shift, precision, torch.eye(n, n_genes, dtype=torch.bool)


def test_direct_edges_are_told_from_paths():
    weights, shift, precision, forbidden = _planted()
    posterior = fit_network(shift[:, :12], shift, precision, forbidden)
    edge = weights != 0
    proba = posterior.logits.sigmoid()
    assert (proba[edge] > 0.5).double().mean() > 0.9 and (proba[~edge] > 0.5).double().mean() < 0.05
    found = edge & (proba > 0.5)
    torch.testing.assert_close(posterior.mean[found], weights[found], atol=0.3, rtol=0)
    # by shifts alone, targets at the end of a path are edges too
    indirect = ~edge & ~forbidden & (shift.abs() > 0.4)
    assert indirect.sum() > 10 and proba[indirect].mean() < 0.2


def test_rows_are_perturbations_of_genes_of_none_and_further_genes():
    """A perturbation that is of no gene, among others, changes nothing for these; a gene without one is told by covariation."""
    weights, shift, precision, _ = _planted()
    genes = torch.cat([torch.arange(12), torch.tensor([-1])])
    more = torch.cat([shift, torch.zeros(1, 30, dtype=torch.float64)])
    weight = torch.cat([precision, torch.full((1, 30), 100.0)])
    strength = torch.full((13,), -1.5, dtype=torch.float64)
    found = fit_rows(more[:, :], weight, genes, strength)
    edge, proba = weights != 0, found.logits.sigmoid()[:12]
    assert (proba[edge] > 0.5).double().mean() > 0.9 and (proba[~edge] > 0.5).double().mean() < 0.05
    torch.testing.assert_close(found.mean[:12][edge], weights[edge], atol=0.35, rtol=0)
    assert (found.logits[12] < 0).all()

    # regulator 0 was not perturbed: the others, and how cells vary
    order = torch.cat([torch.arange(1, 12), torch.tensor([0])])
    full = torch.zeros(30, 30, dtype=torch.float64)
    full[:12] = weights
    spread = torch.linalg.inv(torch.eye(30, dtype=torch.float64) - full)
    covariation = (0.3 * spread.T @ spread)[order]
    given = {"covariation": covariation, "covariation_precision": torch.full((30,), 400.0, dtype=torch.float64)}
    with_cells = fit_rows(shift[1:], precision[1:], order, strength[:12], **given)
    without = fit_rows(shift[1:], precision[1:], order, strength[:12])
    target = edge[0]
    assert with_cells.logits[11][target].mean() > without.logits[11][target].mean() + 1.0
    assert with_cells.logits[11][target].mean() > with_cells.logits[11][~target].mean() + 2.0


def test_covariation_is_within_conditions(registered, screen):
    model, genes = registered(screen), np.array([2, -1, 5])
    cross, variance = measure_covariation(CellDataset(model.adata_manager), np.arange(screen.n_obs), genes)
    counts = screen.layers["counts"].toarray()
    x = pd.DataFrame(np.log1p(1e4 * counts / counts.sum(1, keepdims=True)))
    keys = [screen.obs[key].to_numpy() for key in ("perturbation", "context", "dose")]
    left = (x - x.groupby(keys).transform("mean")).to_numpy()
    np.testing.assert_allclose(cross[[0, 2]], (left[:, [2, 5]].T @ left) / len(left), atol=1e-6)
    assert not cross[1].any()
    np.testing.assert_allclose(variance, (left**2).mean(0), atol=1e-6)


def test_a_prior_network_counts_for_what_it_is_worth():
    weights, shift, _, forbidden = _planted(1)
    precision = torch.full_like(shift, 4.0)  # hardly measured
    edge = weights != 0

    def rates(listed):
        posterior = fit_network(shift[:, :12], shift, precision, forbidden, listed=listed)
        prior = posterior.prior_logits.sigmoid()
        return float(prior[edge].mean()), float(prior[~edge & ~forbidden].mean())

    right = rates(edge.double())
    wrong = rates(edge[:, torch.randperm(30, generator=torch.Generator().manual_seed(3))].double())
    assert right[0] > 5 * right[1] and wrong[0] < 2 * wrong[1]


def test_genes_that_are_not_measured_have_the_usual_sign():
    table = np.zeros((3, 4))
    table[0, 1], table[1, 2] = -1.5, -0.5
    variance = np.full((3, 4), 0.01)
    np.testing.assert_allclose(own_shifts(table, variance, np.array([1, 2, -1, 3])), [-1.5, -0.5, -1.0, -1.0])
    np.testing.assert_allclose(own_shifts(-table, variance, np.array([1, 2, -1, 3])), [1.5, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(own_shifts(table, variance, np.array([-1, -1, -1])), [1.0, 1.0, 1.0])


def test_shifts_of_counts_are_of_the_log_of_the_mean(measure, screen):
    """One context and no combination: differences of logs of means, less their median."""
    adata = screen[((screen.obs["perturbation"] != "A+B") & (screen.obs["context"] == "x")).to_numpy()].copy()
    setup = {"dose_key": None, "context_key": None, "batch_key": None}
    shift, variance = fit_shifts(measure(adata, setup=setup, linear=True), 2)
    counts = adata.layers["counts"].toarray()
    x = 1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    log = {p: np.log(x[adata.obs["perturbation"] == p].mean(0) + 0.05) for p in ("ctrl", "A", "B")}
    for row, p in enumerate("AB"):
        expected = log[p] - log["ctrl"]
        np.testing.assert_allclose(shift[row], expected - np.median(expected), atol=0.01)
    assert (variance > 0).all() and np.isfinite(variance).all()
    assert (shift[0, :5] > 0.5).all()


def test_combinations_and_doses_tell_of_their_members(measure):
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(3, 6))
    design = {"A@1": [1, 0, 0], "A@0.5": [0.5, 0, 0], "A+B@1": [1, 1, 0]}
    rows, x = [("ctrl", 0.0)] * 200, [0.05 * rng.normal(size=(200, 6))]
    for name, strength in design.items():
        label, dose = name.split("@")
        rows += [(label, float(dose))] * 50
        x.append(np.array(strength) @ truth + 0.05 * rng.normal(size=(50, 6)))
    rows, x = rows + [("C", 1.0)], [*x, np.zeros((1, 6))]
    obs = pd.DataFrame(rows, columns=["perturbation", "dose"], index=[f"c{i}" for i in range(len(rows))])
    adata = AnnData(np.concatenate(x).astype(np.float32), obs=obs)
    setup = {"layer": None, "context_key": None, "batch_key": None}
    without = np.arange(len(rows) - 1)
    table = measure(adata, setup=setup, rows=without, linear=True)
    shift, variance = fit_shifts(table, 3, strength=lambda codes, dose: dose)
    np.testing.assert_allclose(shift[:2], truth[:2], atol=0.05)
    assert np.isinf(variance[2]).all() and np.isfinite(variance[:2]).all()
    # A is told of by three conditions, B by one
    assert (variance[0] < variance[1]).all()
