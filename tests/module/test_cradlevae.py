"""The artifact's loss and weights are those of the paper; what failed cells have in common can be taken away."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO

from pertura.module import CRADLEVAE, Action, Cells
from pertura.module._artifact import Artifact

N, GENES, PERTURBATIONS = 48, 9, 3


def _cells(rows=slice(None)):
    rng = np.random.default_rng(0)
    codes = torch.as_tensor(rng.integers(-1, PERTURBATIONS, size=(N, 1)))
    x = torch.as_tensor(rng.poisson(4.0, size=(N, GENES)), dtype=torch.float32)
    qc = torch.as_tensor(rng.random((N, 1)) < 0.25).float()
    x, codes, qc, zero = x[rows], codes[rows], qc[rows], torch.zeros(N).long()[rows]
    return Cells(x, Action(codes, (codes >= 0).float()), zero, zero, x.sum(1, keepdim=True), qc)


def _module(**options):
    torch.manual_seed(1)
    module = CRADLEVAE(GENES, PERTURBATIONS, **{"n_latent": 3, "n_hidden": 8, **options})
    module.n_train = N
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
        if module.gene_effects is not None:
            module.gene_effects.measured.mean.normal_()
            module.gene_effects.measured.sd.fill_(0.1)
            module.gene_effects.measured.measured.fill_(True)
            module.gene_effects.is_counts = False
    return module


def _loss(module, cells, particles=1):
    torch.manual_seed(0)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    return elbo.differentiable_loss(module.model, module.guide, cells)


def test_the_counterfactual_loss_is_the_energy_distance_of_failed_from_passed_cells():
    """Within each perturbation, of different cells, weighted by the number of failed ones; mean over draws."""
    module, cells = _module(), _cells()
    z = torch.randn(2, N, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    group = torch.where(cells.action.present[:, 0], cells.action.codes[:, 0] + 1, 0)
    at = cells.qc[:, 0] > 0
    for own in (0, 1, 3):
        at[torch.where(group == own)[0][:3]] = True
    at[group == 2] = False  # a perturbation none of whose cells failed has no loss
    cells = replace(cells, qc=at[:, None].float())
    expected = 0.0
    for draw in z:
        for own in group[at].unique():
            f, p = draw[(group == own) & at], draw[(group == own) & ~at].detach()
            assert len(f) > 1 < len(p)
            across, ff, pp = ((a[:, None] - b).norm(dim=-1) for a, b in ((f, p), (f, f), (p, p)))
            # the diagonal is 0, and no pair
            means = 2 * across.mean() - ff.sum() / (len(f) * (len(f) - 1)) - pp.sum() / (len(p) * (len(p) - 1))
            expected = expected + len(f) * means / len(z)
    found = module.artifact.divergence(cells, z)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (moved,) = torch.autograd.grad(found, z)
    assert (moved[:, at] != 0).any() and not moved[:, ~at].any()  # passed cells stay
    alone = at & (torch.cumsum(at, 0) == 1)
    assert module.artifact.divergence(replace(cells, qc=alone[:, None].float()), z) == 0


@pytest.mark.parametrize("particles", [1, 4])
def test_the_counterfactual_loss_is_added_to_the_negative_elbo(particles):
    """The same draws with and without the loss."""
    losses = []
    for weight in (2.0, 0.0):
        module = _module(counterfactual_weight=weight)
        with torch.no_grad():
            losses.append(float(_loss(module, _cells(), particles)))
        found = module.artifact.divergence
        if weight:
            seen = []
            module.artifact.divergence = lambda cells, z, found=found, seen=seen: (
                seen.append(found(cells, z)) or seen[-1]
            )
            with torch.no_grad():
                assert float(_loss(module, _cells(), particles)) == pytest.approx(losses[0])
    assert losses[0] - losses[1] == pytest.approx(2.0 * float(seen[0]), rel=1e-3, abs=1e-2)


def test_losses_are_for_training_alone():
    module = _module(effects="measured", counterfactual_weight=3.0, class_balance=True).eval()
    plain = _module(effects="measured", counterfactual_weight=0.0).eval()
    with torch.no_grad():
        assert float(_loss(module, _cells())) == pytest.approx(float(_loss(plain, _cells())))


def test_class_balance_weighs_each_class_by_the_share_of_the_other():
    artifact, cells = Artifact(PERTURBATIONS, GENES, 3, class_balance=True), _cells()
    share = float(cells.qc.mean())
    weight = artifact.class_weight(cells)
    assert weight[cells.qc[:, 0] == 1].unique().item() == pytest.approx(1 - share)
    assert weight[cells.qc[:, 0] == 0].unique().item() == pytest.approx(share)
    assert artifact.eval().class_weight(cells) == 1.0
    assert Artifact(PERTURBATIONS, GENES, 3).class_weight(cells) == 1.0


def test_perturbations_and_combinations_have_their_groups():
    artifact = Artifact(3, 4, 2, combinations=[(0, 2)])
    codes = torch.tensor([[-1, -1], [2, -1], [-1, 1], [0, 2], [2, 0], [0, 1], [-2, -1], [0, -2], [2, 0]])
    dose = torch.ones(codes.shape)
    dose[-1] = torch.tensor([1.0, 0.0])
    assert artifact.group(Action(codes, dose)).tolist() == [0, 3, 2, 4, 4, -1, -1, -1, 3]


def test_failed_cells_are_given_the_mean_and_spread_of_passed_ones():
    """Within groups: half of the cells failed, with means and spreads of their own."""
    generator, n = torch.Generator().manual_seed(0), 4000
    quality = torch.arange(n)[:, None] % 2
    x = torch.randn(n, 2, generator=generator).double() * (1.0 + quality) + 3.0 * quality
    artifact, group = Artifact(1, 2, 2), torch.arange(n) // 2 % 2
    number, total, square = torch.zeros(2, 2).double(), torch.zeros(2, 2, 2).double(), torch.zeros(2, 2, 2).double()
    at = (group, quality[:, 0])
    number.index_put_(at, torch.ones(n).double(), accumulate=True)
    total.index_put_(at, x, accumulate=True)
    square.index_put_(at, x**2, accumulate=True)
    artifact.describe(number, total, square, torch.zeros(2), torch.ones(2))
    matched = artifact.matched(x.float(), quality)
    passed, changed = matched[quality[:, 0] == 0], matched[quality[:, 0] == 1]
    torch.testing.assert_close(passed, x.float()[quality[:, 0] == 0])
    torch.testing.assert_close(changed.mean(0), passed.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(changed.std(0), passed.std(0), atol=0.05, rtol=0)


@pytest.mark.parametrize("effects", ["measured", "latent"])
def test_a_cell_keeps_its_artifact_or_loses_it(effects):
    module, cells = _module(effects=effects).eval(), _cells()
    torch.manual_seed(0)
    basal = module.abduct(cells, 4, module.draw_globals(4, cells))
    own = module.counterfactual(basal, cells.action)
    counts = own.expression.replay(basal.noise)
    torch.testing.assert_close(counts, cells.x.expand(4, -1, -1))
    cured = replace(basal, cells=replace(cells, qc=torch.zeros_like(cells.qc)))
    removed = module.counterfactual(cured, cells.action)
    failed = cells.qc[:, 0] > 0
    assert not removed.state[..., -3:].any() and own.state[:, failed, -3:].all()
    torch.testing.assert_close(own.expression.mean[:, ~failed], removed.expression.mean[:, ~failed])
    assert (own.expression.mean - removed.expression.mean)[:, failed].abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"match_quality": False, "class_balance": True}, {"effects": "measured"}])
@pytest.mark.parametrize("more", [{}, {"guide": "correlated", "n_layers": 2, "n_encoder_layers": 2}])
def test_every_setting_has_finite_gradients(options, more):
    module = _module(**options, **more)
    _loss(module, _cells(), 3).backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad and n != "shifts.log_kappa"}
    assert [n for n, g in grads.items() if g is None] == []
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("options", [{}, {"n_layers": 1}, {"effects": "measured"}])
def test_a_rotation_leaves_what_is_decoded(options):
    module, cells = _module(**options), _cells()
    with torch.no_grad():
        before = module.shifts.proba() * module.shifts.loc
        decoded = module.on_genes(before)
        module.on_step(0.2)
        torch.testing.assert_close(module.on_genes(before), decoded)
        seen = None if module.gene_effects is not None else before[[0] * N]
        z = module.encoder(module.standardized(cells.x, cells.library), None, seen, None).loc
        module.on_step(0.5)
        turned = module.shifts.loc
        torch.testing.assert_close(module.on_genes(turned), decoded, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(turned, before, atol=1e-2)
        seen = None if seen is None else turned[[0] * N]
        torch.testing.assert_close(module.encoder(module.standardized(cells.x, cells.library), None, seen, None).loc, z)
