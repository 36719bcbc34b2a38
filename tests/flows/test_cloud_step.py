"""Implicit steps of a cloud: closed forms, order on the line, what it refuses."""

import pytest
import torch

from gengrad.flows.cloud_step import implicit_cloud_step
from gengrad.functionals import Entropy, InteractionEnergy, PotentialEnergy, SinkhornDivergence
from gengrad.functionals.potential import Quadratic

TAU = 0.3


def cloud(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 3])
def test_attraction_draws_to_the_mean(d):
    x = cloud(50, d)
    y = implicit_cloud_step(InteractionEnergy(attraction=2.0, repulsion=None), x, TAU)
    assert torch.allclose(y, x.mean(0) + (x - x.mean(0)) / (1 + TAU), atol=1e-5)


def test_a_quadratic_potential_shrinks():
    x = cloud(50, 2)
    y = implicit_cloud_step(PotentialEnergy(Quadratic()), x, TAU)
    assert torch.allclose(y, x / (1 + TAU), atol=1e-5)


def test_two_particles_that_repel_by_the_logarithm():
    """F = W(s) / 2, W(s) = s^2/2 - log s, so n dF/ds = W'(s) at each end: s - s0 = -2 tau W'(s)."""
    x = torch.tensor([[0.0], [0.1]], dtype=torch.float64)
    y = implicit_cloud_step(InteractionEnergy(attraction=2.0, repulsion=0.0), x, TAU)
    s = float(y[1] - y[0])
    assert s - 0.1 == pytest.approx(-2 * TAU * (s - 1 / s), abs=1e-5)
    assert float(y.mean()) == pytest.approx(0.05, abs=1e-6)


def test_on_the_line_the_order_is_kept_and_the_energy_falls():
    energy = InteractionEnergy(attraction=2.0, repulsion=0.0)
    x = torch.cat([torch.linspace(-0.5, 0.5, 200)[:, None].double(), torch.tensor([[1e-7]]).double()])
    y = implicit_cloud_step(energy, x, TAU)
    assert bool((y[x[:, 0].argsort(), 0].diff() >= 0).all())
    assert energy(y, None) + (y - x).square().mean() / (2 * TAU) < energy(x, None)


def test_a_divergence_that_is_computed_to_a_tolerance():
    energy = SinkhornDivergence(cloud(100, 2, 1) / 4, epsilon=0.1)
    x = cloud(100, 2) + 1
    y = implicit_cloud_step(energy, x, 0.5)
    y.requires_grad_(True)
    (gradient,) = torch.autograd.grad(energy(y, None), y)
    left = y - x + 0.5 * 100 * gradient
    assert float(left.detach().norm()) < 2e-3 * float((y - x).detach().norm())


def test_an_entropy_is_refused():
    with pytest.raises(ValueError, match="without a density"):
        implicit_cloud_step(Entropy(), cloud(10, 1), TAU)


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_the_steps_are_the_same_in_other_units(unit):
    """W = z^2/2 keeps tau, whatever the unit of length; |z| has a kink at the minimum, and no unit hides that."""
    x = cloud(40, 2)
    y = implicit_cloud_step(InteractionEnergy(attraction=2.0, repulsion=None), unit * x, TAU)
    assert torch.allclose(y / unit, x.mean(0) + (x - x.mean(0)) / (1 + TAU), atol=1e-5)
    with pytest.raises(ValueError, match="did not converge"):
        implicit_cloud_step(InteractionEnergy(attraction=1.0, repulsion=None), unit * x, 3 * unit)


def test_a_step_that_does_not_end_is_told():
    class Rough(PotentialEnergy):
        """Its slope has nothing to do with its value."""

        def value(self, x):
            return x.square().mean().detach() + (x - x.detach()).sum()

    with pytest.raises(ValueError, match="did not converge"):
        implicit_cloud_step(Rough(Quadratic()), cloud(10, 2), TAU)
