"""Equations of PerturbX."""

from __future__ import annotations

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO

from pertura.module import Action, PerturbX


def _module(**options) -> PerturbX:
    torch.manual_seed(0)
    default = {"n_selected": 4, "n_candidates": 12, "n_members": 3, "n_latent": 2, "n_hidden": 5, "rank": None}
    module = PerturbX(
        **{**default, "dropout_rate": 0.0, "residual": False, **options},
        n_genes=12,
        n_contexts=4,
        max_dose=np.ones(2),
        native_scale="layer",
    )
    return module


def _bags(n_bags: int = 3, size: int = 6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_bags, size, 12, generator=generator)
    e = torch.eye(2)[torch.arange(n_bags) % 2]
    effect = torch.randn(n_bags, 12, generator=generator)
    return x, e, torch.arange(n_bags) % 4, effect, torch.zeros(n_bags, 12)


def test_prediction_does_not_depend_on_the_order_of_cells():
    for aggregation in ("mean", "attention", "gated"):
        module = _module(aggregation=aggregation)
        x, e, *_ = _bags()
        u = x[:, :, module.selector.chosen()]
        order = torch.randperm(x.shape[1])
        z = module.aggregation(module.encode(u, e))
        torch.testing.assert_close(module.aggregation(module.encode(u[:, order], e)), z)
        weights = module.aggregation.weights(module.encode(u, e))
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))


def test_members_are_shown_with_their_dose():
    action = Action(
        torch.tensor([[0, -1], [0, 1], [1, -1], [-1, -1]]), torch.tensor([[1.0, 0], [0.1, 0.5], [0.0, 0], [0, 0]])
    )
    expected = torch.tensor([[1.0, 0.0], [np.log2(1.1), np.log2(1.5)], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float32)
    torch.testing.assert_close(_module().indicator(action), expected)


def test_gradients_reach_every_parameter():
    module = _module(aggregation="gated")
    module.on_step(0.5)
    loss = Trace_ELBO().differentiable_loss(module.model, module.guide, *_bags())
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_loss_is_the_formula_of_the_paper():
    """Weighted squared error plus the complexity of the cells, per bag; the choice has no divergence."""
    module = _module(n_members=1, beta=0.3, duplicate_penalty=0.0, entropy_penalty=0.0)
    # a decided selector: what it draws is known
    with torch.no_grad():
        module.selector.logits.fill_(-50.0)
        module.selector.logits[0, range(4), [1, 3, 5, 7]] = 50.0
        module.effect_sd.copy_(torch.linspace(0.5, 2.0, 12))
    module.on_step(1.0)
    x, e, context, effect, mean = _bags()
    loss = Trace_ELBO().differentiable_loss(module.model, module.guide, x, e, context, effect, mean)
    z = module.encode(x[:, :, [1, 3, 5, 7]][:, :, None], e)
    predicted = module.decode(module.aggregation(z), e)[:, 0]
    sd = module.effect_sd
    expected = (0.5 * ((effect - predicted) / sd) ** 2 + sd.log() + 0.5 * np.log(2 * np.pi)).sum()
    expected = expected + 0.3 * z.square().sum(-1).mean(1).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)


def test_one_choice_for_all_cells_of_a_bag():
    module = _module()
    trace = pyro.poutine.trace(module.guide).get_trace(*_bags())
    M = trace.nodes["M"]["value"]
    assert M.shape == (3, 3, 4, 12)  # bags, members, rows, genes: no dimension of cells
    torch.testing.assert_close(M.sum(-1), torch.ones(3, 3, 4))
    assert not torch.allclose(M[0], M[1])


def test_members_do_not_see_their_fold():
    module = _module(residual=True, n_folds=3)
    module.fold.copy_(torch.tensor([0, 1, 2, -1]))
    assert module.left_out(torch.arange(4)).tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [False, False, False],
    ]
    x, e, _, effect, mean = _bags(1)
    with torch.no_grad():  # the decoder starts at no deviation
        torch.nn.init.normal_(module.decoder_out.weight)
    loss = Trace_ELBO().differentiable_loss(module.model, module.guide, x, e, torch.tensor([1]), effect, mean)
    loss.backward()
    moved = module.decoder_out.weight.grad.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == [True, False, True]


def test_the_penalty_undoes_rows_that_agree():
    """Rows start on one gene; where the effects say nothing, only the penalty moves them."""
    left = []
    for penalty in (0.0, 1.0):
        module = _module(n_members=1, duplicate_penalty=penalty, entropy_penalty=0.0, beta=0.0)
        with torch.no_grad():
            module.effect_sd.fill_(1e3)
            module.selector.logits.normal_(0, 0.01)
            module.selector.logits[..., 0] = 4.0
        optimizer = torch.optim.SGD([module.selector.logits], lr=0.5)
        for _ in range(100):
            optimizer.zero_grad()
            Trace_ELBO().differentiable_loss(module.model, module.guide, *_bags()).backward()
            optimizer.step()
        left.append(float(module.selector.duplicates().detach()))
    assert left[0] > 1.0
    assert left[1] < 0.5 * left[0]
