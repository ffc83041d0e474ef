"""The equations of PertVAE, checked against closed forms."""

from dataclasses import replace

import pyro
import pytest
import torch

from pertura.module import Action, Cells, PertVAE
from pertura.module._base import PerturbationModule
from pertura.module._pertvae import _same, _split
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
    torch.testing.assert_close(module.effect(z, cells), torch.zeros_like(z))
    torch.testing.assert_close(module._take_back(z, cells, None), z)


@pytest.mark.parametrize("half", [0, 1, None])
def test_the_profile_is_of_other_controls_than_the_partner(half):
    module, cells = _shake(_module()), _cells()
    module.half_profile.normal_()
    given = None if half is None else torch.full((6, 1), float(half))
    nodes = pyro.poutine.trace(module.model).get_trace(cells, 3, half=given).nodes
    z1 = nodes["z1"]["value"][:3]
    # contexts are three: those of the first half come first
    profiles = None if half is None else module.half_profile[3:] if half == 0 else module.half_profile[:3]
    torch.testing.assert_close(nodes["z2"]["fn"].base_dist.loc, z1 + module.effect(z1, _split(cells, 3)[1], profiles))


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
    module, cells = _module(n_flow_steps=0), _cells(codes=((-1,),) * 6)
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
    module = _shake(_module(rank=1, n_batch=2, transition_noise="state", use_weight_norm=True))
    cells = _cells()
    cells.action.dose[3] = 0.3
    FreeBitsELBO().differentiable_loss(module.model, module.guide, cells, 3).backward()
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


OPTIONS = [{}, {"rank": 1}, {"effect_input": "cell"}, {"effect_input": "cell", "rank": 1, "transition_noise": "state"}]


def _shaken(**options):
    module = _shake(_module(**options)).eval()
    if module.effect_log_scale_slope is not None:
        torch.nn.init.normal_(module.effect_log_scale_slope, std=0.2)
    return module


@pytest.mark.parametrize("options", OPTIONS)
def test_abduction_takes_the_own_effect_back(options):
    """The basal state, moved by the cell's own perturbation, is the state that the cell was encoded to."""
    module, cells = _shaken(**options), _cells()
    basal = module.abduct(cells, 4, {})
    moved = basal.state + module.effect(basal.state, cells)
    torch.testing.assert_close(moved, basal.latents["measured"], atol=1e-4, rtol=1e-4)
    assert (basal.state - moved)[:, 3:].abs().min() > 1e-3
    torch.testing.assert_close(basal.state[:, :3], basal.latents["measured"][:, :3])
    control = module.counterfactual(basal, cells.action.control())
    torch.testing.assert_close(control.state, basal.state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_own_perturbation_gives_the_own_profile_back_in_every_draw(options):
    module, cells = _shaken(**options), _cells()
    basal = module.abduct(cells, 3, {})
    found = module.counterfactual(basal, cells.action)
    for expression in (found.expression, found.of_cells):
        torch.testing.assert_close(expression.replay(basal.noise), cells.x.expand(3, -1, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_noise_of_the_transition_is_in_draws_and_not_in_means(options):
    module, cells = _shaken(**options), _cells(n=1, codes=((-1,),))
    basal = module.abduct(cells, 4000, {})
    basal.state = basal.state[:1].expand_as(basal.state)
    found = module.counterfactual(basal, Action(torch.tensor([[1]]), torch.ones(1, 1)))
    assert found.state.std(0).max() < 1e-5
    weight = module.likelihood.linear.weight * module.likelihood.unit[:, None]  # a linear decoder
    variance = (weight.square() * module.noise_sd(basal.state[0]).square()).sum(1)
    torch.testing.assert_close(found.of_cells.loc[:, 0].var(0), variance, rtol=0.15, atol=1e-4)
    torch.testing.assert_close(found.of_cells.loc.mean(0), found.expression.loc.mean(0), atol=1e-3, rtol=1e-3)
    assert (found.expression.loc.std(0) < 1e-5).all()


def test_treated_cells_keep_their_noise_under_another_perturbation():
    module, cells = _shaken(), _cells()
    basal = module.abduct(cells, 5, {})
    found = module.counterfactual(basal, Action(torch.tensor([[1]]), torch.ones(1, 1)).expand(6))
    apart = (found.of_cells.loc - found.expression.loc).abs().amax((0, 2))
    assert (apart[:3] > 1e-3).all() and (apart[3:] < 1e-4).all()


def test_same_perturbations_whatever_the_order_of_their_members():
    one = Action(torch.tensor([[0, 1], [1, -1], [0, -1], [0, -1]]), torch.tensor([[1.0, 0.5], [1, 0], [1, 0], [1, 0]]))
    other = Action(torch.tensor([[1, 0, -1], [1, 0, -1], [0, -1, -1], [0, -1, -1]]), torch.ones(4, 3))
    other.dose[:, 2] = 0.0
    other.dose[0, 0], other.dose[1, 1], other.dose[3, 0] = 0.5, 0.0, 0.9
    assert _same(one, other).tolist() == [True, True, True, False]


@pytest.mark.parametrize("effect_input", ["cell", "context"])
def test_prior_of_a_treated_cell_is_the_marginal_of_z2(effect_input):
    module, cells = _shaken(effect_input=effect_input), _cells()
    torch.manual_seed(0)
    z1 = torch.randn(200_000, 6, N_LATENT)
    drawn = module.transition(z1, cells).sample()
    prior = module.prior(cells)
    torch.testing.assert_close(prior.mean[3:], drawn.mean(0)[3:], atol=0.03, rtol=0)
    torch.testing.assert_close(prior.variance[3:], drawn.var(0)[3:], rtol=0.03, atol=0.0)
    torch.testing.assert_close(prior.variance[:3], torch.ones(3, N_LATENT), atol=1e-6, rtol=0)
    with torch.no_grad():
        z = torch.randn(5, 6, N_LATENT)
        # by one draw of z1 from its posterior: exact where the noise is constant
        torch.testing.assert_close(
            module._log_marginal(z, cells, None)[:, 3:], prior.log_prob(z)[:, 3:], atol=1e-4, rtol=1e-4
        )


def test_log_weights_with_noise_that_depends_on_the_state_estimate_the_likelihood():
    """Against an average of p(x | z2) p(z2 | z1) over z1 of the prior, in one dimension."""
    module = _shaken(n_latent=1, effect_input="cell", transition_noise="state")
    module.effect_log_scale_slope.data.fill_(0.5)
    cells = _cells(n=2, codes=((0,), (1,)))
    torch.manual_seed(0)
    with torch.no_grad():
        weights = module.log_weights(cells, 50_000, {})
        z2 = module.transition(torch.randn(200_000, 2, 1), cells).sample()
        direct = module.expression(z2, cells).log_prob(cells.x)
    estimates = [torch.logsumexp(v, 0) - torch.tensor(float(len(v))).log() for v in (weights, direct)]
    torch.testing.assert_close(*estimates, atol=0.1, rtol=0)


def test_log_weights_are_the_generic_ones_and_depend_on_the_perturbation():
    module, cells = _shaken(), _cells()
    torch.manual_seed(1)
    own = module.log_weights(cells, 8, {})
    torch.manual_seed(1)
    torch.testing.assert_close(own, PerturbationModule.log_weights(module, cells, 8, {}))
    cells.action.codes[3] = 1
    torch.manual_seed(1)
    apart = (module.log_weights(cells, 8, {}) - own).abs().amax(0)
    assert apart[3] > 1e-2 and apart[[0, 1, 2, 4, 5]].max() < 1e-4


def test_profiles_of_new_contexts_decide_the_effect():
    module, cells = _shaken(), _cells()
    cells.context[3] = 3
    table = torch.cat([module.context_profile, torch.full((1, 2), 2.0)])
    basal = module.abduct(cells, 2, {"context_profile": table})
    expected = module.effect_U[0] @ table[3] + module.effect_b[0] + module.effect_common
    torch.testing.assert_close((basal.latents["measured"] - basal.state)[0, 3], expected)
    assert torch.isfinite(module.log_weights(cells, 2, {"context_profile": table})).all()


def test_cells_alone_do_not_train_the_effect():
    module, cells = _shake(_module()), _cells()
    FreeBitsELBO().differentiable_loss(module.model, module.guide, cells).backward()
    assert module.effect_log_scale.grad is None
    # the prior alone, which the size of the data makes tiny
    assert module.effect_b.grad.abs().max() < 1e-4 and module.flow.loc.weight.grad.abs().max() > 1e-2


def test_combinations_add_and_doses_grow_from_nothing():
    module, cells = _shake(_module()), _cells(n=1, codes=((-1,),))
    z = torch.zeros(4, 1, N_LATENT)

    def effect(codes, dose):
        return module.effect(z, replace(cells, action=Action(torch.tensor([codes]), torch.tensor([dose]))))

    torch.testing.assert_close(effect([0, 1], [1.0, 1.0]), effect([0, -1], [1.0, 0.0]) + effect([1, -1], [1.0, 0.0]))
    torch.testing.assert_close(effect([0], [0.0]), torch.zeros(4, 1, N_LATENT))
    sizes = torch.stack([effect([0], [d]).norm() for d in (0.1, 0.3, 1.0, 2.0)])
    assert (sizes.diff() > 0).all()


def test_one_perturbation_has_a_full_matrix():
    module = PertVAE(N_GENES, 1, n_latent=N_LATENT, effect_input="cell")
    assert module.effect_W().shape == (1, N_LATENT, N_LATENT)
    assert module.effect_V is None


def test_features_of_a_new_perturbation_move_the_state():
    module = _module(n_features=4)
    torch.nn.init.normal_(module.effect_features.weight)
    features = torch.randn(1, 1, 4)
    moved = module.shift(Action(torch.tensor([[-2]]), torch.ones(1, 1), features))
    torch.testing.assert_close(moved, module.effect_features(features[0]) + module.effect_common)


def test_counts_pass_through_plates():
    module = _module(likelihood="nb")
    cells = _cells()
    cells.x = torch.poisson(cells.x.abs() * 3)
    cells.library = cells.x.sum(1, keepdim=True).clamp(min=1.0)
    loss = FreeBitsELBO(num_particles=2).differentiable_loss(module.model, module.guide, cells, 3)
    assert torch.isfinite(loss)
