"""Shifts spread through the network as the resolvent says; the extra losses do not depend on the minibatch."""

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO

from pertura.module import GPOVAE, Action, Cells, HopsGPOVAE
from pertura.module import _gpovae as gpovae
from pertura.module._gpovae import spectral_radius

N, GENES, PERTURBATIONS = 60, 7, 4


def _cells(rows=slice(None)):
    rng = np.random.default_rng(0)
    codes = torch.as_tensor(rng.integers(-1, PERTURBATIONS, size=(N, 1)))
    x = torch.as_tensor(rng.poisson(3.0, size=(N, GENES)), dtype=torch.float32)[rows]
    action = Action(codes[rows], (codes >= 0).float()[rows])
    qc = (torch.arange(N) % 3 == 0).float()[rows, None]
    return Cells(x, action, torch.zeros(len(x)).long(), torch.zeros(len(x)).long(), x.sum(1, keepdim=True), qc)


def _module(row_genes=(2, 0, 5, -1, 6), cls=GPOVAE, **options):
    """Perturbations of genes 2, 0 and 5 and one of none; gene 6 regulates without a perturbation of its own."""
    torch.manual_seed(1)
    module = cls(GENES, PERTURBATIONS, row_genes=row_genes, **{"n_latent": 3, "n_hidden": 8, **options})
    module.n_train = N
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
        if cls is HopsGPOVAE:
            module.difference.uniform_(0.0, 1.0)
            module.share.fill_(0.2)
            return module
        module.shift_table.normal_()
        module.shift_precision.uniform_(1.0, 10.0)
        if module.gene_effects is not None:
            measured = module.gene_effects.measured
            measured.mean.normal_()
            measured.sd.fill_(0.1)
            measured.measured.fill_(True)
            module.gene_effects.is_counts = False
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
    start[3] = module.effect_strength[3] * weights[3]
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


def test_the_spectral_radius_knows_signs():
    """Of mixed signs it is far below that of the absolute values, by which paths would be shrunk for no reason."""
    matrices = torch.randn(3, 80, 80, generator=torch.Generator().manual_seed(0)) / 12
    expected = torch.linalg.eigvals(matrices).abs().amax(-1)
    np.testing.assert_allclose(spectral_radius(matrices), expected, rtol=0.05)
    assert (torch.linalg.eigvals(matrices.abs()).abs().amax(-1) > 4 * expected).all()
    assert spectral_radius(torch.zeros(2, 0, 0)).tolist() == [0.0, 0.0]


def test_logits_accumulate_over_paths():
    module = _module(cls=HopsGPOVAE, n_hops=2)
    w = (module.shifts.mask_logits * module.possible).detach()
    expected = w + w @ w / 5 + w @ w @ w / 25
    torch.testing.assert_close(module.accumulated().detach(), expected[:PERTURBATIONS])


@pytest.mark.parametrize("cls", [GPOVAE, HopsGPOVAE])
@pytest.mark.parametrize("particles", [1, 3])
def test_the_alignment_does_not_depend_on_minibatch_and_particles(cls, particles):
    """The ELBO of all cells at once, and added up over minibatches, differ with and without it by the same."""
    own = {"sparsity_weight": 0.0} if cls is HopsGPOVAE else {}
    differences = []
    for size in (60, 15):
        sums = []
        for weight in (3.0, 0.0):
            module, total = _module(cls=cls, alignment_weight=weight, **own), 0.0
            with torch.no_grad():  # of a network that is known, draws do not differ between minibatches
                module.shifts.log_sd.fill_(-20.0)
                module.shifts.mask_logits.copy_(torch.where(module.shifts.mask_logits >= 0, 30.0, -30.0))
            with torch.no_grad():
                for start in range(0, N, size):
                    torch.manual_seed(start)
                    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
                    cells = _cells(slice(start, start + size))
                    total += float(elbo.differentiable_loss(module.model, module.guide, cells))
            sums.append(total)
        differences.append(sums[0] - sums[1])
    assert differences[0] > 0
    np.testing.assert_allclose(differences[1], differences[0], rtol=5e-3)


@pytest.mark.parametrize("cls", [GPOVAE, HopsGPOVAE])
def test_losses_are_for_training_alone(cls):
    losses = []
    for weight in (3.0, 0.0):
        module = _module(cls=cls, alignment_weight=weight, counterfactual_weight=weight).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(float(Trace_ELBO().differentiable_loss(module.model, module.guide, _cells())))
    assert losses[0] == pytest.approx(losses[1])


def test_the_alignment_is_the_log_density_of_the_table():
    module = _module()
    with torch.no_grad():
        module.shift_precision[1, 2] = 0.0
        table = torch.randn(3, 5, GENES)
        seen = module.shift_precision > 0
        density = torch.distributions.Normal(table[:, seen], module.shift_precision[seen] ** -0.5)
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
    module = _module((2, 0, 5, 6), cls=HopsGPOVAE, n_hops=0, shift_criterion=0.4, sparsity_weight=0.0)
    optimizer = torch.optim.Adam([module.shifts.mask_logits], lr=0.02)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        optimizer.zero_grad()
        module.alignment().backward()
        optimizer.step()
    median = module.difference.median(1).values
    off = module.possible
    torch.testing.assert_close(module.shifts.mask_logits.detach()[off], (median - 0.4)[off], atol=0.02, rtol=0)


@pytest.mark.parametrize(("cls", "options"), [(GPOVAE, {}), (GPOVAE, {"effects": "latent"}), (HopsGPOVAE, {})])
@pytest.mark.parametrize("guide", ["mean_field", "correlated"])
def test_every_setting_has_finite_gradients(cls, options, guide):
    module = _module(cls=cls, guide=guide, **options)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    elbo.differentiable_loss(module.model, module.guide, _cells()).backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad and n != "shifts.log_kappa"}
    assert [n for n, g in grads.items() if g is None] == []
    assert all(torch.isfinite(g).all() for g in grads.values())


UNSEEN = Action(
    torch.tensor([[-2, 0], [1, -1], [-2, -2]]),
    torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),
    torch.tensor([[[5.0], [0.0]], [[0.0], [0.0]], [[5.0], [1.0]]]),
)


def test_by_the_network_alone_each_gene_has_its_row():
    module, total = _module(effects="latent"), torch.randn(5, GENES)
    expected = torch.stack([total[4] + total[0], total[1], total[4] + total[0]])
    torch.testing.assert_close(module.offset(UNSEEN, total, None).detach(), expected)


def test_rows_beyond_the_perturbations_and_features_have_effects():
    module = _module(combinations=[(0, 3)])
    measured = module.gene_effects.measured
    mean = measured.mean  # rows 0 to 3 are perturbations, row 4 a regulator, row 5 the combination
    expected = torch.stack([mean[4] + mean[0], mean[1], 2 * mean[4]])
    expected[2] = mean[4] + mean[0]  # named by its row, though unknown
    torch.testing.assert_close(module.offset(UNSEEN, torch.zeros(()), None).detach(), expected)
    codes = torch.tensor([[1, 3], [0, 3], [-1, -1]])
    expected = torch.stack([mean[1] + mean[3], mean[5], torch.zeros(GENES)])
    torch.testing.assert_close(
        module.offset(Action(codes, (codes >= 0).float()), torch.zeros(()), None).detach(), expected
    )
    # one that has features and no row, at half of the dose
    measured.intercept, measured.feature_weight = torch.randn(GENES), torch.randn(2, GENES)
    measured.feature_center, measured.feature_block = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    described = Action(torch.tensor([[-2]]), torch.tensor([[0.5]]), torch.tensor([[[0.0, 1.0, -2.0]]]))
    expected = 0.5 * (measured.intercept + measured.feature_weight[0] - 2 * measured.feature_weight[1])
    torch.testing.assert_close(module.offset(described, torch.zeros(()), None).detach()[0], expected)


@pytest.mark.parametrize("options", [{}, {"effects": "latent"}, {"effects": "latent", "guide": "correlated"}])
def test_the_network_is_drawn_once_for_all_cells(options):
    module, cells = _module(**options).eval(), _cells()
    globals_ = module.draw_globals(4, cells)
    if options:
        assert globals_["total"].shape == (4, 5, GENES) and globals_["total"].std(0).max() > 0
    basal = module.abduct(cells, 4, globals_)
    found = module.counterfactual(basal, UNSEEN[:1].expand(N))
    offset = found.state[..., 3 : 3 + GENES]
    # all cells have the same shift, the one of that draw
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset))
    if not options:
        mean, noise = module.gene_effects.measured.mean, globals_["effect_noise"].rows(torch.tensor([0, 4]))
        torch.testing.assert_close(offset[:, 0], mean[[0, 4]].sum(0) + 0.1 * noise.sum(1))
    own = module.counterfactual(basal, cells.action).expression
    torch.testing.assert_close(own.replay(basal.noise), cells.x.expand(4, -1, -1))


def test_networks_too_large_for_draws_are_announced(monkeypatch):
    module, cells = _module(effects="latent").eval(), _cells()
    monkeypatch.setattr(gpovae, "_MAX_DRAWN", 10)
    with pytest.warns(UserWarning, match="lack the uncertainty of the network"):
        globals_ = module.draw_globals(4, cells)
    torch.testing.assert_close(globals_["total"][0], module.total(module.mean_network()).detach())
    basal = module.abduct(cells, 4, globals_)
    assert torch.isfinite(module.counterfactual(basal, UNSEEN[:1].expand(N)).expression.mean).all()
    assert basal.globals_["artifact"].shape == (4, 1, 3)
