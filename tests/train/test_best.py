"""Which parameters are given back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pertura.train._best import KeepBest


def trained(callback, values, sanity_checking=False):
    """Parameters after trainings in which each validation found one of the values; the parameter is their number."""
    plan = SimpleNamespace(module=nn.Linear(1, 1))
    for number, value in enumerate(values):
        nn.init.constant_(plan.module.weight, float(number))
        metrics = {} if value is None else {"error": torch.tensor(value)}
        callback.on_validation_end(SimpleNamespace(callback_metrics=metrics, sanity_checking=sanity_checking), plan)
    return plan


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [3.0, 1.0, 2.0], 1),
        ("max", [3.0, 1.0, 2.0], 0),
        ("min", [3.0, 1.0, 1.0], 1),
        ("min", [None, 4.0, float("nan")], 1),
        ("min", [None, None], 1),
    ],
)
def test_best_validation_is_given_back(mode, values, best):
    callback = KeepBest("error", mode)
    plan = trained(callback, values)
    callback.on_train_end(None, plan)
    assert float(plan.module.weight) == best
    # later training is not undone
    nn.init.constant_(plan.module.weight, 9.0)
    callback.on_train_end(None, plan)
    assert float(plan.module.weight) == 9.0


def test_an_interruption_gives_it_back():
    callback = KeepBest("error")
    plan = trained(callback, [1.0, 2.0])
    callback.on_exception(None, plan, KeyboardInterrupt())
    assert float(plan.module.weight) == 0.0


def test_checks_before_training_do_not_count():
    callback = KeepBest("error")
    plan = trained(callback, [1.0, 2.0], sanity_checking=True)
    callback.on_train_end(None, plan)
    assert float(plan.module.weight) == 1.0
