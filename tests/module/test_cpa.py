"""CPA as its equations: embeddings add up, responses rise with the dose, and the adversary moves the encoder alone."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pertura.module import CPA, Action, Cells

N, GENES, PERTURBATIONS, CONTEXTS = 60, 12, 4, 3


def _cells(order=2):
    torch.manual_seed(0)
    codes = torch.randint(-1, PERTURBATIONS, (N, order))
    x = torch.poisson(torch.full((N, GENES), 3.0))
    action = Action(codes, (codes >= 0).float())
    return Cells(x, action, torch.arange(N) % CONTEXTS, torch.zeros(N).long(), x.sum(1, keepdim=True))


def _module(**options):
    torch.manual_seed(1)
    return CPA(
        GENES, PERTURBATIONS, CONTEXTS, **{"n_latent": 3, "n_hidden": 8, "discriminator_hidden": (8,), **options}
    )


def _loss(module, cells):
    return Trace_ELBO(max_plate_nesting=1).differentiable_loss(module.model, module.guide, cells)


@pytest.mark.parametrize("options", [{}, {"n_layers": 0, "basal_sd": 0.1}, {"likelihood": "normal", "n_layers": 2}])
def test_every_parameter_but_the_discriminators_has_a_finite_gradient(options):
    module = _module(**options)
    cells = _cells()
    cells.action.dose = 0.5 * cells.action.dose
    _loss(module, cells).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if not name.startswith("discriminators.")}
    idle = {name for name, g in gradients.items() if g is None or not g.any()}
    assert idle == ({"encoder.log_variance.weight", "encoder.log_variance.bias"} if "basal_sd" in options else set())
    assert all(g.isfinite().all() for name, g in gradients.items() if name not in idle)
    assert not list(pyro.get_param_store().keys())


def test_combinations_are_sums_of_embeddings():
    module = _module()
    v = module.embedding_perturbation.detach()
    action = Action(torch.tensor([[0, 2], [1, -1], [-1, -1]]), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(module.shift(action).detach(), torch.stack([v[0] + v[2], v[1], 0 * v[0]]))


def test_the_dose_response_rises_from_zero_to_one_whatever_its_shape():
    module = _module()
    dose = torch.linspace(0.0, 1.0, 21)[:, None].expand(-1, PERTURBATIONS)
    codes = torch.arange(PERTURBATIONS).expand(21, -1)
    with torch.no_grad():
        module.dose_log_k.copy_(torch.tensor([-2.0, 0.0, 1.0, 2.0]))
        module.dose_log_n.copy_(torch.tensor([1.0, 0.5, 0.0, -0.5]))
        strength = module.strength(Action(codes, dose))
    assert (strength.diff(dim=0) > 0).all()
    torch.testing.assert_close(strength[[0, -1]], torch.stack([torch.zeros(4), torch.ones(4)]))
    assert strength[10].max() - strength[10].min() > 0.3


def test_contexts_without_training_cells_have_the_mean_embedding():
    module = _module()
    module.set_contexts(torch.tensor([True, False, True]))
    with torch.no_grad():
        found, c = module.context(torch.arange(5)), module.embedding_context
    torch.testing.assert_close(found[[0, 2]], c[[0, 2]])
    torch.testing.assert_close(found[[1, 3, 4]], c[[0, 2]].mean(0).expand(3, -1))


def test_discriminators_are_told_the_members_or_that_there_are_none():
    action = Action(
        torch.tensor([[0, 2], [1, -1], [-1, -1], [3, -1]]), torch.tensor([[1.0, 0.5], [1, 0], [0, 0], [0, 0]])
    )
    expected = torch.tensor([[0.5, 0, 0.5, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]])
    torch.testing.assert_close(_module().members(action), expected)


def test_the_adversary_raises_the_loss_of_the_discriminators_in_training_only():
    """Following the gradient of the adversary alone, the encoder makes cells harder to recognize."""
    cells, module = _cells(), _module()
    pyro.set_rng_seed(0)
    without = _loss(module, cells)
    module.adversary_share = 1.0
    pyro.set_rng_seed(0)
    term = _loss(module, cells) - without
    torch.testing.assert_close(
        term, -GENES * module.discriminator_loss(module.discriminator_input(cells), cells)[0].sum()
    )
    module.eval()
    pyro.set_rng_seed(0)
    torch.testing.assert_close(_loss(module, cells), without)
    only = [p for name, p in module.named_parameters() if name.startswith("encoder.")]
    for p, gradient in zip(only, torch.autograd.grad(term, only, allow_unused=True), strict=True):
        p.data -= 1e-6 * (0.0 if gradient is None else gradient)
    after = module.discriminator_loss(module.discriminator_input(cells), cells)[0].sum()
    assert -GENES * after < term
