"""Clouds of so many points: a lattice of the cube, and points that settle until their density is the measure's."""

import math

import pytest
import torch

from gengrad.data import GaussianMixture
from gengrad.data.even_clouds import MOST, lattice, settled
from gengrad.data.families import points_of_the_cube
from gengrad.data.family_members import GaussianMembers
from gengrad.networks.kernels import smoothed
from gengrad.registry import FAMILIES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(count: int = 1, d: int = 2, **settings) -> GaussianMembers:
    settings = {"name": "mixtures", "smallest": 0.4, "reach": 1.0, "oblong": True, **settings}
    return FAMILIES.build(settings).members(count, d, generator(1))


def test_the_golden_lattice_is_evenly_spread_in_the_plane():
    """Of 987 = F_16 points none is nearer to another one on the torus than 0.9 times (n sqrt(5))^{-1/2}."""
    n = 987
    u = lattice(points_of_the_cube(1, n, 3, generator()), 2)
    assert (u >= 0).all() and (u < 1).all()
    assert torch.allclose(u[0, :, 0].sort()[0], (torch.arange(n).double() + 0.5) / n)
    away = (u[0, :, None, :2] - u[0, None, :, :2] + 0.5) % 1 - 0.5
    nearest = (away.norm(dim=-1) + torch.eye(n)).min()
    assert nearest > 0.9 / math.sqrt(n * math.sqrt(5))
    net = points_of_the_cube(1, n, 2, generator())[0]
    away = (net[:, None] - net[None] + 0.5) % 1 - 0.5
    assert (away.norm(dim=-1) + torch.eye(n)).min() < nearest / 2  # of a Sobol net some are much nearer


def test_a_lattice_keeps_the_order_of_what_it_replaces_and_the_coordinates_beyond():
    u = points_of_the_cube(2, 64, 3, generator())
    found = lattice(u, 2)
    assert torch.equal(found[..., 0].argsort(1), u[..., 0].argsort(1)) and torch.equal(found[..., 2], u[..., 2])
    assert torch.equal(lattice(u, 1)[..., 1:], u[..., 1:])
    assert not torch.allclose(found[0, :, 1].sort()[0], found[1, :, 1].sort()[0])  # shifted as u is


def error(members: GaussianMembers, x: torch.Tensor, h: float) -> float:
    """Of the score of a kernel estimate at the points, in root mean square, as a share of the exact one."""
    logs = members._smoothed(torch.full((len(x), 1, 1), h, dtype=torch.float64))
    leaf = x.clone().requires_grad_(True)
    exact = h * torch.autograd.grad(logs(leaf).sum(), leaf)[0]
    found = smoothed(x, x, torch.full((len(x), 1, 1), h, dtype=torch.float64), 1)[1][..., 0, :]
    return float(((found - exact).square().sum() / exact.square().sum()).sqrt())


@pytest.mark.parametrize(("d", "h"), [(2, 0.4), (3, 0.8)])
def test_points_that_have_settled_have_the_density_of_their_measure(d, h):
    members = mixture(4, d)
    x = members.push(lattice(points_of_the_cube(4, 512, d + 1, generator()), d))
    still = settled(x, members.log_density, members._smoothed)
    assert error(members, still, h) < 0.55 * error(members, x, h)
    assert (still - x).norm(dim=-1).mean() < 0.2  # by less than two of their distances


def test_a_cloud_that_is_off_in_the_large_comes_back():
    """Wide kernels see it, narrow ones do not: a cloud shifted by half a deviation loses half of the shift."""
    members = mixture(2)
    x = members.push(lattice(points_of_the_cube(2, 512, 3, generator()), 2)) + 0.2
    still = settled(x, members.log_density, members._smoothed)
    mean = members.moments()[0]
    assert (x.mean(1) - mean).abs().min() > 0.15 and (still.mean(1) - mean).abs().max() < 0.1


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_few_points_and_narrow_components_settle_too(n):
    members = mixture(3, smallest=0.002, largest=0.01)
    x = members.cloud(points_of_the_cube(3, n, 3, generator()))
    assert x.shape == (3, n, 2) and x.isfinite().all() and x.abs().max() < 1.5


def test_narrow_components_far_apart_keep_their_density():
    """Kernels of 1e-4 of the cloud's size: their exponents are no floats of single precision."""
    law = GaussianMixture(means=[[0.0, 0.0], [100.0, 0.0]], scales=[0.01, 0.01])
    x = law.even(1024, generator())
    entropy = 1 + math.log(2 * math.pi * 0.01**2) + math.log(2)
    assert float(-law.log_density(x).mean()) == pytest.approx(entropy, abs=0.02)


@pytest.mark.parametrize(("n", "d"), [(MOST + 1, 2), (512, 4), (64, 200), (512, 1)])
def test_what_does_not_settle_stays(n, d):
    """Many points, whose lattice is near enough; dimensions in which so many say nothing; quantiles."""
    members = FAMILIES.build({"name": "gaussians"}).members(1, d, generator(1))
    x = members.push(points_of_the_cube(1, n, d + 1, generator()))
    assert torch.equal(settled(x, members.log_density, members._smoothed), x)
    assert members.cloud(points_of_the_cube(1, n, d + 1, generator())).isfinite().all()


def test_above_three_dimensions_each_coordinate_has_its_own_ranks():
    u = points_of_the_cube(2, 100, 5, generator())
    found = lattice(u, 4)
    assert torch.equal(found[..., :4].argsort(1), u[..., :4].argsort(1)) and torch.equal(found[..., 4], u[..., 4])
    assert torch.allclose(found[..., :4].sort(1)[0], ((torch.arange(100).double() + 0.5) / 100)[:, None].expand(100, 4))


def test_settling_does_not_depend_on_the_other_measures():
    members = mixture(3)
    u = points_of_the_cube(3, 128, 3, generator())
    alone = GaussianMembers(members.means[1:2], members.factors[1:2], members.weights[1:2]).cloud(u[1:2])
    assert torch.allclose(members.cloud(u)[1:2], alone, atol=1e-5)
