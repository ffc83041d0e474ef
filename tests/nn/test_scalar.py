"""Networks of one number: interpolated ones are the networks themselves."""

from __future__ import annotations

import torch

from pertura.nn import ScalarMLP
from pertura.nn._scalar import _Interpolated


def sharpened(**arguments) -> ScalarMLP:
    """A network with some curvature."""
    torch.manual_seed(0)
    network = ScalarMLP(2, (16, 16), 2, **arguments)
    with torch.no_grad():
        for weight in network.weights:
            weight.mul_(2.0)
        network.biases[0].normal_()
    return network


def test_interpolation_is_close_to_the_network():
    network = sharpened(n_grid=512)
    x = 3 * torch.randn(2, 40, 60)
    fast = network(x)
    exact = network.exact(x.reshape(2, -1)).reshape(2, 40, 60, 2)
    spread = float(exact.std())
    for i, out in enumerate(fast):
        assert out.shape == x.shape
        assert float((out - exact[..., i]).abs().max()) < 1e-3 * spread


def test_gradients_are_close_to_those_of_the_network():
    gradients = []
    for n_grid in (512, 0):
        network = sharpened(n_grid=n_grid)
        torch.manual_seed(1)
        x = (3 * torch.randn(2, 40, 60)).requires_grad_()
        a, b = network(x)
        (a.square() + b).sum().backward()
        gradients.append([x.grad, *(p.grad for p in network.parameters())])
    for fast, exact in zip(*gradients, strict=True):
        assert float((fast - exact).norm() / exact.norm()) < 0.03


def test_few_inputs_are_not_interpolated_in_training():
    network = sharpened(n_grid=512)
    x = torch.randn(2, 100)
    torch.testing.assert_close(network(x)[1], network.exact(x)[..., 1])


def test_evaluation_does_not_depend_on_what_else_is_asked():
    network = sharpened(n_grid=64)
    network(5 * torch.randn(2, 1000))
    network.eval()
    x = torch.randn(2, 500)
    x[0, 0] = 100.0  # far outside what was seen: a straight line
    (all_at_once, _), (some, _) = network(x), network(x[:, :10])
    torch.testing.assert_close(all_at_once[:, :10], some)
    assert torch.isfinite(all_at_once).all()


def test_members_can_be_asked_alone():
    network = sharpened(n_grid=64).eval()
    x = torch.randn(2, 500)
    torch.testing.assert_close(network(x)[0][1:], network(x[1:], slice(1, 2))[0])


def test_gradient_of_the_interpolation():
    """Beyond the grid as well, where the curve goes on as a straight line."""
    x = torch.tensor([[-1.5, 0.1, 0.5, 1.7], [0.3, 2.6, -0.4, 1.2]], dtype=torch.float64, requires_grad=True)
    curve = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    low, step = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, curve: _Interpolated.apply(x, curve, low, step), (x, curve))
