"""Shifts spread through the network as the resolvent says; the extra losses do not depend on the minibatch."""

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO

from pertura.module import GPOVAE, Action, Cells
from pertura.module._gpovae import spectral_radius
from pertura.nn._structural import fit_structural

N, GENES, PERTURBATIONS = 60, 7, 4


def _cells(rows=slice(None)):
    rng = np.random.default_rng(0)
    codes = torch.as_tensor(rng.integers(-1, PERTURBATIONS, size=(N, 1)))
    x = torch.as_tensor(rng.poisson(3.0, size=(N, GENES)), dtype=torch.float32)[rows]
    action = Action(codes[rows], (codes >= 0).float()[rows])
    return Cells(x, action, torch.zeros(len(x)).long(), torch.zeros(len(x)).long(), x.sum(1, keepdim=True))


def _module(row_genes=(2, 0, 5, -1, 6), **options):
    """Perturbations of genes 2, 0 and 5 and one of none; gene 6 regulates without a perturbation of its own."""
    torch.manual_seed(1)
    module = GPOVAE(GENES, PERTURBATIONS, row_genes=row_genes, **{"n_latent": 3, "n_hidden": 8, **options})
    module.n_train = N
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
        if module.objective == "resolvent":
            module.shift_table.normal_()
            module.shift_precision.uniform_(1.0, 10.0)
        else:
            module.difference.uniform_(0.0, 1.0)
            module.share.fill_(0.2)
    return module


def test_shifts_spread_through_the_network_as_the_inverse_says():
    module = _module()
    weights = 0.4 * torch.randn(5, GENES, dtype=torch.float64)
    genes = module.row_genes
    full = torch.zeros(GENES, GENES, dtype=torch.float64)
    own = genes >= 0
    full[genes[own]] = (weights * module.possible)[own]
    spread = torch.linalg.inv(torch.eye(GENES, dtype=torch.float64) - full)
    start = torch.eye(GENES, dtype=torch.float64)[genes.clamp(min=0)] * module.effect_strength.double()[:, None]
    start[3] = weights[3]
    total = module.double().total(weights)
    torch.testing.assert_close(total, start @ spread)
    # several networks at once
    torch.testing.assert_close(module.total(torch.stack([weights, 0 * weights]))[0], total)


def test_networks_with_strong_loops_stay_finite():
    module = _module()
    shifts = module.total(torch.full((5, GENES), 3.0))
    assert torch.isfinite(shifts).all()
    loop = torch.tensor([[0.0, 2.0], [0.5, 0.0]])
    chain = torch.tensor([[0.0, 50.0], [0.0, 0.0]])
    np.testing.assert_allclose(spectral_radius(torch.stack([loop, chain])), [1.0, 0.0], atol=0.05)


def test_logits_accumulate_over_paths():
    module = _module(objective="hops", n_hops=2)
    w = (module.mask_logits * module.possible).detach()
    expected = w + w @ w / 5 + w @ w @ w / 25
    torch.testing.assert_close(module.accumulated().detach(), expected[:PERTURBATIONS])


@pytest.mark.parametrize("objective", ["resolvent", "hops"])
def test_the_alignment_does_not_depend_on_the_minibatch(objective):
    """The ELBO of all cells at once, and added up over minibatches, differ with and without it by the same."""
    differences = []
    for size in (60, 15):
        sums = []
        for weight in (3.0, 0.0):
            module = _module(objective=objective, alignment_weight=weight, sparsity_weight=0.0)
            elbo, total = Trace_ELBO(max_plate_nesting=1), 0.0
            with torch.no_grad():
                for start in range(0, N, size):
                    torch.manual_seed(start)
                    total += float(
                        elbo.differentiable_loss(module.model, module.guide, _cells(slice(start, start + size)))
                    )
            sums.append(total)
        differences.append(sums[0] - sums[1])
    assert differences[0] > 0
    # draws of the table differ between minibatches, the logits do not
    np.testing.assert_allclose(differences[1], differences[0], rtol=0.5 if objective == "resolvent" else 1e-3)


def test_the_alignment_is_the_log_density_of_the_table():
    module = _module()
    with torch.no_grad():
        module.shift_precision[1, 2] = 0.0
        table = torch.randn(3, 5, GENES)
        seen = module.shift_precision > 0
        density = torch.distributions.Normal(table[:, :4][:, seen], module.shift_precision[seen] ** -0.5)
        peak = torch.distributions.Normal(0.0, module.shift_precision[seen] ** -0.5).log_prob(
            torch.zeros(int(seen.sum()))
        )
        expected = (peak - density.log_prob(module.shift_table[seen])).sum(-1)
        torch.testing.assert_close(module.alignment(table), expected, rtol=1e-4, atol=1e-3)


def test_what_regulators_explain_of_covariation():
    """Up to a constant, the weighted mean square of what is left of cells after their regulators."""
    module = _module((2, 0, 5, -1, 6), alignment_weight=1.0)
    x = torch.randn(500, GENES)
    covariance = x.T @ x / 500
    weights = torch.randn(5, GENES)
    with torch.no_grad():
        module.covariation.copy_(covariance[module.row_genes.clamp(min=0)])
        module.covariation_precision.uniform_(1.0, 5.0)
        full = torch.zeros(GENES, GENES)
        own = module.row_genes >= 0
        full[module.row_genes[own]] = (weights * module.possible)[own]
        left, all_ = ((x - x @ full).square().mean(0), x.square().mean(0))
        expected = 0.5 * (module.covariation_precision * (left - all_)).sum()
        torch.testing.assert_close(module.unexplained(weights), expected, rtol=1e-3, atol=1e-3)


def test_hops_fit_the_median_difference_less_the_criterion():
    """Without paths and sparsity each logit is an L1 fit: the median of the differences, less c."""
    module = _module((2, 0, 5, 6), objective="hops", n_hops=0, shift_criterion=0.4, sparsity_weight=0.0)
    optimiser = torch.optim.Adam([module.mask_logits], lr=0.02)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        optimiser.zero_grad()
        module.alignment(torch.zeros(1)).backward()
        optimiser.step()
    median = module.difference.median(1).values
    off = module.possible
    torch.testing.assert_close(module.mask_logits.detach()[off], (median - 0.4)[off], atol=0.02, rtol=0)


@pytest.mark.parametrize("objective", ["resolvent", "hops"])
@pytest.mark.parametrize("effect_guide", ["mean_field", "correlated"])
def test_every_setting_has_finite_gradients(objective, effect_guide):
    module = _module(objective=objective, effect_guide=effect_guide)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    elbo.differentiable_loss(module.model, module.guide, _cells()).backward()
    idle = {"dose_log_kappa"}
    grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad and n not in idle}
    assert [n for n, g in grads.items() if g is None] == []
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_a_gene_without_perturbation_is_asked_by_its_row():
    module = _module()
    table = torch.randn(5, GENES)
    action = Action(torch.tensor([[-2, 0], [1, -1]]), torch.ones(2, 2), torch.tensor([[[5.0], [0.0]], [[0.0], [0.0]]]))
    torch.testing.assert_close(module.shift(table, action).detach(), torch.stack([table[4] + table[0], table[1]]))


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
    posterior = fit_structural(shift[:, :12], shift, precision, forbidden)
    edge = weights != 0
    proba = posterior.logits.sigmoid()
    assert (proba[edge] > 0.5).double().mean() > 0.9 and (proba[~edge] > 0.5).double().mean() < 0.05
    found = edge & (proba > 0.5)
    torch.testing.assert_close(posterior.mean[found], weights[found], atol=0.3, rtol=0)
    # by shifts alone, targets at the end of a path are edges too
    indirect = ~edge & ~forbidden & (shift.abs() > 0.4)
    assert indirect.sum() > 10 and proba[indirect].mean() < 0.2


def test_a_prior_network_counts_for_what_it_is_worth():
    weights, shift, _, forbidden = _planted(1)
    precision = torch.full_like(shift, 4.0)  # hardly measured
    edge = weights != 0

    def rates(listed):
        posterior = fit_structural(shift[:, :12], shift, precision, forbidden, listed=listed)
        prior = posterior.prior_logits.sigmoid()
        return float(prior[edge].mean()), float(prior[~edge & ~forbidden].mean())

    right = rates(edge.double())
    wrong = rates(edge[:, torch.randperm(30, generator=torch.Generator().manual_seed(3))].double())
    assert right[0] > 5 * right[1] and wrong[0] < 2 * wrong[1]
