"""Model and guide of DrugAAE: what they share, what is left out of them, and who optimizes what."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import sparse

from pertura.module import Action, Cells, DrugAAE
from pertura.module._drugaae import ClosedForm
from pertura.nn import DescriptionEncoder, GeneEmbedding
from pertura.train import AdversarialPlan

N, GENES, DRUGS, CONTEXTS = 40, 12, 5, 2


def make(**options) -> DrugAAE:
    torch.manual_seed(0)
    settings = {"n_text": 3, "n_state": 4, "n_effect_components": GENES, "n_gene_embedding": 6, "encoder_hidden": (8,)}
    module = DrugAAE(GENES, DRUGS, CONTEXTS, **{**settings, **options})
    closed = module.closed_form
    closed.basis.copy_(torch.eye(GENES)[:, : module.closed_form.n_components])
    closed.measured.fill_(True)
    for name in ("effects", "common", "left_out", "weight", "intercept"):
        getattr(closed, name).normal_()
    module.features.normal_()
    module.own_signature.normal_()
    return module


def make_cells(**options) -> Cells:
    rng = np.random.default_rng(0)
    codes = torch.as_tensor(rng.integers(-1, DRUGS, size=(N, 1)))
    x = torch.as_tensor(rng.poisson(3.0, size=(N, GENES)), dtype=torch.float32)
    context = torch.as_tensor(rng.integers(0, CONTEXTS, N))
    given = {"action": Action(codes, (codes >= 0).float()), "context": context, "batch": torch.zeros(N).long()}
    return Cells(x, library=x.sum(1, keepdim=True), **{**given, **options})


def states(trace) -> torch.Tensor:
    return trace.nodes["state"]["value"]


def test_guide_and_model_see_perturbations_in_the_same_way(monkeypatch):
    """In training both treat the same perturbations as unmeasured, with the same parts of their descriptions."""
    module, cells = make().train(), make_cells()
    seen = []
    describe = module.describe
    monkeypatch.setattr(module, "describe", lambda *a, **k: seen.append(describe(*a, **k)) or seen[-1])
    for _ in range(5):
        seen.clear()
        Trace_ELBO().differentiable_loss(module.model, module.guide, cells)
        (one, other), (again, and_other) = seen
        assert torch.equal(one, again) and torch.equal(other, and_other)
    # and not always the same ones
    effects = {
        float(describe(cells.action, cells.context, module.genes(), module.draw_lots())[1].sum()) for _ in range(9)
    }
    assert len(effects) > 1
    # the lots are no part of the density
    lots = [pyro.poutine.trace(p).get_trace(cells).nodes["lots"] for p in (module.guide, module.model)]
    assert all(float(site["fn"].log_prob(site["value"])) == 0.0 for site in lots)
    assert module.eval().draw_lots() is None


def test_a_perturbation_treated_as_unmeasured_knows_nothing_of_its_own_cells():
    """Neither its measured effect nor a signature of its cells, but what all others predict of it."""
    module, action = make(), Action(torch.tensor([[1]]), torch.ones(1, 1))
    context, every = torch.zeros(1).long(), torch.ones(DRUGS, dtype=torch.bool)
    with torch.no_grad():
        ask = lambda **k: module.eval().describe(action, context, module.genes(), **k)  # noqa: E731
        own, as_new = ask(), ask(unmeasured=every)
        torch.testing.assert_close(own[1][0], module.closed_form.effects[1, 0])
        torch.testing.assert_close(as_new[1][0], module.closed_form.left_out[1] + module.closed_form.common[0])
        module.own_signature[1] *= -1.0
        module.closed_form.effects[1] += 1.0
        assert not torch.equal(ask()[0], own[0]) and not torch.equal(ask()[1], own[1])
        changed = ask(unmeasured=every)
        assert torch.equal(changed[0], as_new[0]) and torch.equal(changed[1], as_new[1])
        # without vectors, the effect in closed form is all there is
        assert (ask(unmeasured=every, vector_share=0.0)[0] == 0).all()
        # a perturbation outside of the vocabulary is what its features say
        module.vector_share.fill_(0.0)
        new = Action(torch.tensor([[-2]]), torch.ones(1, 1), module.features[None, 1:2])
        closed = module.closed_form
        torch.testing.assert_close(
            module.describe(new, context, module.genes())[1][0],
            closed.common[0] + closed.intercept + module.features[1] @ closed.weight,
        )


def test_registered_signatures_are_kept_by_perturbations_treated_as_unmeasured():
    module = make(n_text=0, signatures=[range(GENES)]).eval()
    action, every = Action(torch.tensor([[1]]), torch.ones(1, 1)), torch.ones(DRUGS, dtype=torch.bool)
    with torch.no_grad():
        own = module.describe(action, torch.zeros(1).long(), module.genes())
        as_new = module.describe(action, torch.zeros(1).long(), module.genes(), unmeasured=every)
        torch.testing.assert_close(own[0], as_new[0])
        assert (own[0] != 0).any()


def test_the_effect_is_taken_off_before_the_guide_and_added_after_the_decoder():
    """A cell that is moved by exactly its closed-form effect has the basal state of the cell that was not."""
    module = make(likelihood="normal").eval()
    control = make_cells(action=Action(torch.full((N, 1), -1), torch.zeros(N, 1)))
    moved = make_cells(action=Action(torch.ones(N, 1).long(), torch.ones(N, 1)))
    with torch.no_grad():
        effect = module.closed_form.effects[1][control.context]
        moved.x = control.x + effect
        found = [pyro.poutine.trace(module.guide).get_trace(c).nodes["z"]["fn"].base_dist.loc for c in (control, moved)]
        torch.testing.assert_close(*found)
        z = {"z": found[0]}
        mean = [
            pyro.poutine.trace(pyro.condition(module.model, data=z)).get_trace(c).nodes["x"]["fn"].mean
            for c in (control, moved)
        ]
        shift, _ = module.describe(moved.action, moved.context, module.genes())
        decoded = [
            module.likelihood.loc.bias * 0 + module.decode(s, moved.batch, module.genes())
            for s in (z["z"], z["z"] + shift)
        ]
        torch.testing.assert_close(mean[1] - mean[0], effect + decoded[1] - decoded[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["nb", "normal"])
def test_zero_dose_is_no_effect_and_own_perturbation_gives_the_cell_back(likelihood):
    module, cells = make(likelihood=likelihood).eval(), make_cells()
    with torch.no_grad():
        nothing = Action(cells.action.codes.clamp(min=0), torch.zeros(N, 1))
        shift, effect = module.describe(nothing, cells.context, module.genes())
        assert (shift == 0).all() and (effect == 0).all()
        basal = module.abduct(cells, 3, {})
        same = module.counterfactual(basal, cells.action).expression.conditional_mean(
            basal.noise, "counts" if likelihood == "nb" else "layer", cells.library
        )
        torch.testing.assert_close(same, cells.x.expand_as(same), atol=1e-5, rtol=1e-5)
        # in an unknown context too
        there = make_cells(context=torch.full((N,), CONTEXTS))
        assert torch.isfinite(states(pyro.poutine.trace(module.model).get_trace(there))).all()


@pytest.mark.parametrize(
    "options", [{}, {"n_effect_components": 0}, {"n_text": 0, "has_ppi": True}, {"likelihood": "normal"}]
)
def test_every_setting_has_finite_gradients(options):
    module, cells = make(**options).train(), make_cells()
    if options.get("has_ppi"):
        module.genes.set_network(sparse.random(GENES, GENES, 0.3, random_state=0))
    module.adversary_share = 1.0
    Trace_ELBO().differentiable_loss(module.model, module.guide, cells).backward()
    grads = {n: p.grad for n, p in module.named_parameters()}
    assert [n for n, g in grads.items() if g is None] == []
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert not list(pyro.get_param_store().keys())


def test_propagation_is_the_dense_formula():
    rng = np.random.default_rng(0)
    network = sparse.random(12, 12, 0.2, random_state=0)
    network = network + network.T
    layer = GeneEmbedding(12, 5, n_loadings=3, n_free=2, n_steps=3)
    layer.set_network(network)
    layer.loadings.copy_(torch.as_tensor(rng.normal(size=(12, 3))))
    with torch.no_grad():
        layer.step_logits.copy_(torch.tensor([0.3, -1.0, 0.5]))
        dense = network.toarray()
        np.fill_diagonal(dense, 1.0)
        degree = np.diag(dense.sum(1) ** -0.5)
        a = torch.as_tensor(degree @ dense @ degree, dtype=torch.float32)
        start = layer.mix(torch.cat([layer.free, layer.loadings], 1))
        gamma = layer.step_logits.softmax(0)
        expected = start + gamma[0] * a @ start + gamma[1] * a @ a @ start + gamma[2] * a @ a @ a @ start
        torch.testing.assert_close(layer(), expected)


def test_what_is_missing_of_a_description_is_left_out():
    torch.manual_seed(0)
    encoder, embedding = DescriptionEncoder(5, 3, 4), torch.randn(12, 5)
    signature, text = torch.randn(3, 12), torch.randn(3, 3)
    signature[1], text[2] = 0.0, 0.0  # row 1 has a text alone, row 2 a signature alone
    v, s, t = encoder(signature, text, embedding)
    gate = torch.sigmoid(encoder.gate(torch.cat([s, t], -1)))[0]
    torch.testing.assert_close(v, torch.stack([gate * s[0] + (1 - gate) * t[0], t[1], s[2]]))
    assert (encoder(torch.zeros(1, 12), torch.zeros(1, 3), embedding)[0] == 0).all()
    # the lot takes either away from those that have both, and from them alone
    for lot, first in ((0.1, t[0]), (0.4, s[0]), (0.9, v[0])):
        found = encoder(signature, text, embedding, torch.full((3,), lot), (0.3, 0.3))[0]
        torch.testing.assert_close(found, torch.stack([first, t[1], s[2]]))


def test_every_parameter_is_in_exactly_one_optimizer():
    module = make()
    plan = AdversarialPlan(module)
    plan._trainer = SimpleNamespace(max_epochs=3)
    first, second = plan.configure_optimizers()
    groups = [[id(p) for g in o.param_groups for p in g["params"]] for o in (first, second)]
    assert sorted(groups[0] + groups[1]) == sorted(id(p) for p in module.parameters())
    assert set(groups[1]) == {id(p) for p in module.discriminator.parameters()}


def test_adversary_counts_from_its_own_steps():
    plan = AdversarialPlan(make(), warmup_start=0.2, warmup_end=0.6)
    assert [plan.adversary_share(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_sources_that_are_missing_are_average():
    closed = ClosedForm(n_genes=4, n_perturbations=2, n_contexts=1, n_features=3, n_components=4)
    closed.weight.copy_(torch.randn(3, 4))
    closed.feature_center.copy_(torch.tensor([2.0, -1.0, 5.0]))
    closed.feature_block.copy_(torch.tensor([0, 0, 1]))
    asked = torch.tensor([[[0.0, 0.0, 1.0]], [[2.0, -1.0, 1.0]], [[0.0, -1.0, 1.0]]])
    no, code = torch.zeros(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.long)
    found = closed(code, asked, code[:, 0], no, no, torch.ones(3, 1))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])  # a single 0 is a value


def test_effects_predicted_from_features_have_an_amplitude_of_their_own_in_each_context_and_at_middle_doses():
    closed = ClosedForm(n_genes=4, n_perturbations=2, n_contexts=2, n_features=3, n_components=4)
    closed.weight.copy_(torch.randn(3, 4))
    closed.common.copy_(torch.randn(3, 4))
    closed.amplitude.copy_(torch.tensor([[1.0, 0.0], [0.25, 0.5], [0.5, 0.0]]))
    asked, no, code = torch.randn(1, 1, 3), torch.zeros(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.long)
    predicted = (asked @ closed.weight)[0, 0]
    for strength, amplitude in ((1.0, (1.0, 0.25, 0.5)), (0.5, (0.5, 0.625, 0.25))):
        found = closed(code, asked, torch.arange(3), no, no, torch.full((3, 1), strength))[:, 0]
        expected = torch.stack([strength * c + a * predicted for c, a in zip(closed.common, amplitude, strict=True)])
        torch.testing.assert_close(found, expected)
