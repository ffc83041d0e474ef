"""Structural equations in which only some genes regulate, against the inverse of the full matrix."""

from __future__ import annotations

import pytest
import torch

from pertura.nn import propagate, remove_regulation, total_effect


@pytest.fixture
def sem():
    """Network of two members, 3 of 7 genes regulate; the same as full matrices; regulators."""
    torch.manual_seed(0)
    regulators = torch.tensor([1, 4, 5])
    weight = 0.3 * torch.randn(2, 3, 7, dtype=torch.float64)
    weight[:, torch.arange(3), regulators] = 0.0
    full = torch.zeros(2, 7, 7, dtype=torch.float64)
    full[:, regulators] = weight
    return weight, full, regulators


def test_equal_to_the_dense_inverse(sem):
    weight, full, regulators = sem
    z = torch.randn(2, 10, 7, dtype=torch.float64)
    inverse = torch.linalg.inv(torch.eye(7, dtype=torch.float64) - full)
    torch.testing.assert_close(propagate(z, weight, regulators), z @ inverse, rtol=0, atol=1e-13)
    torch.testing.assert_close(remove_regulation(z, weight, regulators), z - z @ full, rtol=0, atol=1e-13)
    expected = (inverse - torch.eye(7, dtype=torch.float64))[:, regulators]
    torch.testing.assert_close(total_effect(weight, regulators), expected, rtol=0, atol=1e-13)


def test_one_undoes_the_other(sem):
    weight, _, regulators = sem
    z = torch.randn(2, 10, 7, dtype=torch.float64)
    torch.testing.assert_close(remove_regulation(propagate(z, weight, regulators), weight, regulators), z)


def test_gradients_are_those_of_the_dense_inverse(sem):
    weight, full, regulators = sem
    z = torch.randn(2, 10, 7, dtype=torch.float64)
    weight.requires_grad_()
    full.requires_grad_()
    propagate(z, weight, regulators).square().sum().backward()
    (z @ torch.linalg.inv(torch.eye(7, dtype=torch.float64) - full)).square().sum().backward()
    torch.testing.assert_close(weight.grad, full.grad[:, regulators], rtol=1e-9, atol=1e-9)


def test_the_regulator_is_the_row():
    """Noise of regulator 0 moves target 2 by the weight at [0, 2], and not the other way round."""
    weight = torch.tensor([[0.0, 0.0, 2.0]])
    state = propagate(torch.eye(3), weight, torch.tensor([0]))
    torch.testing.assert_close(state, torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
