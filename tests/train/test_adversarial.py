"""Any module with a discriminator, against its plan."""

from __future__ import annotations

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pertura.data import KEYS
from pertura.train import AdversarialPlan, FreeBitsELBO


class Module(nn.Module):
    """Cells of two perturbations; the basal state is one weight times expression."""

    discriminator_parameters = ("judge.", "second_judge")
    adversary_share = 0.0
    lr_factors = {"shift": 2.0}

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2)
        self.shift = nn.Parameter(torch.zeros(2))
        self.judge = nn.Linear(2, 2)
        self.second_judge = nn.Parameter(torch.ones(()))
        self.progress, self.shares, self.weights, self.seen = [], [], [], []

    def model(self, cells, kl_weight=1.0):
        self.shares.append(self.adversary_share)
        self.weights.append(kl_weight)
        with pyro.plate("cells", len(cells)):
            pyro.sample("x", dist.Normal(self.encoder(cells.x) + self.shift, 1.0).to_event(1), obs=cells.x)

    def guide(self, cells, kl_weight=1.0): ...

    def on_step(self, progress):
        self.progress.append(progress)

    def discriminator_input(self, cells):
        return self.encoder(cells.x)

    def discriminator_loss(self, given, cells):
        self.seen.append(given)
        target = cells.action.codes[:, 0].clamp(min=0)
        loss = self.second_judge * nn.functional.cross_entropy(self.judge(given), target, reduction="none")
        return loss, torch.tensor([3.0, 1.0])

    @staticmethod
    def _get_fn_args_from_batch(batch):
        from pertura.module._base import Cells

        return (Cells.from_tensors(batch),), {}


BATCH = {
    KEYS.X: torch.tensor([[1.0, 2.0], [3.0, -1.0]]),
    KEYS.PERTURBATION: torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
    KEYS.CONTEXT: torch.zeros(2, 1),
    KEYS.BATCH: torch.zeros(2, 1),
}


@pytest.fixture
def plan(monkeypatch):
    def make(**arguments):
        torch.manual_seed(0)
        made = AdversarialPlan(Module(), loss_fn=FreeBitsELBO(), **arguments)
        # Lightning counts the steps of both optimizers
        made._trainer = SimpleNamespace(
            max_epochs=2, current_epoch=0, global_step=400, num_training_batches=5, estimated_stepping_batches=10
        )
        optimizers = made.configure_optimizers()
        monkeypatch.setattr(made, "optimizers", lambda: optimizers)
        monkeypatch.setattr(made, "manual_backward", lambda loss: loss.backward())
        return made

    return make


def test_each_parameter_has_one_optimizer(plan):
    made = plan(lr=0.01, lr_discriminator=0.5)
    names = {id(p): n for n, p in made.module.named_parameters()}
    main, other = made.configure_optimizers()
    found = [{names[id(p)]: g["lr"] for g in o.param_groups for p in g["params"]} for o in (main, other)]
    assert found[0] == {"encoder.weight": 0.01, "encoder.bias": 0.01, "shift": 0.02}
    assert found[1] == {"judge.weight": 0.5, "judge.bias": 0.5, "second_judge": 0.5}


def test_the_discriminator_does_not_move_the_encoder(plan):
    made = plan(n_discriminator_steps=4)
    made.training_step(BATCH, 0)
    seen = made.module.seen
    assert len(seen) == 4
    assert all(torch.equal(s, seen[0]) for s in seen), "one look at the cells, after the step of everything else"
    assert all(s.grad_fn is None for s in seen)
    assert torch.equal(seen[0], made.module.discriminator_input(SimpleNamespace(x=BATCH[KEYS.X])))


def test_the_discriminator_learns(plan):
    made = plan(lr=1e-9, lr_discriminator=0.05, gradient_penalty=0.0)
    for i in range(60):
        made.training_step(BATCH, i)
    losses = [made.epoch_means()["discriminator_train"]]
    made._totals.clear()
    made.training_step(BATCH, 0)
    assert made.epoch_means()["discriminator_train"] < 0.5 * losses[0]


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_loss_of_the_discriminator(plan, penalty):
    made = plan(gradient_penalty=penalty)
    module, (cells,) = made.module, made.module._get_fn_args_from_batch(BATCH)[0]
    given = module.discriminator_input(cells)
    p = module.judge(given).softmax(-1)
    loss = -p[[0, 1], [0, 1]].log()
    gradient = (p - torch.eye(2)) @ module.judge.weight
    expected = (3 * loss[0] + loss[1]) / 4 + penalty * gradient.square().sum(-1).mean()
    torch.testing.assert_close(made.discriminator_loss(given, cells), expected)


def test_own_steps_set_warm_up_and_annealing(plan):
    made = plan(warmup_start=0.2, warmup_end=0.6, n_steps_kl_warmup=5, min_kl_weight=0.0)
    for i in range(8):
        made.training_step(BATCH, i)
    module = made.module
    assert module.progress == pytest.approx([i / 10 for i in range(8)])
    assert module.shares == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert module.weights == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_rates_fall_step_by_step_but_for_the_discriminator(plan):
    made = plan(lr=0.01, lr_discriminator=0.5, lr_schedule="cosine")
    rates = []
    for i in range(10):
        made.training_step(BATCH, i)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in made.optimizers()])
    main, other = zip(*rates, strict=True)
    assert list(main) == sorted(main, reverse=True) and main[4] == pytest.approx(0.005) and main[-1] < 1e-9
    assert set(other) == {0.5}


def test_later_training_goes_on(plan):
    made = plan(warmup_start=0.2, warmup_end=0.6)
    made.annealed = 0.4
    for i in range(2):
        made.training_step(BATCH, i)
    assert made.module.progress == pytest.approx([0.4, 0.46])
    assert made.module.shares == pytest.approx([0.5, 0.65])


def test_module_without_a_discriminator():
    with pytest.raises(TypeError, match="Linear has no discriminator_parameters, adversary_share.*AdversarialModule"):
        AdversarialPlan(nn.Linear(1, 1))
