"""InfoSEM: the densities of the paper, reductions of one model to another, do(g) in closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pertura.module import Action, Cells, InfoSEM
from pertura.module._infosem import Inputs
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


def similarity() -> np.ndarray:
    return np.random.default_rng(1).uniform(size=(len(REGULATORS), G)).astype(np.float32)


@pytest.fixture
def inputs() -> Inputs:
    torch.manual_seed(2)
    return Inputs(torch.randn(1, 10, G), None)


def loss(module: InfoSEM, inputs: Inputs) -> float:
    torch.manual_seed(3)
    return float(TraceMeanField_ELBO().differentiable_loss(module.model, module.guide, inputs))


def share_networks(target: InfoSEM, source: InfoSEM) -> None:
    target.encoder.load_state_dict(source.encoder.state_dict())
    target.decoder.load_state_dict(source.decoder.state_dict())


# -- densities ------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_deepsem(inputs):
    """Squared error, divergence of z, and alpha times mean |A| over all G x G pairs, per gene."""
    module = make(alpha=50.0, beta=0.7)
    weight = module.network()
    loc, sd = module.noise_posterior(inputs.x, weight)
    torch.manual_seed(3)
    z = loc + sd * torch.randn_like(loc)
    found, _ = module.expression(propagate(z, weight, module.regulators))
    error = (inputs.x - found).square().sum()
    divergence = 0.5 * (loc.square() + sd.square() - 1 - 2 * sd.log()).sum()
    penalty = 50.0 * float(weight.abs().sum()) / G**2 * G * 10
    constant = 10 * G * 0.5 * math.log(math.pi)
    # the normalisation of the Laplace density is constant too
    scale = G / (40 * 50.0)
    constant += 10 / 40 * math.log(2 * scale) * len(REGULATORS) * G
    expected = float(error + 0.7 * divergence) + penalty + constant
    assert loss(module, inputs) == pytest.approx(expected, rel=1e-5)


def test_sparsity_waits(inputs):
    module = make(alpha=50.0, sparsity_delay=0.5)
    module.progress = 0.4
    before = loss(module, inputs)
    with torch.no_grad():
        module.network_weight.neg_()
        negative = loss(module, inputs)
        module.network_weight.neg_()
    module.progress = 0.6
    assert loss(module, inputs) != pytest.approx(before, abs=1.0)
    module.alpha = 5000.0
    module.progress = 0.4
    assert loss(module, inputs) == pytest.approx(before, rel=1e-5)
    assert negative != before


@pytest.mark.parametrize(
    "options", [{}, {"z_prior": "learned"}, {"likelihood": "normal"}, {"posterior": "variational"}]
)
@pytest.mark.parametrize("prior", ["none", "embedding", "edges"])
def test_every_parameter_gets_a_gradient(inputs, options, prior):
    if prior != "none":
        options = {**options, "embedding": embedding(), "similarity": similarity()}
    if prior == "edges":
        options["known"] = np.sign(np.random.default_rng(0).normal(size=(3, G))).astype(np.int8)
    module = make(n_ensemble=2, **options)
    two = replace(inputs, x=inputs.x.repeat(2, 1, 1))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("prior_"):
                parameter.normal_()
    value = TraceMeanField_ELBO().differentiable_loss(module.model, module.guide, two)
    value.backward()
    assert torch.isfinite(value)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_members_do_not_see_each_other(inputs):
    """The gradients of one member are the same whatever the other is."""
    module = make(n_ensemble=2)
    gradients = []
    for factor in (1.0, -2.0):
        with torch.no_grad():
            module.network_weight[1].mul_(factor)
        module.zero_grad()
        torch.manual_seed(3)
        two = Inputs(inputs.x.repeat(2, 1, 1), None)
        TraceMeanField_ELBO().differentiable_loss(module.model, module.guide, two).backward()
        gradients.append(module.network_weight.grad[0].clone())
    torch.testing.assert_close(*gradients)


def test_a_knocked_out_gene_has_a_flat_prior(inputs):
    module = make()
    intervened = torch.zeros(10, G, dtype=torch.bool)
    intervened[3, 2] = True
    trace = poutine.trace(poutine.condition(module.model, {"A_e": module.network_weight})).get_trace(
        replace(inputs, intervened=intervened)
    )
    sd = trace.nodes["z"]["fn"].base_dist.scale[0]
    assert sd[3, 2] == 10.0 and (sd != 1).sum() == 1


# -- reductions -----------------------------------------------------------------------------------------------------


def test_without_what_embeddings_say_b_is_deepsem(inputs):
    plain, described = make(), make(embedding=embedding(), similarity=similarity())
    share_networks(described, plain)
    with torch.no_grad():
        described.network_weight.copy_(plain.network_weight)
    assert not described.prior_mean().any()
    assert loss(described, inputs) == pytest.approx(loss(plain, inputs), rel=1e-6)
    with torch.no_grad():
        described.prior_kernel.fill_(1.0)
    assert loss(described, inputs) != pytest.approx(loss(plain, inputs), rel=1e-6)


def test_prior_mean_is_additive_and_pairwise():
    module = make(embedding=embedding(), similarity=similarity())
    with torch.no_grad():
        for parameter in (module.prior_source, module.prior_target, module.prior_kernel):
            parameter.normal_()
    h, k = torch.as_tensor(embedding()), torch.as_tensor(similarity())
    found = module.prior_mean()[0]
    for row, i in enumerate(REGULATORS):
        for j in range(G):
            expected = (
                h[i] @ module.prior_source[0] + h[j] @ module.prior_target[0] + module.prior_kernel[0] * k[row, j]
            )
            expected = 0.0 if i == j else float(expected) / (G - 1)
            assert float(found[row, j]) == pytest.approx(expected, abs=1e-6)


def test_without_labels_bc_is_b(inputs):
    """A = A_e / 2 with all pairs unknown: with twice A_e and twice its prior sd, the loss differs by a constant."""
    b = make(embedding=embedding(), alpha=50.0)
    bc = make(embedding=embedding(), alpha=25.0, known=np.zeros((3, G), np.int8))
    share_networks(bc, b)
    differences = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            b.network_weight.copy_(0.1 * torch.randn_like(b.network_weight))
            b.prior_source.normal_()
            bc.network_weight.copy_(2 * b.network_weight)
            bc.prior_source.copy_(2 * b.prior_source)
        torch.testing.assert_close(bc.network(), b.network())
        differences.append(loss(bc, inputs) - loss(b, inputs))
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


def cells_of(codes: list[list[int]]) -> Cells:
    torch.manual_seed(4)
    n = len(codes)
    action = Action(torch.tensor(codes), torch.tensor(codes).ge(0).float())
    zeros = torch.zeros(n, dtype=torch.long)
    return Cells(torch.rand(n, G) + 0.5, action, zeros, zeros, torch.ones(n, 1))


@pytest.fixture
def fitted() -> InfoSEM:
    module = make(n_ensemble=2, n_grid=0).eval()
    with torch.no_grad():
        module.network_weight.normal_().mul_(0.4)
        module.input_mean.fill_(0.8)
        module.input_scale.fill_(0.5)
        module.residual_sd.fill_(0.3)
    return module


@pytest.mark.parametrize("codes", [[0], [1], [0, 1]])
@torch.no_grad()
def test_knock_out_is_the_solution_of_the_cut_graph(fitted, codes):
    """Genes 2 (a regulator) and 4 (none): their states are those of no expression, all others follow their equations."""
    cells = cells_of([[-1, -1]] * 5)
    globals_ = fitted.draw_globals(2)
    basal = fitted.abduct(cells, 2, globals_)
    asked = Action(torch.tensor([codes]).expand(5, -1), torch.ones(5, len(codes)))
    z = fitted.act(basal, asked, globals_)
    genes = [int(fitted.knocked_out[c]) for c in codes]
    for member in range(2):
        full = torch.zeros(G, G)
        full[REGULATORS] = globals_["weight"][member]
        sign = float(fitted.sign(slice(member, member + 1)))
        state = sign * z[member] @ torch.linalg.inv(torch.eye(G) - full)
        level = fitted.encoder(torch.full((1, 1), -0.8 / 0.5), slice(member, member + 1))[0]
        cut = full.clone()
        cut[:, genes] = 0.0
        noise = sign * basal.z[member].clone()
        noise[:, genes] = float(level)
        torch.testing.assert_close(state, noise @ torch.linalg.inv(torch.eye(G) - cut), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_done_gives_the_cell_back(fitted):
    cells = cells_of([[-1]] * 5)
    globals_ = fitted.draw_globals(4)
    basal = fitted.abduct(cells, 4, globals_)
    same = fitted.express(fitted.act(basal, cells.action, globals_), basal, cells.action, globals_)
    torch.testing.assert_close(same, cells.x.expand(4, -1, -1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_doses_are_shares_of_the_knock_out(fitted):
    cells = cells_of([[-1]] * 5)
    globals_ = fitted.draw_globals(2)
    basal = fitted.abduct(cells, 2, globals_)
    shifts = []
    for dose in (0.5, 1.0):
        action = Action(torch.zeros(5, 1, dtype=torch.long), torch.full((5, 1), dose))
        shifts.append(fitted.act(basal, action, globals_) - basal.z)
    torch.testing.assert_close(2 * shifts[0], shifts[1], atol=1e-5, rtol=1e-5)
    assert (shifts[1][..., 2] != 0).all() and not shifts[1][..., [0, 1, 3, 4, 5]].any()


@torch.no_grad()
def test_genes_outside_the_vocabulary_by_their_position(fitted):
    cells = cells_of([[-1]] * 5)
    globals_ = fitted.draw_globals(2)
    basal = fitted.abduct(cells, 2, globals_)
    one = torch.ones(5, 1)
    known = Action(torch.zeros(5, 1, dtype=torch.long), one)
    described = Action(torch.full((5, 1), -2), one, torch.full((5, 1, 1), 3.0))
    torch.testing.assert_close(fitted.act(basal, known, globals_), fitted.act(basal, described, globals_))
    no_gene = Action(torch.full((5, 1), 2), one)
    assert torch.equal(fitted.act(basal, no_gene, globals_), basal.z)
