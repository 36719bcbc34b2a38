"""Every registered velocity network keeps its contract: net(x, t) is like x, of any batch, and learns."""

import pytest
import torch

from gengrad.networks import MLP, UNet
from gengrad.registry import NETWORKS, settings_of

SHAPES = {"mlp": [(2,), (5,), (1, 4, 4)], "unet": [(1, 8, 8), (3, 28, 28)]}
CASES = [(name, shape) for name in NETWORKS for shape in SHAPES[name]]


def make(name, shape):
    torch.manual_seed(0)
    return NETWORKS.get(name)(event_shape=shape)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_velocity_network_returns_the_shape_it_is_given(name, shape):
    network = make(name, shape)
    x = torch.randn(3, *shape)
    assert network(x, torch.rand(3)).shape == x.shape
    assert network(x[:1], torch.rand(1)).shape == x[:1].shape


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_network_is_rebuilt_from_its_settings_with_the_same_parameters(name, shape):
    network = make(name, shape)
    again = NETWORKS.build(settings_of(network), event_shape=shape)
    again.load_state_dict(network.state_dict())
    x, t = torch.randn(2, *shape), torch.rand(2)
    assert torch.equal(again(x, t), network(x, t))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_few_steps_of_descent_fit_a_velocity_that_depends_on_position_and_time(name, shape):
    network = make(name, shape)
    x, t = torch.randn(32, *shape), torch.rand(32)
    target = x * t.view(-1, *[1] * len(shape))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (network(x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_samples_do_not_see_one_another(name, shape):
    network = make(name, shape)
    for parameter in network.parameters():  # zero-initialised heads would hide a mixing of samples
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(4, *shape), torch.rand(4)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    # another shape of matrix product rounds differently: 1e-4 of the output's size is fp32 through ten layers
    assert torch.allclose(network(x, t), alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_the_unet_starts_at_velocity_zero():
    assert make("unet", (1, 8, 8))(torch.randn(2, 1, 8, 8), torch.rand(2)).abs().max() == 0


def test_the_unet_says_which_image_sizes_it_cannot_halve():
    with pytest.raises(ValueError, match="multiples of 8; the data are 28x28"):
        UNet(event_shape=(1, 28, 28), multipliers=[1, 2, 2, 2])
    with pytest.raises(ValueError, match=r"network\.name=mlp"):
        UNet(event_shape=(2,))


def test_networks_without_classes_refuse_labels():
    for network, shape in ((MLP(event_shape=(2,)), (2,)), (UNet(event_shape=(1, 8, 8)), (1, 8, 8))):
        with pytest.raises(ValueError, match="no class labels"):
            network(torch.randn(1, *shape), torch.rand(1), torch.zeros(1, dtype=torch.long))
