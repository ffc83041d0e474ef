"""The objective of SAMS-VAE equals the published per-cell weighting; its settings are the published comparators."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import Bernoulli, Normal, kl_divergence

from pertura.module import SAMSVAE, Action, Cells
from pertura.nn import StraightThroughBernoulli

N, GENES, PERTURBATIONS = 60, 12, 4


def _cells(rows=slice(None), order=1):
    rng = np.random.default_rng(0)
    codes = torch.as_tensor(rng.integers(-1, PERTURBATIONS, size=(N, order)))
    x = torch.as_tensor(rng.poisson(3.0, size=(N, GENES)), dtype=torch.float32)
    action = Action(codes[rows], (codes >= 0).float()[rows])
    x = x[rows]
    return Cells(x, action, torch.zeros(len(x)).long(), torch.zeros(len(x)).long(), x.sum(1, keepdim=True))


def _module(**options):
    torch.manual_seed(1)
    module = SAMSVAE(GENES, PERTURBATIONS, **{"n_latent": 3, "n_hidden": 8, "mask_prior": 0.2, **options})
    module.n_train = N
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def _loss(module, cells, particles=1):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    return elbo.differentiable_loss(module.model, module.guide, cells)


@torch.no_grad()
def _reference(module, cells, n_draws):
    """Each perturbed cell carries 1 / N_t of the divergence of its perturbation; per-cell mean."""
    mask, effect = Bernoulli(logits=module.mask_logits), Normal(module.effect_loc, module.effect_log_sd.exp() + 1e-4)
    prior_mask = Bernoulli(torch.full_like(module.mask_logits, 0.2))
    prior_effect = Normal(torch.zeros_like(module.effect_loc), module.effect_log_prior_sd.exp())
    per_perturbation = (kl_divergence(mask, prior_mask) + kl_divergence(effect, prior_effect)).sum(1)
    code = cells.action.codes[:, 0]
    number = torch.bincount(code[code >= 0], minlength=PERTURBATIONS)
    weights = torch.where(code >= 0, 1.0 / number[code.clamp(min=0)], 0.0)
    plated = (weights * per_perturbation[code.clamp(min=0)]).mean()
    values = []
    for _ in range(n_draws):
        table = mask.sample() * effect.sample()
        shift = torch.where((code >= 0)[:, None], table[code.clamp(min=0)], 0.0)
        posterior = module.basal(cells, shift)
        z = posterior.sample()
        log_p = module.expression(z + shift, cells).log_prob(cells.x)
        local = kl_divergence(Normal(posterior.loc, posterior.scale), Normal(0.0, 1.0)).sum(1)
        values.append(float((local - log_p).mean() + plated))
    return np.mean(values), np.std(values) / np.sqrt(n_draws)


@pytest.mark.parametrize("particles", [1, 5])
def test_the_loss_is_the_published_per_cell_weighting(particles):
    module, cells = _module(), _cells()
    with torch.no_grad():
        draws = np.array([float(_loss(module, cells, particles)) / N for _ in range(300 // particles)])
    expected, se = _reference(module, cells, 300)
    assert abs(draws.mean() - expected) < 4 * np.hypot(se, draws.std() / np.sqrt(len(draws)))


def test_minibatches_add_up_to_the_whole():
    """Global terms count once per pass, whatever the size of the minibatch."""
    module = _module()
    with torch.no_grad():
        whole = np.array([float(_loss(module, _cells())) for _ in range(150)])
        parts = np.array(
            [sum(float(_loss(module, _cells(slice(s, s + 15)))) for s in range(0, N, 15)) for _ in range(150)]
        )
    assert abs(whole.mean() - parts.mean()) < 4 * np.hypot(whole.std(), parts.std()) / 150**0.5


def test_mask_draws_are_hard_and_pass_gradients():
    logits = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    mask = StraightThroughBernoulli(torch.tensor(1.0), logits=logits.expand(2000, 3))
    draw = mask.rsample()
    assert set(draw.detach().unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(draw.detach().mean(0), logits.detach().sigmoid(), atol=0.05, rtol=0)
    torch.testing.assert_close(
        mask.log_prob(draw.detach()), Bernoulli(logits=logits.expand(2000, 3)).log_prob(draw.detach())
    )
    draw.sum().backward()
    assert (logits.grad > 0).all()


@pytest.mark.parametrize("effect", ["sparse", "dense", "svae+", "conditional"])
@pytest.mark.parametrize("options", [{}, {"effect_guide": "correlated", "basal_guide": "amortised", "n_layers": 2}])
def test_every_setting_has_finite_gradients(effect, options):
    module = _module(effect=effect, **options)
    _loss(module, _cells(order=2), 3).backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    idle = {"dose_log_kappa"}  # without doses the response is 1 whatever its shape
    assert [n for n, g in grads.items() if g is None and n not in idle] == []
    assert all(torch.isfinite(g).all() for g in grads.values() if g is not None)
    assert not list(pyro.get_param_store().keys())


def test_combinations_are_sums_and_pairs_add_what_was_learned():
    module = _module(interactions=True)
    table = torch.randn(PERTURBATIONS, 3)
    action = Action(torch.tensor([[0, 2], [1, -1]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    u = module.effect_interaction.detach()
    expected = torch.stack([table[0] + table[2] + u[0] * u[2], table[1]])
    torch.testing.assert_close(module.shift(table, action).detach(), expected)


def test_residuals_add_up_and_a_registered_pair_has_its_own():
    module = SAMSVAE(GENES, PERTURBATIONS, n_latent=3, n_combinations=1, order=2)
    module.residual.copy_(torch.arange(5.0)[:, None].expand(-1, GENES))
    module.combinations[0] = torch.tensor([1, 3])
    action = Action(torch.tensor([[1, -1], [0, 3], [1, 3]]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    offset = module.offset(action, {})
    torch.testing.assert_close(offset[:, 0], torch.tensor([1.0, 3.0, 1.0 + 3.0 + 4.0]))


@pytest.mark.parametrize("options", [{}, {"n_layers": 1}, {"likelihood": "normal"}])
def test_a_rotation_leaves_what_is_decoded(options):
    """Shifts under new coordinates decode to what they did; masks start where shifts are large."""
    module = _module(**options)

    def mean(h):
        return module.likelihood.linear(h)

    batch, cells = torch.zeros(PERTURBATIONS).long(), _cells()
    with torch.no_grad():
        table = module.mask_logits.sigmoid() * module.effect_loc
        before, seen = mean(module._decoded(table, batch)), module.basal(cells, table[[0] * N])
        state = mean(module._decoded(seen.loc, cells.batch))
        r = module.rotate()
        turned = module.effect_loc
        torch.testing.assert_close(mean(module._decoded(turned, batch)), before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(r @ r.T, torch.eye(3), atol=1e-5, rtol=0)
        after = module.basal(cells, turned[[0] * N])
        torch.testing.assert_close(mean(module._decoded(after.loc, cells.batch)), state, atol=1e-4, rtol=1e-4)
    assert (turned.abs() ** 4).sum() >= (table.abs() ** 4).sum()
    assert (module.mask_logits.argmax(1) == turned.abs().argmax(1)).all()


def test_rotation_comes_once_and_only_where_shifts_have_free_coordinates():
    module = _module()
    for progress in (0.0, 0.2, 0.4):
        assert bool(module.rotated) == (progress > 0.4)
        module.on_step(progress)
    assert bool(module.rotated) and not module._can_rotate()
    for options in (
        {"effect": "dense"},
        {"effect_guide": "correlated"},
        {"interactions": True},
        {"rotate_shifts": False},
    ):
        module = _module(**options)
        module.on_step(0.2)
        module.on_step(0.4)
        assert not bool(module.rotated)
