"""The particle flow: descends its functional, and ends on the target when the clock says so."""

import pytest
import torch

from gengrad.flows.particles import geodesic_taus, geodesic_times, particle_flow
from gengrad.functionals import EnergyDistance, SinkhornDivergence
from gengrad.functionals.base import Functional


def cloud(n, seed, shift=0.0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) + shift


def test_each_step_moves_by_tau_times_the_velocity():
    x, functional = cloud(20, 0), EnergyDistance(cloud(30, 1, 3.0))
    flow = particle_flow(functional, x, [0.1, 0.2])
    assert flow.states.shape == (3, 20, 2)
    assert torch.allclose(flow.states[1], x + 0.1 * functional.velocity(x))
    assert torch.allclose(flow.states[2], flow.states[1] + 0.2 * functional.velocity(flow.states[1]))


@pytest.mark.parametrize("name", ["energy", "sinkhorn"])
def test_the_functional_falls_along_its_flow(name):
    y = cloud(60, 1, 2.0)
    functional = EnergyDistance(y) if name == "energy" else SinkhornDivergence(y, epsilon=0.2, tol=1e-3)
    flow = particle_flow(functional, cloud(50, 0), [0.2] * 10, record_values=True)
    assert len(flow.values) == 11
    assert all(after < before for before, after in zip(flow.values, flow.values[1:]))


def test_the_geodesic_clock_turns_constant_steps_into_one_minus_a_power():
    times = [1 - 0.7**k for k in range(6)]
    assert geodesic_taus(times) == pytest.approx([0.3] * 5)
    assert geodesic_taus(geodesic_times(4)) == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])


def test_a_flow_towards_one_dirac_on_the_geodesic_clock_is_straight_and_ends_there():
    x, y = cloud(10, 0), torch.tensor([[4.0, -1.0]])
    flow = particle_flow(SinkhornDivergence(y.expand(7, 2).clone(), epsilon=10.0), x, geodesic_taus(geodesic_times(4)))
    # a strong epsilon makes the self plan uniform: the debiased flow carries the mean to the Dirac, keeps the shape
    expected = x + (y - x.mean(0))
    assert torch.allclose(flow.states[-1].mean(0), expected.mean(0), atol=1e-3)


def test_a_density_is_not_to_be_had_from_particles():
    class Entropy(Functional):
        needs_density = True

        def value(self, x):
            raise NotImplementedError

    with pytest.raises(ValueError, match="needs a density"):
        particle_flow(Entropy(), cloud(3, 0), [0.1])


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_that_is_not_positive_and_finite_is_refused(tau):
    with pytest.raises(ValueError, match="positive and finite"):
        particle_flow(EnergyDistance(cloud(3, 1)), cloud(3, 0), [tau])


def test_with_momentum_a_step_goes_on_with_part_of_the_last_one():
    x, functional = cloud(20, 0), EnergyDistance(cloud(30, 1, 3.0))
    flow = particle_flow(functional, x, [0.1, 0.2], momentum=0.7)
    first = functional.velocity(x)
    second = 0.7 * first + functional.velocity(x + 0.1 * first)
    assert torch.allclose(flow.states[1], x + 0.1 * first) and torch.allclose(flow.velocities[1], second)
    assert torch.allclose(flow.states[2], flow.states[1] + 0.2 * second)


def test_of_several_steps_the_last_state_and_the_mean_velocity_are_kept():
    x, functional, taus = cloud(20, 0), EnergyDistance(cloud(30, 1, 3.0)), [0.1, 0.2, 0.3, 0.4]
    every, kept = (particle_flow(functional, x, taus, momentum=0.5, every=k) for k in (1, 2))
    assert torch.equal(kept.states, every.states[::2]) and kept.velocities.shape == (2, 20, 2)
    assert kept.taus == pytest.approx((0.3, 0.7))
    assert torch.allclose(kept.velocities[0], (every.states[2] - every.states[0]) / 0.3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"momentum": 1.0}, "momentum=1"),
        ({"momentum": -0.1}, "momentum"),
        ({"every": 2}, "every=2"),
        ({"every": 0}, "every=0"),
    ],
)
def test_momentum_and_the_steps_kept_are_checked(changes, told):
    with pytest.raises(ValueError, match=told):
        particle_flow(EnergyDistance(cloud(3, 1)), cloud(3, 0), [0.1] * 3, **changes)
