"""The plan: groups of parameters, schedules, warm-up, losses per cell."""

from __future__ import annotations

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pertura.data import KEYS
from pertura.module import PerturbationModule
from pertura.train import FreeBitsELBO, PyroPlan


class Module(PerturbationModule):
    """One parameter of each sort; the loss is the negative log density of x."""

    no_weight_decay = {"table"}

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.table = nn.Parameter(torch.ones(2, 2))
        self.effect_b = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.lr_factors = {"effect_": 5.0}
        self.weights: list[float] = []
        self.progress: list[float] = []

    def model(self, x, kl_weight=1.0):
        self.weights.append(kl_weight)
        with pyro.plate("cells", len(x)):
            pyro.sample("x", dist.Normal(self.layer.bias[:1], 1.0).to_event(1), obs=x)

    def guide(self, x, kl_weight=1.0): ...

    @staticmethod
    def _get_fn_args_from_batch(batch):
        return (batch[KEYS.X],), {}

    def on_step(self, progress):
        self.progress.append(progress)

    def draw_globals(self, n_samples): ...

    def abduct(self, cells, n_samples, globals_): ...

    def act(self, basal, action, globals_): ...

    def decode(self, z, basal): ...


@pytest.fixture
def plan():
    def make(epoch=0, step=30, n_steps=120, **arguments):
        made = PyroPlan(Module(), loss_fn=FreeBitsELBO(), **arguments)
        made._trainer = SimpleNamespace(
            current_epoch=epoch, global_step=step, estimated_stepping_batches=n_steps, global_rank=0, world_size=1
        )
        made.setup("fit")
        made.on_train_start()
        return made

    return make


def optimiser(plan):
    configured = plan.configure_optimizers()
    return configured["optimizer"] if isinstance(configured, dict) else configured


def test_groups_of_parameters(plan):
    made = plan(lr=0.01, weight_decay=0.1)
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in optimiser(made).param_groups for p in g["params"]}
    module = made.module
    assert groups[id(module.layer.weight)] == (0.01, 0.1)
    assert groups[id(module.layer.bias)] == (0.01, 0.0)
    assert groups[id(module.table)] == (0.01, 0.0)
    assert groups[id(module.effect_b)] == (0.05, 0.0)
    assert id(module.frozen) not in groups and len(groups) == 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_optimizer_makes_one_pass_unless_precision_is_mixed(plan, precision):
    """Lightning refuses to clip gradients for an optimizer that makes one pass where precision is mixed."""
    made = plan()
    made._trainer.precision = precision
    assert bool(optimiser(made).defaults["fused"]) is (precision == "32-true")


def test_schedule(plan):
    made = plan(n_steps=4, lr=0.01, lr_schedule="cosine")
    configured = made.configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "step"
    scheduler, rates = configured["lr_scheduler"]["scheduler"], []
    for _ in range(4):
        configured["optimizer"].step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-9
    assert isinstance(plan(lr_schedule="constant").configure_optimizers(), torch.optim.AdamW)
    endless = plan(n_steps=float("inf"), lr_schedule="cosine", n_epochs_kl_warmup=0.5)
    assert isinstance(endless.configure_optimizers(), torch.optim.AdamW) and endless.kl_weight == 1.0
    with pytest.raises(ValueError, match="`lr_schedule` must be 'constant' or 'cosine', got 'linear'"):
        plan(lr_schedule="linear")


@pytest.mark.parametrize(
    ("warmup", "epoch", "step", "weight"),
    [
        (0.5, 0, 0, 0.0),
        (0.5, 0, 25, 0.25),
        (0.5, 9, 100, 1.0),
        (0.001, 0, 1, 1.0),
        (4, 2, 0, 0.5),
        (None, 0, 0, 1.0),
    ],
)
def test_warm_up_in_epochs_or_fractions_of_all_steps(plan, warmup, epoch, step, weight):
    made = plan(epoch=epoch, step=step, n_steps=200, n_epochs_kl_warmup=warmup)
    batch = {KEYS.X: torch.zeros(2, 1)}
    made.loss_per_cell(batch, made.kl_weight)
    assert abs(made.module.weights[-1] - weight) < 1e-5


def test_validation_has_no_warm_up(plan, monkeypatch):
    made = plan(n_epochs_kl_warmup=5)
    logged = {}
    monkeypatch.setattr(made, "log", lambda name, value, **options: logged.update({name: (float(value), options)}))
    batch = {KEYS.X: torch.tensor([[1.0], [3.0]])}
    made.training_step(batch, 0)
    made.on_train_epoch_end()
    made.validation_step(batch, 0)
    assert made.module.weights[0] < 1e-5 and made.module.weights[1] == 1.0
    expected = -dist.Normal(made.module.layer.bias[0], 1.0).log_prob(batch[KEYS.X]).mean()
    for name in ("elbo_train", "elbo_validation"):
        value, options = logged[name]
        assert abs(value - float(expected)) < 1e-5, "per cell"
        assert options["batch_size"] == 2 and options["on_epoch"]


def test_the_mean_of_an_epoch_is_over_cells(plan, monkeypatch):
    made = plan()
    logged = []

    def log(name, value, **options):
        if name == "elbo_train":
            logged.append((float(value), options["batch_size"]))

    monkeypatch.setattr(made, "log", log)
    batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]])]
    losses = [float(made.training_step({KEYS.X: x}, i)) for i, x in enumerate(batches)]
    assert made.epoch_means() == {"elbo_train": pytest.approx((2 * losses[0] + losses[1]) / 3, rel=1e-5)}
    made.on_train_epoch_end()
    assert logged == [(pytest.approx((2 * losses[0] + losses[1]) / 3, rel=1e-5), 3)]
    made.training_step({KEYS.X: batches[1]}, 0)
    made.on_train_epoch_end()
    assert logged[1] == (pytest.approx(losses[1], rel=1e-5), 1), "epochs start anew"


def test_module_sees_progress_and_the_size_of_the_data(plan, monkeypatch):
    made = plan()
    made.n_obs_training = 123
    made.setup("fit")
    monkeypatch.setattr(made, "log", lambda *args, **options: None)
    made.training_step({KEYS.X: torch.zeros(2, 1)}, 0)
    assert made.module.n_train == 123
    made.annealed = 0.8  # an earlier training was stopped there
    made.training_step({KEYS.X: torch.zeros(2, 1)}, 1)
    assert made.module.progress == [0.25, pytest.approx(0.85)]


def test_how_far_warm_up_and_annealing_are_is_logged(plan, monkeypatch):
    made = plan(epoch=1, n_epochs_kl_warmup=4)
    logged = {}
    monkeypatch.setattr(made, "log", lambda name, value, **_: logged.update({name: value}))
    made.on_train_epoch_end()
    assert logged == {"kl_weight": pytest.approx(0.25, abs=1e-5), "annealing": pytest.approx(0.25)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(plan, value):
    made = plan()
    with torch.no_grad():
        made.module.layer.bias.fill_(value)
    with pytest.raises(FloatingPointError, match="epoch 0.*smaller learning rate"):
        made.loss_per_cell({KEYS.X: torch.zeros(2, 1)}, 1.0)


def test_other_errors_are_not_hidden(plan, monkeypatch):
    made = plan()

    def fail(*args, **kwargs):
        raise ValueError("something else")

    monkeypatch.setattr(made, "differentiable_loss_fn", fail)
    with pytest.raises(ValueError, match="something else"):
        made.loss_per_cell({KEYS.X: torch.zeros(2, 1)}, 1.0)
