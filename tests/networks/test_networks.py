"""Every registered velocity network keeps its contract: net(x, t) is like x, of any batch, and learns."""

import pytest
import torch

from gengrad.networks import MLP, Plan, UNet
from gengrad.registry import NETWORKS, settings_of

VELOCITIES = [name for name in NETWORKS if getattr(NETWORKS.get(name), "learns", "velocity") == "velocity"]
SHAPES = [(2,), (5,), (1, 4, 4), (1, 8, 8), (3, 28, 28)]


def make(name, shape):
    torch.manual_seed(0)
    return NETWORKS.get(name)(event_shape=shape)


def takes(name, shape):
    try:
        make(name, shape)
    except ValueError:  # a network of images says so of points, and names the sizes that it takes
        return False
    return True


# the smallest points and images that a network takes, and the largest
TAKEN = {name: [shape for shape in SHAPES if takes(name, shape)] for name in VELOCITIES}
CASES = [(name, shape) for name in VELOCITIES for shape in (TAKEN[name] or [None])]


@pytest.mark.parametrize("name", VELOCITIES)
def test_a_velocity_network_takes_points_or_images(name):
    assert TAKEN[name], f"{name} takes none of {SHAPES}: add a shape that it takes"


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


def test_a_unet_of_patches_is_a_unet_of_the_folded_image():
    settings = {"channels": 4, "multipliers": [1, 2]}
    networks = []
    for shape, patch in (((2, 12, 8), 2), ((8, 6, 4), 1)):
        torch.manual_seed(0)
        networks.append(UNet(event_shape=shape, patch=patch, **settings))
        torch.nn.init.normal_(networks[-1].head.weight)  # zero at the start
    x, t = torch.randn(3, 2, 12, 8), torch.rand(3)
    patched, folded = networks[0](x, t), networks[1](torch.nn.functional.pixel_unshuffle(x, 2), t)
    assert patched.shape == x.shape and patched.abs().max() > 0
    assert torch.equal(patched, torch.nn.functional.pixel_shuffle(folded, 2))


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_must_fit_the_image_and_the_halvings(patch):
    with pytest.raises(ValueError, match=rf"{patch}x{patch} and halves them 1 times.*multiples of {2 * patch}; the "):
        UNet(event_shape=(1, 3 * patch, 8 * patch), multipliers=[1, 2], patch=patch)


def test_networks_without_classes_refuse_labels():
    for network, shape in ((MLP(event_shape=(2,)), (2,)), (UNet(event_shape=(1, 8, 8)), (1, 8, 8))):
        with pytest.raises(ValueError, match="no class labels"):
            network(torch.randn(1, *shape), torch.rand(1), torch.zeros(1, dtype=torch.long))


def test_a_plan_is_small_but_not_zero_at_the_start_and_sees_its_latent():
    torch.manual_seed(0)
    plan = Plan(event_shape=(1, 3, 3), latent=4, width=16)
    x, z = torch.zeros(50, 1, 3, 3), torch.randn(50, 4)
    moved = plan(x, z)
    assert moved.shape == x.shape
    assert moved.std(0).min() > 0 and moved.abs().max() < 0.1
    with pytest.raises(ValueError, match="latent of shape"):
        plan(x, z[:, :2])


def test_a_plan_is_rebuilt_from_its_settings_and_its_samples_do_not_see_one_another():
    plan = Plan(event_shape=(2,), width=16, start=1.0)
    again = NETWORKS.build(settings_of(plan), event_shape=(2,))
    again.load_state_dict(plan.state_dict())
    x, z = torch.randn(5, 2), torch.randn(5, 2)
    alone = torch.cat([again(x[i : i + 1], z[i : i + 1]) for i in range(5)])
    assert torch.allclose(plan(x, z), alone, atol=1e-6)  # fp32, values of size one


def test_a_plan_makes_a_sphere_of_an_atom_and_a_dilation_by_its_linear_part_alone():
    plan = Plan(event_shape=(3,))
    with torch.no_grad():
        for parameter in plan.parameters():
            parameter.zero_()
        plan.linear.weight[:, 6:] = 0.7 * torch.eye(3)
        z = torch.randn(20, 3)
        assert torch.allclose(plan(torch.zeros(20, 3), z).norm(dim=1), torch.full((20,), 0.7))
        plan.linear.weight[:, 6:] = 0
        plan.linear.weight[:, :3] = 0.2 * torch.eye(3)
        assert torch.allclose(z + plan(z, torch.randn(20, 3)), 1.2 * z)
