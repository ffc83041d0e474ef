"""The equations of PertVAE, checked against closed forms."""

import pyro
import pytest
import torch

from pertura.module import Action, Cells, PertVAE
from pertura.module._base import Basal
from pertura.train import FreeBitsELBO

N_GENES, N_LATENT = 7, 3


def _module(**options):
    torch.manual_seed(0)
    settings = {"n_latent": N_LATENT, "encoder_hidden": (8,), "n_flow_context": 6, "n_flow_hidden": 8}
    settings |= {"n_context_components": 2, "likelihood": "normal"}
    module = PertVAE(N_GENES, 2, 3, **{**settings, **options})
    module.n_train = 10**9  # the prior of the effects weighs nothing
    return module


def _cells(n=6, codes=((-1,), (-1,), (-1,), (0,), (1,), (0,)), seed=0):
    torch.manual_seed(seed)
    codes = torch.tensor(codes)
    return Cells(
        x=torch.randn(n, N_GENES),
        action=Action(codes, (codes >= 0).float()),
        context=torch.tensor([0, 1, 2, 0, 1, 2])[:n],
        batch=torch.zeros(n, dtype=torch.long),
        library=torch.ones(n, 1),
    )


def _shake(module):
    for name, parameter in module.named_parameters():
        if name.startswith("effect_") and "scale" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    module.context_profile.normal_()
    return module


def test_starts_as_the_identity():
    module, cells = _module(), _cells()
    z = torch.randn(2, 6, N_LATENT)
    basal = Basal(z, torch.zeros(2, 6, N_GENES), cells.context, cells.batch, cells.library)
    torch.testing.assert_close(module.act(basal, cells.action, {}), z)


def test_elbo_is_the_sum_of_its_terms():
    """Against log-densities written out by hand, with Gaussian posteriors, averaged over many draws of both."""
    module, cells = _shake(_module(n_flow_steps=0, effect_input="cell")), _cells()
    n_pairs = 3
    losses, expected = [], []
    normal = torch.distributions.Normal
    with torch.no_grad():
        posterior = module.flow(module.encode(cells))
        loc, scale = posterior.base_dist.loc, posterior.base_dist.scale
        for seed in range(300):
            torch.manual_seed(seed)
            losses.append(FreeBitsELBO().differentiable_loss(module.model, module.guide, cells, n_pairs))
            torch.manual_seed(10_000 + seed)
            z = loc + scale * torch.randn_like(loc)
            z1, z2 = z[:3], z[3:]
            log_q = normal(loc, scale).log_prob(z).sum()
            W, code = module.effect_W(), cells.action.codes[3:, 0]
            mean = z1 + torch.einsum("nij,nj->ni", W[code], z1) + module.effect_b[code] + module.effect_common
            log_p = normal(0, 1).log_prob(z1).sum() + normal(mean, module.effect_log_scale.exp()).log_prob(z2).sum()
            log_x = normal(*module.likelihood._parameters_of(z)).log_prob(cells.x).sum()
            expected.append(log_q - log_p - log_x)
    losses, expected = torch.stack(losses), torch.stack(expected)
    error = ((losses.var() + expected.var()) / 300).sqrt()
    assert abs(losses.mean() - expected.mean()) < 4 * error


def test_free_nats_make_small_divergences_free():
    module, cells = _module(n_flow_steps=0), _cells()
    with torch.no_grad():
        module.flow.loc.weight.zero_(), module.flow.loc.bias.zero_()
        module.flow.log_scale.weight.zero_(), module.flow.log_scale.bias.zero_()  # q = p: no divergence at all

        def loss(**free):
            torch.manual_seed(3)
            return FreeBitsELBO(free).differentiable_loss(module.model, module.guide, cells, 0)

        torch.testing.assert_close(loss(z1=2.0) - loss(), torch.tensor(2.0 * 6), atol=1e-3, rtol=0)
        module.flow.loc.bias.fill_(30.0)  # far beyond the free nats
        torch.testing.assert_close(loss(z1=2.0), loss())


def test_warm_up_scales_divergences_only():
    module, cells = _shake(_module(n_flow_steps=0)), _cells()

    def loss(weight):
        torch.manual_seed(1)
        with torch.no_grad():
            return FreeBitsELBO().differentiable_loss(module.model, module.guide, cells, 3, kl_weight=weight)

    torch.testing.assert_close(loss(0.5), (loss(1.0) + loss(1e-9)) / 2, rtol=1e-4, atol=1e-2)


def test_prior_of_effects_is_weighed_by_the_share_of_the_minibatch():
    module, cells = _shake(_module(prior_sd_W=0.5, prior_sd_b=2.0)), _cells()
    module.n_train = 60
    trace = pyro.poutine.trace(pyro.poutine.block(module.model, hide=["z1", "z2"])).get_trace(cells, 3)
    expected = -0.5 * module.effect_W().square().sum() / 0.25 - 0.5 * module.effect_b.square().sum() / 4.0
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["effect_prior"]["log_prob_sum"], expected * 6 / 60)


def test_gradients_reach_every_parameter():
    module, cells = _shake(_module(rank=1, n_batch=2, prediction_weight=0.5)), _cells()
    cells.action.dose[3] = 0.3
    FreeBitsELBO().differentiable_loss(module.model, module.guide, cells, 3).backward()
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("effect_input", ["cell", "context"])
@pytest.mark.parametrize("rank", [None, 1])
def test_abduction_takes_the_own_effect_back(effect_input, rank):
    """z1 found by abduction, moved by the cell's own perturbation, is the state that the cell was encoded to."""
    module, cells = _shake(_module(effect_input=effect_input, rank=rank)), _cells()
    torch.manual_seed(5)
    basal = module.abduct(cells, 4, {})
    torch.manual_seed(5)
    z = module.flow(module.encode(cells)).sample((4,))
    torch.testing.assert_close(module.act(basal, cells.action, {}), z, atol=1e-4, rtol=1e-4)


def test_own_perturbation_gives_the_own_profile_back():
    module, cells = _shake(_module()), _cells()
    basal = module.abduct(cells, 3, {})
    x = module.decode(module.act(basal, cells.action, {}), basal)
    torch.testing.assert_close(x, cells.x.expand(3, -1, -1), atol=1e-4, rtol=1e-4)


def test_combinations_add_and_doses_grow_from_nothing():
    module = _shake(_module())
    u = torch.randn(4, 1, 2)

    def effect(codes, dose):
        return module.effect(u, Action(torch.tensor([codes]), torch.tensor([dose])))

    torch.testing.assert_close(effect([0, 1], [1.0, 1.0]), effect([0, -1], [1.0, 0.0]) + effect([1, -1], [1.0, 0.0]))
    torch.testing.assert_close(effect([0], [0.0]), torch.zeros(4, 1, N_LATENT))
    sizes = torch.stack([effect([0], [d]).norm() for d in (0.1, 0.3, 1.0, 2.0)])
    assert (sizes.diff() > 0).all()


def test_one_perturbation_has_a_full_matrix():
    module = PertVAE(N_GENES, 1, n_latent=N_LATENT, effect_input="cell")
    assert module.effect_W().shape == (1, N_LATENT, N_LATENT)
    assert not hasattr(module, "effect_V")


def test_features_of_a_new_perturbation_move_the_state():
    module = _module(n_features=4)
    torch.nn.init.normal_(module.effect_features.weight)
    features = torch.randn(1, 1, 4)
    moved = module.effect(torch.zeros(1, 1, 2), Action(torch.tensor([[-2]]), torch.ones(1, 1), features))
    torch.testing.assert_close(moved[0], module.effect_features(features[0]) + module.effect_common)


def test_counts_pass_through_plates():
    module = _module(likelihood="nb")
    cells = _cells()
    cells.x = torch.poisson(cells.x.abs() * 3)
    cells.library = cells.x.sum(1, keepdim=True).clamp(min=1.0)
    loss = FreeBitsELBO(num_particles=2).differentiable_loss(module.model, module.guide, cells, 3)
    assert torch.isfinite(loss)
