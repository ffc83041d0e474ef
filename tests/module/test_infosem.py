"""InfoSEM: the densities of the paper, reductions of one model to another, do(g) in closed form."""

from __future__ import annotations

import math

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pertura.data._constants import KEYS
from pertura.module import Action, Basal, Cells, Counterfactual, InfoSEM
from pertura.module._pairs import PairPrior
from pertura.nn import propagate

G, REGULATORS = 6, np.array([0, 2, 3])


def make(**arguments) -> InfoSEM:
    torch.manual_seed(0)
    options = {"regulators": REGULATORS, "knocked_out": np.array([2, 4, -1]), "hidden": (8,), "augmentation": 0.0}
    module = InfoSEM(G, 1, **{**options, **arguments})
    module.n_train = 40
    module.progress = 1.0
    return module


def embedding(d: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(G, d)).astype(np.float32)


def pairs(known: np.ndarray | None = None) -> PairPrior:
    similarity = np.random.default_rng(1).uniform(size=(len(REGULATORS), G)).astype(np.float32)
    return PairPrior(similarity, embedding(), REGULATORS, known)


def cells_of(codes: list[list[int]], x: torch.Tensor | None = None, dose: float = 1.0) -> Cells:
    """Cells with these perturbations, and random expression by default."""
    torch.manual_seed(4)
    n, codes = len(codes), torch.tensor(codes)
    action = Action(codes, dose * codes.ge(0))
    zeros = torch.zeros(n, dtype=torch.long)
    return Cells(torch.rand(n, G) + 0.5 if x is None else x, action, zeros, zeros, torch.ones(n, 1))


@pytest.fixture
def cells() -> Cells:
    torch.manual_seed(2)
    return cells_of([[-1]] * 10, torch.randn(10, G))


def elbo(module: InfoSEM, cells: Cells) -> torch.Tensor:
    torch.manual_seed(3)
    return TraceMeanField_ELBO().differentiable_loss(module.model, module.guide, cells)


def loss(module: InfoSEM, cells: Cells) -> float:
    return float(elbo(module, cells).detach())


def share_curves(target: InfoSEM, source: InfoSEM) -> None:
    target.encoder.load_state_dict(source.encoder.state_dict())
    target.decoder.load_state_dict(source.decoder.state_dict())


# -- densities ------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_deepsem(cells):
    """Squared error, divergence of z, and alpha times mean |A| over all G x G pairs, per gene."""
    module = make(alpha=50.0, beta=0.7)
    weight = module.network()
    x = cells.x[None]
    loc, sd = module.noise_posterior(x, weight)
    torch.manual_seed(3)
    z = loc + sd * torch.randn_like(loc)
    found, _ = module.expression(propagate(z, weight, module.regulators))
    error = (x - found).square().sum()
    divergence = 0.5 * (loc.square() + sd.square() - 1 - 2 * sd.log()).sum()
    penalty = 50.0 * float(weight.detach().abs().sum()) / G**2 * G * 10
    constant = 10 * G * 0.5 * math.log(math.pi)
    # the normalization of the Laplace density is constant too
    scale = G / (40 * 50.0)
    constant += 10 / 40 * math.log(2 * scale) * len(REGULATORS) * G
    expected = float((error + 0.7 * divergence).detach()) + penalty + constant
    assert loss(module, cells) == pytest.approx(expected, rel=1e-5)


def test_sparsity_waits(cells):
    module = make(alpha=50.0, sparsity_delay=0.5)
    module.progress = 0.4
    before = loss(module, cells)
    with torch.no_grad():
        module.network_weight.neg_()
        negative = loss(module, cells)
        module.network_weight.neg_()
    module.progress = 0.6
    assert loss(module, cells) != pytest.approx(before, abs=1.0)
    module.alpha = 5000.0
    module.progress = 0.4
    assert loss(module, cells) == pytest.approx(before, rel=1e-5)
    assert negative != before


@pytest.mark.parametrize(
    "options", [{}, {"z_prior": "learned"}, {"likelihood": "normal"}, {"posterior": "variational"}]
)
@pytest.mark.parametrize("prior", ["none", "size", "embedding", "edges"])
def test_every_parameter_gets_a_gradient(cells, options, prior):
    if prior == "size":
        options = {**options, "pairs": pairs()}
    elif prior != "none":
        options = {**options, "embedding": embedding()}
    if prior == "edges":
        options["known"] = np.sign(np.random.default_rng(0).normal(size=(3, G))).astype(np.int8)
    module = make(n_ensemble=2, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("prior_"):
                parameter.normal_()
    value = elbo(module, cells)
    value.backward()
    assert torch.isfinite(value)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_members_do_not_see_each_other(cells):
    """The gradients of one member are the same whatever the other is."""
    module = make(n_ensemble=2)
    gradients = []
    for factor in (1.0, -2.0):
        with torch.no_grad():
            module.network_weight[1].mul_(factor)
        module.zero_grad()
        elbo(module, cells).backward()
        gradients.append(module.network_weight.grad[0].clone())
    torch.testing.assert_close(*gradients)


def test_a_knocked_out_gene_has_a_flat_prior():
    module = make()
    codes = [[-1]] * 10
    codes[3] = [0]
    trace = poutine.trace(module.model).get_trace(cells_of(codes))
    sd = trace.nodes["z"]["fn"].base_dist.scale.expand(1, 10, G)[0]
    assert sd[3, 2] == 10.0 and (sd != 1).sum() == 1


def test_augmentation_sets_entries_to_no_expression():
    """The share of entries; each member sees others; not while validating."""
    module = make(n_ensemble=2, augmentation=0.3)
    with torch.no_grad():
        module.input_mean.fill_(2.0)
    batch = {KEYS.X: torch.rand(500, G) + 3.0, KEYS.PERTURBATION: torch.tensor([[-1.0, 0.0]]).expand(500, -1)}
    batch |= {KEYS.CONTEXT: torch.zeros(500, 1), KEYS.BATCH: torch.zeros(500, 1)}
    torch.manual_seed(0)
    (cells,), given = module._get_fn_args_from_batch(batch)
    dropped = given["x"] == -2.0
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(given["x"][~dropped], (cells.x - 2.0).expand(2, -1, -1)[~dropped])
    assert not torch.equal(*dropped)
    assert not (module.eval()._get_fn_args_from_batch(batch)[1]["x"] == -2.0).any()


# -- reductions -----------------------------------------------------------------------------------------------------


def test_without_what_embeddings_say_b_is_deepsem(cells):
    plain = make()
    for described, change in ((make(embedding=embedding()), "prior_source"), (make(pairs=pairs()), "log_size")):
        share_curves(described, plain)
        with torch.no_grad():
            described.network_weight.copy_(plain.network_weight)
        assert loss(described, cells) == pytest.approx(loss(plain, cells), rel=1e-6)
        with torch.no_grad():
            getattr(described, change).fill_(1.0)
        assert loss(described, cells) != pytest.approx(loss(plain, cells), rel=1e-6)


def test_the_size_of_a_pair_is_the_scale_of_its_prior(cells):
    module = make(pairs=pairs(), alpha=50.0)
    with torch.no_grad():
        module.log_size.normal_()
    node = poutine.trace(module.model).get_trace(cells).nodes["A_e"]["fn"].base_dist
    torch.testing.assert_close(node.scale[0], G / (40 * 50.0) * module.log_size.exp())
    assert not node.loc.any()


def test_pairs_are_looked_at_once_and_weights_start_anew():
    torch.manual_seed(0)
    module = make(pairs=pairs())
    with torch.no_grad():
        module.network_weight.mul_(-3.0)
    module.on_step(0.4)
    assert not module.informed and bool((module.network_weight <= 0).all())
    module.on_step(0.5)
    assert module.informed and module.moved()[0] < 0.2 and bool((module.network() >= 0).all())
    assert not torch.equal(module.log_odds, torch.zeros_like(module.log_odds))
    with torch.no_grad():
        module.network_weight.mul_(-3.0)
    module.on_step(0.6)
    assert module.moved()[0] > 2, "the second time nothing happens"


def test_prior_mean_is_additive():
    module = make(embedding=embedding())
    with torch.no_grad():
        for parameter in (module.prior_source, module.prior_target):
            parameter.normal_()
    h = torch.as_tensor(embedding())
    found = module.prior_mean()[0]
    for row, i in enumerate(REGULATORS):
        for j in range(G):
            expected = h[i] @ module.prior_source[0] + h[j] @ module.prior_target[0]
            expected = 0.0 if i == j else float(expected) / (G - 1)
            assert float(found[row, j]) == pytest.approx(expected, abs=1e-6)


def test_without_labels_bc_is_b(cells):
    """A = A_e / 2 with all pairs unknown: with twice A_e and twice its prior sd, the loss differs by a constant."""
    b = make(embedding=embedding(), alpha=50.0)
    bc = make(embedding=embedding(), alpha=25.0, known=np.zeros((3, G), np.int8))
    share_curves(bc, b)
    differences = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            b.network_weight.copy_(0.1 * torch.randn_like(b.network_weight))
            b.prior_source.normal_()
            bc.network_weight.copy_(2 * b.network_weight)
            bc.prior_source.copy_(2 * b.prior_source)
        torch.testing.assert_close(bc.network(), b.network())
        differences.append(loss(bc, cells) - loss(b, cells))
    assert differences[0] == pytest.approx(differences[1], abs=1e-3)


def test_labels_order_the_probabilities():
    known = np.zeros((3, G), np.int8)
    known[0, 1], known[0, 4] = 1, -1
    module = make(embedding=embedding(), known=known)
    proba = module.edge_proba()[0]
    assert float(proba[0, 1]) == pytest.approx(0.95) and float(proba[0, 4]) == pytest.approx(0.05)
    assert float(proba[1, 4]) == 0.5
    # the network starts where it starts without labels
    assert float(module.network()[0, 0, 1]) == pytest.approx(0.2, rel=0.2)
    assert float(module.network()[0, 0, 4]) == pytest.approx(0.2, rel=0.2)


# -- stability ------------------------------------------------------------------------------------------------------


def test_networks_that_would_not_be_stable_are_scaled_down():
    module = make(n_ensemble=2, max_radius=0.9)
    with torch.no_grad():
        module.network_weight.normal_()
        module.network_weight[1].mul_(0.01)
    before = module.network_weight[1].clone()
    for _ in range(100):
        module.on_step(0.5)
    square = module.network()[..., module.regulators].detach()
    radius = torch.linalg.eigvals(square).abs().amax(-1)
    assert float(radius[0]) < 0.95
    assert torch.equal(before, module.network_weight[1]), "the stable one is left alone"


# -- counterfactuals ------------------------------------------------------------------------------------------------


@pytest.fixture
def fitted() -> InfoSEM:
    module = make(n_ensemble=2, n_grid=0).eval()
    with torch.no_grad():
        module.network_weight.normal_().mul_(0.4)
        module.input_mean.fill_(0.8)
        module.input_scale.fill_(0.5)
        module.residual_sd.fill_(0.3)
    return module


def under(module: InfoSEM, basal: Basal, codes: list[int], dose: float = 1.0) -> Counterfactual:
    n = len(basal.cells)
    return module.counterfactual(
        basal, Action(torch.tensor([codes]).expand(n, -1), torch.full((1, len(codes)), dose).expand(n, -1))
    )


@pytest.mark.parametrize("codes", [[0], [1], [0, 1], [0, -1]])
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_knock_out_is_the_solution_of_the_cut_graph(fitted, codes, shared):
    """Genes 2 (a regulator) and 4 (none): their states are those of no expression, all others follow their equations."""
    cells = cells_of([[-1, -1]] * 5)
    globals_ = fitted.draw_globals(2, cells)
    basal = fitted.abduct(cells, 2, globals_)
    own = torch.tensor([codes] * 5)
    # one action for all cells, or one for each
    action = Action(own[:1], own[:1].ge(0).float()).expand(5) if shared else Action(own, own.ge(0).float())
    found = fitted.counterfactual(basal, action)
    genes = [int(fitted.knocked_out[c]) for c in codes if c >= 0]
    for member in range(2):
        full = torch.zeros(G, G)
        full[REGULATORS] = globals_["A"][member]
        sign = float(fitted.sign(slice(member, member + 1)))
        noise = sign * basal.state[member] @ (torch.eye(G) - full)
        level = fitted.encoder(torch.full((1, 1), -0.8 / 0.5), slice(member, member + 1))[0]
        cut = full.clone()
        cut[:, genes] = 0.0
        noise[:, genes] = float(level)
        expected = noise @ torch.linalg.inv(torch.eye(G) - cut)
        torch.testing.assert_close(sign * found.state[member], expected, atol=1e-4, rtol=1e-4)
        loc, _ = fitted.expression(expected[None], slice(member, member + 1))
        loc = 0.8 + 0.5 * loc[0]
        loc[:, genes] = 0.0
        torch.testing.assert_close(found.expression.expectation("layer")[member], loc, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"posterior": "variational"}, {"likelihood": "normal"}, {"z_prior": "learned"}]
)
@pytest.mark.parametrize("codes", [[[-1]] * 5, [[0], [1], [-1], [2], [0]]])
@torch.no_grad()
def test_own_perturbation_gives_the_cell_back(options, codes):
    module = make(n_ensemble=2, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    cells = cells_of(codes)
    basal = module.abduct(cells, 5, module.draw_globals(5, cells))
    same = module.counterfactual(basal, cells.action).expression.replay(basal.noise)
    torch.testing.assert_close(same, cells.x.expand(5, -1, -1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_noise_of_a_knocked_out_gene_is_at_its_prior_mean(fitted):
    """Whatever was measured of the gene, its state had nothing been done is what its regulators make of it."""
    cells = cells_of([[0]] * 4)
    globals_ = fitted.draw_globals(2, cells)
    state = fitted.abduct(cells, 2, globals_).state
    z = state - state[..., REGULATORS] @ globals_["A"]
    torch.testing.assert_close(z[..., 2], torch.zeros(2, 4), atol=1e-5, rtol=0)
    assert (z[..., [0, 1, 3, 4, 5]].abs() > 1e-4).all()


@torch.no_grad()
def test_doses_are_shares_of_the_knock_out(fitted):
    cells = cells_of([[-1]] * 5)
    basal = fitted.abduct(cells, 2, fitted.draw_globals(2, cells))
    half, whole = (under(fitted, basal, [0], dose).state - basal.state for dose in (0.5, 1.0))
    torch.testing.assert_close(2 * half, whole, atol=1e-5, rtol=1e-5)
    assert (whole[..., 2] != 0).all()
    torch.testing.assert_close(under(fitted, basal, [0], 2.0).state, under(fitted, basal, [0]).state)


@torch.no_grad()
def test_genes_outside_the_vocabulary_by_their_position(fitted):
    cells = cells_of([[-1]] * 5)
    basal = fitted.abduct(cells, 2, fitted.draw_globals(2, cells))
    known = under(fitted, basal, [0]).state
    described = Action(torch.full((5, 1), -2), torch.ones(5, 1), torch.full((5, 1, 1), 3.0))
    torch.testing.assert_close(fitted.counterfactual(basal, described).state, known)
    assert not torch.equal(known, basal.state)
    assert torch.equal(under(fitted, basal, [2]).state, basal.state), "not the name of a gene"


@torch.no_grad()
def test_states_have_the_sign_with_which_they_rise_with_expression():
    """A member and its mirror image, whose states are the negative, say the same."""
    module = make(n_ensemble=2, n_grid=0).eval()
    module.network_weight[1] = module.network_weight[0]
    for curve in (module.encoder, module.decoder):
        for parameter in curve.parameters():
            parameter[1] = parameter[0]
    module.encoder.weights[-1][1, :, 0] *= -1
    module.encoder.weights[-1][..., 1], module.encoder.biases[-1][..., 1] = 0.0, -40.0  # hardly any noise
    module.decoder.weights[0][1] *= -1
    cells = cells_of([[-1]] * 5)
    basal = module.abduct(cells, 2, module.draw_globals(2, cells))
    assert {float(s) for s in module.sign().flatten()} == {-1.0, 1.0}
    torch.testing.assert_close(basal.state[0], basal.state[1], atol=0.05, rtol=0)
    ends = torch.tensor([[-1.0, 1.0]]).expand(2, -1)
    low, high = (module.sign()[:, 0] * module.encoder(ends)[0]).unbind(-1)
    assert (high > low).all()
    expression = under(module, basal, [0]).expression.expectation("layer")
    torch.testing.assert_close(expression[0], expression[1], atol=0.05, rtol=0)


@torch.no_grad()
def test_log_weights_give_the_marginal_density():
    """One gene without regulators and a linear decoder: x ~ N(0, b² + s²) on the standardized scale."""
    module = InfoSEM(
        1, 1, regulators=np.array([0]), knocked_out=np.array([0]), hidden=(), n_grid=0, native_scale="log1p"
    ).eval()
    slope, residual, mean, unit = 1.5, 0.6, 2.0, 0.7
    module.decoder.weights[0].fill_(slope)
    variance = 1 / (1 + slope**2 / residual**2)
    module.encoder.weights[0].copy_(torch.tensor([[[variance * slope / residual**2, 0.0]]]))
    module.encoder.biases[0].copy_(torch.tensor([[[0.0, math.log(1.2 * variance)]]]))  # not quite the posterior
    module.residual_sd.fill_(residual)
    module.input_mean.fill_(mean)
    module.input_scale.fill_(unit)
    y = torch.linspace(0.5, 3.5, 7)[:, None]
    zeros = torch.zeros(7, dtype=torch.long)
    codes = torch.full((7, 1), -1)
    library = torch.full((7, 1), 5e3)
    cells = Cells(torch.expm1(y) * 0.5, Action(codes, codes * 0.0), zeros, zeros, library)
    torch.manual_seed(0)
    weights = module.log_weights(cells, 4000, module.draw_globals(4000, cells))
    expected = torch.distributions.Normal(mean, unit * math.hypot(slope, residual)).log_prob(y)[:, 0]
    torch.testing.assert_close(torch.logsumexp(weights, 0) - math.log(4000), expected, atol=0.02, rtol=0)
    knocked_out = Cells(cells.x, Action(codes + 1, codes + 2.0), zeros, zeros, library)
    flat = module.log_weights(knocked_out, 4000, module.draw_globals(4000, cells))
    assert float((torch.logsumexp(flat, 0) - torch.logsumexp(weights, 0)).max()) < -0.5


@torch.no_grad()
def test_log_weights_average_over_the_ensemble(fitted):
    """Members take the draws in turn, each with its own network: the density is their mean."""
    cells = cells_of([[-1]] * 3 + [[0]] * 2)
    globals_ = fitted.draw_globals(8000, cells)
    both = fitted.log_weights(cells, 8000, globals_)
    alone = []
    for member in range(2):
        own = {name: value[member : member + 1] for name, value in globals_.items()}
        alone.append(fitted.log_weights(cells, 4000, own))
        error = (2 / 4000) ** 0.5 * alone[-1].std(0)
        assert ((both[member::2].mean(0) - alone[-1].mean(0)).abs() < 5 * error).all()
    assert float(((alone[0] - alone[1]).mean(0).abs() / error).max()) > 20, "the members differ"
