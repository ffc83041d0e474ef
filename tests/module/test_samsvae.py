"""The objective of SAMS-VAE equals the published per-cell weighting; its settings are the published comparators."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import Bernoulli, Normal, kl_divergence

from pertura.module import SAMSVAE, Action, Cells, ConditionalVAE, GeneEffects, SVAEPlus
from pertura.module._shifts import SparseShifts
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
    shifts = module.shifts
    mask, effect = Bernoulli(logits=shifts.mask_logits), Normal(shifts.loc, shifts.log_sd.exp() + 1e-4)
    prior_mask = Bernoulli(torch.full_like(shifts.mask_logits, 0.2))
    prior_effect = Normal(torch.zeros_like(shifts.loc), shifts.log_prior_sd.exp())
    per_perturbation = (kl_divergence(mask, prior_mask) + kl_divergence(effect, prior_effect)).sum(1)
    code = cells.action.codes[:, 0]
    number = torch.bincount(code[code >= 0], minlength=PERTURBATIONS)
    weights = torch.where(code >= 0, 1.0 / number[code.clamp(min=0)], 0.0)
    plated = (weights * per_perturbation[code.clamp(min=0)]).mean()
    values = []
    for _ in range(n_draws):
        table = mask.sample() * effect.sample()
        shift = torch.where((code >= 0)[:, None], table[code.clamp(min=0)], 0.0)
        state = module.encoder(module.standardized(cells.x, cells.library), None, shift)
        posterior = Normal(state.loc - shift, state.scale)
        z = posterior.sample()
        log_p = module.likelihood(module.decoder(z + shift, None), cells.library).log_prob(cells.x)
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


def test_a_few_of_many_perturbations_stand_for_all(monkeypatch):
    """What perturbations cost in a step is the same on average if a few of them are scored."""
    n = 12
    module = SAMSVAE(GENES, n, n_latent=3, n_hidden=8, effects="measured")
    module.n_train = N
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (module.shifts.loc, module.shifts.mask_logits):
            p.copy_(torch.randn(p.shape, generator=generator))
        measured = module.gene_effects.measured
        measured.mean.copy_(torch.randn(n, GENES, generator=generator))
        measured.sd.fill_(0.3)
        measured.measured.fill_(True)
    module.gene_effects.is_counts = False

    def costs(at_most, n_draws):
        monkeypatch.setattr("pertura.module._samsvae.MAX_ROWS", at_most)
        found = []
        for _ in range(n_draws):
            guide = pyro.poutine.trace(module.guide).get_trace(_cells())
            model = pyro.poutine.trace(pyro.poutine.replay(module.model, trace=guide)).get_trace(_cells())
            model.compute_log_prob()
            assert all(len(model.nodes[s]["value"]) == at_most for s in ("mask", "effect", "measured_effect"))
            divergence = 0.0
            for name, kind in (("mask", lambda d: Bernoulli(logits=d.logits)), ("effect", lambda d: d)):
                q, p = guide.nodes[name], model.nodes[name]
                assert q["scale"] == p["scale"]
                each = kl_divergence(kind(q["fn"].base_dist), kind(p["fn"].base_dist))
                divergence += float((q["scale"] * each).sum())
            found.append((divergence, float(model.nodes["measured_effect"]["log_prob_sum"])))
        return np.mean(found, 0), np.std(found, 0) / n_draws**0.5

    torch.manual_seed(0)
    with torch.no_grad():
        (all_rows, error), (few, few_error) = costs(n, 20), costs(3, 80)
    assert (abs(few - all_rows) < 4 * np.hypot(error, few_error) + 1e-3).all()
    assert (few_error < 0.15 * abs(all_rows)).all()


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


@pytest.mark.parametrize("cls", [SAMSVAE, SVAEPlus, ConditionalVAE])
@pytest.mark.parametrize("n_layers", [0, 2])
def test_every_setting_has_finite_gradients(cls, n_layers):
    torch.manual_seed(0)
    settings = [{}]
    if cls is SAMSVAE:
        settings += [
            {"masked": False},
            {"effect_guide": "correlated", "basal_guide": "amortized"},
            {"interactions": True},
        ]
    for own in settings:
        module = cls(GENES, PERTURBATIONS, n_latent=3, n_hidden=8, n_layers=n_layers, **own)
        module.n_train = N
        _loss(module, _cells(order=2), 3).backward()
        grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
        idle = ("kappa",)  # without doses the response is 1 whatever its shape
        assert [n for n, g in grads.items() if g is None and not n.endswith(idle)] == []
        assert all(torch.isfinite(g).all() for g in grads.values() if g is not None)
    assert not list(pyro.get_param_store().keys())


def test_combinations_are_sums_and_pairs_add_what_was_learned():
    shifts = SparseShifts(PERTURBATIONS, 3, interactions=True)
    table = torch.randn(PERTURBATIONS, 3)
    action = Action(torch.tensor([[0, 2], [1, -1]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    u = shifts.interaction.detach()
    expected = torch.stack([table[0] + table[2] + u[0] * u[2], table[1]])
    torch.testing.assert_close(shifts(table, action).detach(), expected)


@pytest.mark.parametrize("options", [{}, {"n_layers": 1}, {"likelihood": "normal"}])
def test_a_rotation_leaves_what_is_decoded(options):
    """Shifts under new coordinates decode to what they did; masks start where shifts are large."""
    module, cells = _module(**options), _cells()

    def decoded(state):
        return module.likelihood.linear(module.decoder(state, None))

    def basal(shift):
        return module.encoder(module.standardized(cells.x, cells.library), None, shift).loc

    with torch.no_grad():
        table = module.shifts.proba() * module.shifts.loc
        before, state = decoded(table), decoded(basal(table[[0] * N]))
        module.on_step(0.5)
        turned = module.shifts.loc
        torch.testing.assert_close(decoded(turned), before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoded(basal(turned[[0] * N])), state, atol=1e-4, rtol=1e-4)
    assert (turned.abs() ** 4).sum() >= (table.abs() ** 4).sum()
    largest = module.shifts.mask_logits.gather(1, turned.abs().argmax(1, keepdim=True))[:, 0]
    assert torch.equal(largest, module.shifts.mask_logits.max(1).values)


def test_rotation_comes_once_and_only_where_shifts_have_free_coordinates():
    module = _module()
    for progress in (0.0, 0.2, 0.4):
        assert bool(module.rotation.done) == (progress > 0.4)
        module.on_step(progress)
    assert bool(module.rotation.done)
    turned = module.shifts.loc.detach().clone()
    module.on_step(0.6)
    assert torch.equal(turned, module.shifts.loc)
    for options in (
        {"masked": False},
        {"effect_guide": "correlated"},
        {"interactions": True},
        {"rotate_shifts": False},
    ):
        module = _module(**options)
        module.on_step(0.4)
        assert not bool(module.rotation.done)


# -- counterfactuals and likelihoods, which all modules have from their model and guide ----------------------------------


def _linear_gaussian():
    """A module in which everything has a closed form."""
    module = _module(likelihood="normal", effect_guide="mean_field")
    with torch.no_grad():
        module.shifts.mask_logits.fill_(30.0)
        module.shifts.log_sd.fill_(-20.0)
    return module.eval()


def test_counterfactuals_keep_the_noise_of_the_cell():
    """x' = x + W (shift' - shift) where the likelihood is normal and linear, whatever was drawn."""
    module, cells = _linear_gaussian(), _cells()
    globals_ = module.draw_globals(4, cells)
    basal = module.abduct(cells, 4, globals_)
    action = Action(torch.full((N, 1), 2), torch.ones(N, 1))
    found = module.counterfactual(basal, action)
    table = globals_["mask"] * globals_["effect"]
    code = cells.action.codes[:, 0]
    own = torch.where((code >= 0)[:, None], table[:, code.clamp(min=0)], torch.zeros(()))
    moved = (table[:, [2] * N] - own) @ module.likelihood.linear.weight.T * module.likelihood.unit
    torch.testing.assert_close(found.expression.replay(basal.noise), cells.x + moved, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.state, basal.state + table[:, [2] * N], atol=1e-5, rtol=1e-4)


def test_draws_are_antithetic():
    module, cells = _linear_gaussian(), _cells()
    globals_ = module.draw_globals(4, cells)
    effect = globals_["effect"]
    torch.testing.assert_close((effect[0] + effect[2]) / 2, module.shifts.loc.detach(), atol=1e-5, rtol=1e-5)
    state = module.abduct(cells, 4, globals_).state
    torch.testing.assert_close(state[0] + state[2], state[1] + state[3], atol=1e-2, rtol=1e-2)
    assert not torch.allclose(state[0], state[1])


def test_weighted_likelihood_is_the_marginal_one():
    """Of a linear normal model x ~ N(W shift + b, W W' + diag)."""
    module, cells = _linear_gaussian(), _cells(slice(0, 8))
    with torch.no_grad():
        module.likelihood.log_scale.fill_(0.7)
    globals_ = module.draw_globals(1, cells)
    globals_ = {name: value.expand(20_000, *value.shape[1:]) for name, value in globals_.items()}
    torch.manual_seed(0)
    weights = module.log_weights(cells, 20_000, globals_)
    found = torch.logsumexp(weights, 0) - np.log(20_000)
    unit, w = module.likelihood.unit, module.likelihood.linear.weight.detach()
    scale = module.likelihood.log_scale.exp() * unit
    code = cells.action.codes[:, 0]
    shift = torch.where((code >= 0)[:, None], module.shifts.loc[code.clamp(min=0)], torch.zeros(())).detach()
    mean = module.likelihood.linear(shift) * unit
    w = w * unit[:, None]
    exact = torch.distributions.MultivariateNormal(mean, w @ w.T + torch.diag(scale**2)).log_prob(cells.x)
    torch.testing.assert_close(found, exact.detach(), atol=0.3, rtol=0.01)


# -- measured effects -----------------------------------------------------------------------------------------------------


@pytest.fixture
def site():
    site = GeneEffects(3, GENES, combinations=[[0, 2]]).eval()
    torch.manual_seed(0)
    site.measured.mean.normal_()
    site.measured.sd.fill_(0.5)
    site.measured.tau.fill_(1.0)
    site.is_counts = False
    return site


def _asked(*members):
    codes = torch.tensor([[*m, *[-1] * (2 - len(m))] for m in members])
    return Action(codes, (codes >= 0).float())


def test_measured_effects_of_singles_pairs_and_controls(site):
    action = _asked([1], [0, 2], [0, 1], [])
    mean = site.measured.mean
    found = site(action, action.dose)
    torch.testing.assert_close(found, torch.stack([mean[1], mean[3], mean[0] + mean[1], torch.zeros(GENES)]))


def test_noise_of_measured_effects(site):
    """Rows have noise of their own, the same each time; unmeasured pairs have more of it than measured ones."""
    with pyro.plate("draws", 400, dim=-2):
        noise = site.sample_noise()
    action = _asked([0], [1], [0, 2], [0, 1], [])
    draws = site(action, action.dose, noise)
    assert torch.equal(draws, site(action, action.dose, noise))
    torch.testing.assert_close(draws.mean(0), site(action, action.dose), atol=1e-4, rtol=1e-4)
    sd = draws.std(0).mean(1)
    torch.testing.assert_close(sd, torch.tensor([0.5, 0.5, 0.5, (0.5 + 1.0) ** 0.5, 0.0]), atol=0.05, rtol=0.05)
    one, other = (draws[:, i] - draws[:, i].mean(0) for i in (0, 1))
    assert abs(float((one * other).mean() / (one.std() * other.std()))) < 0.1
    alone = _asked([1])
    torch.testing.assert_close(site(alone, alone.dose, noise)[:, 0], draws[:, 1])


@pytest.mark.parametrize("off", [0.0, 0.25])
def test_activations_move_expected_expression_by_the_effect(off):
    """The curve from effects to activations, against the likelihood; also where the decoder is off the measured controls."""
    module = _module(effects="measured", n_latent=2).eval()
    site, cells = module.gene_effects, _cells()
    with torch.no_grad():
        activation = module.likelihood.linear(module.decoder(torch.zeros(N, 2), None))
        start = module.likelihood.moved_by(activation, cells.library, 0.0).expectation("log1p", cells.library).mean(0)
        site.set_curve(start + off, module.likelihood, activation, cells.library)
        for size in (-1.0, -0.3, 0.2, 0.8):
            wanted = (start + size).clamp(min=0.3) - start
            offset = site.to_activation(wanted)
            moved = module.likelihood.moved_by(activation, cells.library, offset)
            reached = moved.expectation("log1p", cells.library).mean(0) - start
            torch.testing.assert_close(reached, wanted, atol=0.03, rtol=0.05)
    assert (site.to_activation(torch.zeros(GENES)) == 0).all()


@pytest.mark.parametrize(("name", "state"), [("SAMSVAE", "basal"), ("CRADLEVAE", "z")])
def test_the_guide_is_given_cells_without_their_measured_effect(name, state):
    import pyro

    import pertura.module

    torch.manual_seed(0)
    module = getattr(pertura.module, name)(GENES, 2, effects="measured", likelihood="normal", n_latent=3).eval()
    module.gene_effects.measured.mean.normal_()
    module.gene_effects.is_counts = False
    codes, x = torch.tensor([[0], [1], [-1]]), torch.randn(3, GENES)
    delta = torch.cat([module.gene_effects.measured.mean, torch.zeros(1, GENES)])
    nothing = torch.full_like(codes, -1)
    found = []
    for shown, done in ((x, nothing), (x + delta, codes), (x, codes)):
        action, zeros = Action(done, (done >= 0).float()), torch.zeros(3, dtype=torch.long)
        cells = Cells(shown, action, context=zeros, batch=zeros, library=torch.ones(3, 1))
        with torch.no_grad():
            found.append(pyro.poutine.trace(module.guide).get_trace(cells).nodes[state]["fn"].base_dist.loc)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert (found[2] - found[0])[:2].abs().max() > 0.01


@torch.no_grad()
def test_the_guide_keeps_the_state_that_cells_show_whatever_a_shift_explains_of_it():
    """Shifts are then learned from the basal states that they leave, and not against an encoder that explains the cells already."""
    module, cells = _module(effect_guide="mean_field"), _cells()
    module.encoder.hidden.first[2].weight.zero_()  # what the encoder is told of the shift
    values = {"mask": torch.ones(PERTURBATIONS, 3), "effect": torch.full((PERTURBATIONS, 3), 2.0)}
    found = []
    for scale in (0.0, 1.0):
        given = pyro.poutine.condition(module.guide, {**values, "effect": scale * values["effect"]})
        found.append(pyro.poutine.trace(given).get_trace(cells).nodes["basal"]["fn"].base_dist.loc)
    shift = 2.0 * (cells.action.codes >= 0).float()
    torch.testing.assert_close(found[1] + shift.expand(-1, 3), found[0])
    assert shift.any()


def test_the_logarithmic_dose_response_rises_from_zero_to_one_whatever_its_shape():
    """Concave, the more so the larger kappa; a single dose needs no curve."""
    module = _module()
    dose = torch.linspace(0.0, 1.0, 21)[:, None].expand(-1, PERTURBATIONS)
    codes = torch.arange(PERTURBATIONS).expand(21, -1)
    with torch.no_grad():
        module.shifts.log_kappa.copy_(torch.tensor([-4.0, 0.0, 2.0, 6.0]))
        strength = module.strength(Action(codes, dose))
        assert torch.equal(module.strength(Action(codes, (dose > 0).float())), (dose > 0).float())
    assert (strength.diff(dim=0) > 0).all() and (strength.diff(dim=1)[1:-1] > 0).all()
    torch.testing.assert_close(strength[[0, -1]], torch.stack([torch.zeros(4), torch.ones(4)]))
    kappa = torch.nn.functional.softplus(module.shifts.log_kappa.detach()) + 1e-3
    torch.testing.assert_close(strength[10], (1.0 + 0.5 * kappa).log() / (1.0 + kappa).log())
