"""The solver of implicit steps on the line against the closed forms of the implicit step."""

import math

import pytest
import torch

from gengrad.data import GaussianMixture
from gengrad.data.profiles import Barenblatt
from gengrad.flows.line import Line, carried, implicit_step
from gengrad.functionals import Entropy, InteractionEnergy, PotentialEnergy, PowerEntropy
from gengrad.ot import gaussian_jko_step
from gengrad.ot.spreading import barenblatt_jko_radius


def gaussian(x, mean=0.0, variance=1.0):
    return -(x[:, 0] - mean).square() / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)


def moments(line):
    mean = (line.mass * line.x).sum()
    return float(mean), float((line.mass * (line.x - mean).square()).sum())


def test_the_heat_step_of_a_gaussian_is_the_exact_one():
    line = Line.of(gaussian, -20, 20)
    for _ in range(10):
        line = implicit_step(Entropy(), line, 0.1)
    # 2.947516: ten exact implicit steps from variance 1; 2,000 intervals are off by their width squared
    assert moments(line)[1] == pytest.approx(2.947516, abs=2e-4)


def test_the_fokker_planck_step_of_a_gaussian_is_the_exact_one():
    functional = PotentialEnergy(potential={"name": "quadratic", "stiffness": 2.0, "centre": [1.0]}) + 0.5 * Entropy()
    line = implicit_step(functional, Line.of(lambda x: gaussian(x, -1.0, 0.3), -20, 20), 0.2)
    one = [torch.tensor(v, dtype=torch.float64) for v in ([-1.0], [[0.3]], [[2.0]], [1.0])]
    mean, cov = gaussian_jko_step(*one, 0.5, 0.2)
    assert moments(line) == (pytest.approx(float(mean), abs=1e-6), pytest.approx(float(cov), abs=1e-5))


def test_the_porous_medium_step_of_a_barenblatt_profile_scales_it():
    law = Barenblatt(radius=0.5, m=2.0, dimension=1)
    line = implicit_step(PowerEntropy(m=2.0), Line.of(law.log_density, -2, 2), 0.01)
    # the profile ends in a corner, which the intervals cut off by their width
    assert moments(line)[1] == pytest.approx(barenblatt_jko_radius(0.5, 0.01, 2.0, 1) ** 2 / 5, rel=2e-3)


def test_points_are_carried_with_their_densities():
    start = Line.of(gaussian, -20, 20)
    now = implicit_step(Entropy(), start, 0.1)
    x = torch.tensor([[-1.3], [0.0], [2.1]], dtype=torch.float64)
    y, log_rho = carried(start, now, x, gaussian(x))
    k = (1 + math.sqrt(1 + 4 * 0.1)) / 2  # K of a heat step from variance 1: K^2 - K - tau = 0
    assert torch.allclose(y, k * x, atol=1e-4)
    assert torch.allclose(log_rho, gaussian(x) - math.log(k), atol=1e-4)


def test_the_objective_is_least_at_the_step_of_a_double_well():
    """No closed form: moving any part of the solution raises tau F + E |T x - x|^2 / 2."""
    functional = PotentialEnergy(potential={"name": "double_well"}) + 0.3 * Entropy()
    law = GaussianMixture(means=[[-0.5], [1.5]], scales=[0.4, 0.3])
    start = Line.of(law.log_density, -6, 6, nodes=401)
    found = implicit_step(functional, start, 0.1)

    def objective(t):
        log_rho = start.log_rho + (start.x.diff() / t.diff()).log()
        energy = (start.mass * functional.terms[0][1].V(t[:, None])).sum() + 0.3 * (start.between * log_rho).sum()
        return float(0.1 * energy + (start.mass * (t - start.x).square()).sum() / 2)

    least = objective(found.x)
    for frequency in (0.5, 1.0, 3.0):
        for sign in (-1, 1):
            assert objective(found.x + sign * 1e-3 * torch.sin(frequency * found.x)) > least
    assert objective(start.x) > least


def test_functionals_of_pairs_are_refused():
    with pytest.raises(ValueError, match="potential and internal energies alone"):
        implicit_step(InteractionEnergy(), Line.of(gaussian, -9, 9), 0.1)
