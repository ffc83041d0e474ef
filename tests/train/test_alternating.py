"""Which part of the parameters moves in which epoch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pertura.train import AlternatingPlan


class Module(nn.Module):
    lr_factors = {"network_": 0.2}

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.network_weight = nn.Parameter(torch.ones(2, 2))

    model = guide = None


def test_turns():
    plan = AlternatingPlan(Module(), n_epochs_networks=1, n_epochs_grn=2)
    assert [plan.waits(e) for e in range(4)] == ["grn", "networks", "networks", "grn"]
    assert AlternatingPlan(Module()).waits(0) is None


@pytest.mark.parametrize(("epoch", "moves"), [(0, "layer"), (1, "network")])
def test_the_part_that_waits_gets_no_gradient(monkeypatch, epoch, moves):
    module = Module()
    plan = AlternatingPlan(module, n_epochs_networks=1, n_epochs_grn=2)
    monkeypatch.setattr(AlternatingPlan, "current_epoch", epoch)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    plan.on_after_backward()
    assert [n.partition("_")[0].partition(".")[0] for n, p in module.named_parameters() if p.grad is not None] == (
        ["layer", "layer"] if moves == "layer" else ["network"]
    )


def test_optimisers():
    named = list(Module().named_parameters())
    plan = AlternatingPlan(Module(), lr=1e-4, optimizer="rmsprop")
    found = plan._optimizer(named)
    assert isinstance(found, torch.optim.RMSprop)
    assert sorted({group["lr"] for group in found.param_groups}) == pytest.approx([2e-5, 1e-4])
    faster = AlternatingPlan(Module(), lr=1e-4, grn_lr_factor=5.0)._optimizer(named)
    assert [group["lr"] for group in faster.param_groups] == pytest.approx([1e-4] * len(faster.param_groups))
    assert AlternatingPlan(Module())._optimizer(named).param_groups[0]["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"n_epochs_networks": 1}, {"n_epochs_grn": 1}])
def test_wrong_arguments(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`|`n_epochs_networks` and `n_epochs_grn`"):
        AlternatingPlan(Module(), **options)
