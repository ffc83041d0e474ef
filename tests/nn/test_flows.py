import pytest
import torch

from pertura.nn import MLP, InverseAutoregressiveFlow


@pytest.mark.parametrize("n_steps", [0, 1, 2])
def test_density_is_the_change_of_variables(n_steps):
    """log q(z) equals the base density minus the log-determinant of the Jacobian, computed by autograd."""
    torch.manual_seed(0)
    flow = InverseAutoregressiveFlow(4, 3, 5, n_steps, n_hidden=8, use_weight_norm=n_steps == 2)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    h = torch.randn(1, 3)
    posterior = flow(h)
    base = posterior.base_dist if n_steps else posterior
    epsilon = base.sample()

    def push(e):
        for transform in posterior.transforms if n_steps else []:
            e = transform(e)
        return e

    jacobian = torch.autograd.functional.jacobian(lambda e: push(e[None])[0], epsilon[0])
    expected = base.log_prob(epsilon) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(posterior.log_prob(push(epsilon)), expected, rtol=1e-4, atol=1e-4)


def test_step_is_the_lstm_type_update():
    torch.manual_seed(0)
    flow = InverseAutoregressiveFlow(3, 2, 4, n_steps=1, n_hidden=6)
    h, z = flow.context(torch.randn(5, 2)), torch.randn(5, 3)
    step = flow.steps[0]
    mean, gate = step.nn(z, h)
    gate = torch.sigmoid(gate + 2.0)
    torch.testing.assert_close(step.condition(h)(z), gate * z + (1 - gate) * mean)


def test_a_dimension_follows_those_before_it_and_the_order_turns_between_steps():
    torch.manual_seed(0)
    flow = InverseAutoregressiveFlow(4, 2, 3, n_steps=1, n_hidden=16)
    h, z = flow.context(torch.randn(1, 2)), torch.randn(4)
    step = flow.steps[0].condition(h)
    jacobian = torch.autograd.functional.jacobian(lambda z: step(z[None])[0], z)
    torch.testing.assert_close(jacobian.triu(1), torch.zeros(4, 4))
    assert (jacobian.tril(-1) != 0).sum() == 6
    two = InverseAutoregressiveFlow(4, 2, 3, n_steps=2, n_hidden=16)
    reverse = two(torch.randn(1, 2)).transforms[1]
    torch.testing.assert_close(reverse(z), z.flip(-1))


def test_mean_follows_the_noise_free_path():
    torch.manual_seed(0)
    flow = InverseAutoregressiveFlow(3, 2, 4, n_steps=2, n_hidden=6)
    torch.nn.init.constant_(flow.log_scale.bias, -7.0)
    torch.nn.init.zeros_(flow.log_scale.weight)
    h = torch.randn(4, 2)
    torch.testing.assert_close(flow(h).sample(), flow.mean(h), atol=2e-2, rtol=0)


def test_flow_bends_what_a_gaussian_can_not():
    """Fitted to a banana-shaped density, two steps reach a higher likelihood than the Gaussian base alone."""

    def fit(n_steps):
        torch.manual_seed(1)
        flow = InverseAutoregressiveFlow(2, 1, 1, n_steps, n_hidden=32)
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
        h = torch.zeros(1, 1)
        for _ in range(400):
            posterior = flow(h)
            z = posterior.rsample((256,))
            target = -0.5 * (z[..., 0] ** 2) - 0.5 * ((z[..., 1] - 1.5 * z[..., 0] ** 2) / 0.3) ** 2
            loss = (posterior.log_prob(z) - target).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert fit(2) < fit(0) - 0.3


def test_mlp_without_layers_is_the_identity():
    x = torch.randn(3, 5)
    mlp = MLP(5, [])
    assert mlp.n_out == 5
    torch.testing.assert_close(mlp(x), x)


def test_weight_norm_and_dropout():
    mlp = MLP(5, [4, 3], use_weight_norm=True, dropout_rate=0.5)
    names = [name for name, _ in mlp.named_parameters()]
    assert any("original0" in name for name in names)
    x = torch.randn(64, 5)
    assert not torch.equal(mlp.train()(x), mlp(x))
    torch.testing.assert_close(mlp.eval()(x), mlp(x))
