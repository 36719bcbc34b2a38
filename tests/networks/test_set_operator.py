"""The set operator: a map of points that depends on a measure, and on nothing else of the cloud that stands for it."""

import math

import pytest
import torch

from gengrad.kernel_moments import TILE, KernelMoments
from gengrad.networks.kernels import RARE, smoothed
from gengrad.networks.set_operator import SetOperator, determinant, log_without_folds
from gengrad.registry import NETWORKS, settings_of

SMALL = {"width": 16, "tokens": 4, "heads": 2}


def operator(d=2, seed=0, **settings):
    """One whose heads are not zero, in float64, so that a difference is not rounding."""
    torch.manual_seed(seed)
    network = SetOperator(event_shape=(d,), **(SMALL | settings)).double()
    torch.nn.init.normal_(network.affine.weight, std=0.3)
    torch.nn.init.normal_(network.head[-1].weight, std=0.3)
    return network


def cloud(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_starts_at_the_identity():
    network = SetOperator(event_shape=(2,), **SMALL)
    x = torch.randn(7, 2)
    assert torch.equal(network(x, network.context(x, 0.1)), x)


def test_permuting_the_particles_permutes_what_becomes_of_them():
    network, x = operator(), cloud(50, 2)
    order = torch.randperm(50)
    one, two = network(x, network.context(x, 0.1)), network(x[order], network.context(x[order], 0.1))
    assert torch.allclose(one[order], two, atol=1e-12) and (one - x).abs().max() > 1e-3


def test_duplicating_all_particles_does_not_change_the_map():
    network, x, y = operator(), cloud(50, 2), cloud(9, 2, seed=2)
    one, two = (network(y, network.context(z, 0.1)) for z in (x, torch.cat([x, x, x])))
    assert torch.allclose(one, two, atol=1e-12)


def test_duplicating_one_particle_does():
    network, x, y = operator(), cloud(50, 2), cloud(9, 2, seed=2)
    one, two = (network(y, network.context(z, 0.1)) for z in (x, torch.cat([x, x[:1]])))
    assert (one - two).abs().max() > 1e-6


def test_a_point_is_moved_alike_in_the_cloud_alone_or_off_it():
    network, x = operator(), cloud(50, 2)
    context = network.context(x, 0.1)
    alone = torch.cat([network(point[None], context) for point in x])
    assert torch.allclose(network(x, context), alone, atol=1e-12)


def test_a_batch_of_clouds_is_each_cloud_by_itself():
    network, x = operator(d=3), cloud(4, 20, 3)
    together = network(x, x, 0.1, jacobian=True)
    alone = [network(one, one, 0.1, jacobian=True) for one in x]
    for k in range(2):
        assert torch.allclose(together[k], torch.stack([pair[k] for pair in alone]), atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"kernels": 0}, {"kernels": 3}, {"translation_equivariant": True, "scaled": False}]
)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_forward_mode_jacobian_is_autograds(d, settings):
    network, x, y = operator(d, **settings), 0.6 * cloud(30, d) + 0.3, cloud(5, d, seed=2)
    context = network.context(x, 0.2)
    moved, jacobian = network(y, context, jacobian=True)
    truth = torch.stack([torch.autograd.functional.jacobian(lambda z: network(z[None], context)[0], z) for z in y])
    assert torch.allclose(moved, network(y, context), atol=1e-14)
    assert torch.allclose(jacobian, truth, atol=1e-12)
    assert torch.allclose(determinant(jacobian), torch.linalg.det(truth), atol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_kernel_estimate_and_its_slope_are_what_the_formula_says(d):
    x, particles, along = cloud(6, d), cloud(25, d, seed=2), torch.eye(d, dtype=torch.float64)[:, None]
    logs, slopes, rises, turns = smoothed(x, particles, torch.ones(1, 1).double(), 3, along)
    for level, h in enumerate((1.0, 0.5, 0.25)):

        def log_density(z, h=h):
            rho = (-(z - particles).square().sum(-1) / (2 * h * h)).exp().mean()
            return (rho + RARE).log()

        for i, point in enumerate(x):
            slope = torch.autograd.functional.jacobian(log_density, point)
            bend = torch.autograd.functional.hessian(log_density, point)
            assert torch.allclose(logs[i, level], log_density(point), atol=1e-10)
            assert torch.allclose(slopes[i, level], h * slope, atol=1e-10)
            assert torch.allclose(rises[:, i, level], slope, atol=1e-9)
            assert torch.allclose(turns[:, i, level], h * bend, atol=1e-9)


def test_kernel_moments_have_the_gradient_of_the_points():
    particles, width = cloud(2, 12, 2, seed=2), torch.tensor([0.7, 0.4], dtype=torch.float64).view(2, 1, 1)
    x = cloud(2, 5, 2).requires_grad_()
    for degree in (0, 1, 2):
        assert torch.autograd.gradcheck(lambda z, k=degree: KernelMoments.apply(z, particles, width, 2, k), x)


@pytest.mark.parametrize("tile", [1, 7, 40, 150, 10**6])
def test_kernels_are_the_same_in_tiles_of_any_size(tile, monkeypatch):
    """Rows of one cloud, several clouds, all of them; a tile that does not divide them."""
    x, particles, h = cloud(5, 6, 2), cloud(5, 10, 2, seed=2), torch.rand(5, 1, 1).double() + 0.5
    whole = smoothed(x, particles, h, 3)
    monkeypatch.setitem(TILE, "cpu", tile)
    for one, two in zip(whole[:2], smoothed(x, particles, h, 3)):
        assert torch.allclose(one, two, atol=1e-14)
    assert torch.allclose(smoothed(x[1], particles[1], h[1], 3)[0], whole[0][1], atol=1e-14)
    one = smoothed(x[1], particles[1], h[1], 3)[0]
    assert torch.allclose(smoothed(x[1].expand(4, -1, -1), particles[1], h[1], 3)[0], one.expand(4, -1, -1), atol=1e-14)


def test_single_precision_kernels_are_near_to_double_ones():
    """Half the width is the fourth power of the kernel, whose faint end is cut: seen beside RARE in neither."""
    x, particles, h = cloud(200, 2), cloud(300, 2, seed=2), torch.ones(1, 1).double()
    exact = smoothed(x, particles, h, 4)
    for one, two in zip(exact[:2], smoothed(x.float(), particles.float(), h.float(), 4)):
        assert (one - two).abs().max() < 3e-4


def test_a_gradient_of_the_particles_is_refused_where_they_are_seen_through_kernels():
    network, x = operator(kernels=2), cloud(10, 2).requires_grad_()
    with pytest.raises(ValueError, match="particles"):
        network(x.detach(), x, 0.1)


def test_kernels_see_what_moments_do_not_and_neither_order_nor_repetition():
    network, x = operator(kernels=3), cloud(50, 2)
    order, context = torch.randperm(50), network.context(x, 0.1)
    assert torch.allclose(network(x, context)[order], network(x[order], network.context(x[order], 0.1)), atol=1e-12)
    assert torch.allclose(network(x, network.context(torch.cat([x, x]), 0.1)), network(x, context), atol=1e-12)
    far = network(torch.full((1, 2), 1e4, dtype=torch.float64), context)
    assert far.isfinite().all()  # where every kernel is zero


def test_densities_of_clouds_much_wider_than_the_kernels_survive_float32():
    """Two narrow blobs far apart, seen through widths of a hundredth of the cloud's scale and less."""
    network, x = operator(), 0.3 * cloud(200, 2)
    x = torch.cat([x[:100] - 30, x[100:] + 30])
    truth = determinant(network(x, x, 0.1, jacobian=True)[1])
    found = determinant(network.float()(x.float(), x.float(), 0.1, jacobian=True)[1])
    assert (found.double() - truth).abs().max() < 2e-3


def test_a_step_without_a_length_is_refused():
    for tau in (None, 0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tau > 0"):
            operator()(cloud(5, 2), cloud(5, 2), tau)


def test_the_jacobian_can_be_descended():
    network, x = operator(), cloud(30, 2)
    _, jacobian = network(x, x, 0.2, jacobian=True)
    determinant(jacobian).log().mean().backward()
    assert network.induced.grad.abs().max() > 0  # also through the context


def test_above_three_dimensions_there_is_no_log_det():
    network = operator(d=4)
    with pytest.raises(ValueError, match="up to d = 3"):
        network(cloud(5, 4), cloud(5, 4), 0.1, jacobian=True)


def test_a_fold_costs_a_finite_sum_and_its_slope_leads_out_of_it():
    det = torch.tensor([2.0, 0.05, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    value = log_without_folds(det, fold=0.05)
    assert torch.allclose(value[:2], det[:2].log())
    assert value[2].item() == pytest.approx(math.log(0.05) - 1) and value[3].item() == pytest.approx(
        math.log(0.05) - 21
    )
    (slope,) = torch.autograd.grad(value.sum(), det)
    assert torch.allclose(slope, torch.tensor([0.5, 20.0, 20.0, 20.0], dtype=torch.float64))


@pytest.mark.parametrize("equivariant", [True, False])
def test_translation_equivariant_operators_move_what_is_shifted_alike_and_others_do_not(equivariant):
    network, x, y = operator(translation_equivariant=equivariant), cloud(50, 2), cloud(9, 2, seed=2)
    shift = torch.tensor([2.0, -1.0], dtype=torch.float64)
    one, two = network(y, network.context(x, 0.1)), network(y + shift, network.context(x + shift, 0.1))
    assert torch.allclose(one + shift, two, atol=1e-12) == equivariant


def test_scaled_operators_move_by_parts_in_units_of_one_over_the_scale():
    """With the weights of the plain parts at zero, what is left of the affine map is in units of 1 / scale."""
    network, x = operator(kernels=0), cloud(50, 2)
    with torch.no_grad():
        network.affine.weight[: len(network.affine.weight) // 2] = 0
        network.affine.bias[: len(network.affine.bias) // 2] = 0
        network.head[-1].weight.zero_(), network.head[-1].bias.zero_()
    found = []
    network.affine.register_forward_hook(lambda module, given, coefficients: found.append(coefficients))
    context = network.context(x, 0.1)
    assert torch.allclose(context.shift[0] * context.scale[0], found[0][6:].view(2, 3)[:, 2], atol=1e-12)


@pytest.mark.parametrize("n", [1, 20])
def test_clouds_far_narrower_than_a_step_are_not_thrown_far_away(n):
    """In units of 1 / scale without end, a point would fly off by 10^4."""
    network, x = operator(), 1e-9 * cloud(n, 2)
    assert (network(x, x, 0.1) - x).abs().max() < 5


def test_only_with_on_tau_does_the_direction_depend_on_tau():
    x = cloud(20, 2)
    for on_tau in (False, True):
        network = operator(on_tau=on_tau, kernels=0)  # whose widths would depend on tau
        with torch.no_grad():
            network.particle[0].weight[:, -1] += 1.0
        g = [(network(x, network.context(x, tau)) - x) / tau for tau in (0.1, 0.2)]
        assert torch.allclose(*g, atol=1e-12) is not on_tau


def test_the_weights_of_the_energy_are_told_by_their_logarithms():
    x, network = cloud(20, 2), operator(on_weights=2, kernels=0)
    with torch.no_grad():  # what is told comes last
        for first in (network.particle[0], network.point[0]):
            first.weight[:, -2:] = torch.tensor([1.0, 0.5], dtype=first.weight.dtype)
    one, two, three = (network(x, x, 0.1, weights) for weights in ((1.0, 4.0), (2.0, 1.0), (1.0, 1.0)))
    assert torch.allclose(one, two, atol=1e-12) and not torch.allclose(one, three, atol=1e-4)  # log 2 = log 4 / 2
    with pytest.raises(ValueError, match="told 2 weights of the energy; got 1"):
        network.context(x, 0.1, (1.0,))


def test_it_is_rebuilt_from_its_settings_and_takes_points_alone():
    network = operator()
    again = NETWORKS.build(settings_of(network), event_shape=(2,)).double()
    again.load_state_dict(network.state_dict())
    x = cloud(10, 2)
    assert torch.equal(again(x, again.context(x, 0.1)), network(x, network.context(x, 0.1)))
    with pytest.raises(ValueError, match="clouds of points"):
        SetOperator(event_shape=(1, 8, 8))
    with pytest.raises(ValueError, match="does not divide"):
        SetOperator(event_shape=(2,), width=10, heads=4)


def test_a_few_hundred_steps_of_descent_learn_a_map_that_depends_on_the_measure():
    """T(x; mu) = mean of mu: no map of x alone comes near it."""
    torch.manual_seed(0)
    network = SetOperator(event_shape=(1,), **SMALL)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(200):
        x = torch.randn(16, 1, 1) + 0.5 * torch.randn(16, 32, 1)
        loss = (network(x, network.context(x, 1.0)) - x.mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02  # of 0.25, the variance within a cloud
