"""The exact implicit steps and the continuous flows they discretise, against each other and against known values."""

import math

import pytest
import torch

from gengrad.ot import bures_map, gaussian_jko_step, gaussian_kl, gaussian_w2, ornstein_uhlenbeck
from gengrad.ot.spreading import (
    aggregation_energy,
    aggregation_jko_radius,
    aggregation_radius,
    barenblatt_constant,
    barenblatt_continuous_radius,
    barenblatt_energy,
    barenblatt_jko_radius,
    barenblatt_radius,
)

ONE = torch.ones(1, 1, dtype=torch.float64)
ZERO = torch.zeros(1, dtype=torch.float64)


def spd(d, seed):
    m = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return m @ m.mT / d + 0.3 * torch.eye(d)


def jko(cov, a, n, t=1.0):
    m = torch.zeros(len(cov), dtype=torch.float64)
    for _ in range(n):
        m, cov = gaussian_jko_step(m, cov, a, torch.zeros_like(m), 1.0, t / n)
    return cov


@pytest.mark.parametrize(("n", "value"), [(1, 1.866025), (10, 1.464165), (100, 1.411985)])
def test_implicit_steps_of_the_ornstein_uhlenbeck_process(n, value):
    assert float(jko(4 * ONE, ONE, n)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("n", "value"), [(1, 2.618034), (10, 2.947516), (100, 2.994533)])
def test_implicit_steps_of_the_heat_equation(n, value):
    assert float(jko(ONE, 0 * ONE, n)) == pytest.approx(value, abs=1e-6)
    assert float(ornstein_uhlenbeck(ZERO, ONE, 0 * ONE, ZERO, 1.0, 1.0)[1]) == pytest.approx(3.0)


def test_the_continuous_law_is_the_limit_of_the_implicit_steps_and_solves_its_equation():
    a, cov, b = spd(3, 0), spd(3, 1), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    truth = ornstein_uhlenbeck(mean, cov, a, b, 0.7, 0.4)
    m, s = mean, cov
    for _ in range(400):
        m, s = gaussian_jko_step(m, s, a, b, 0.7, 0.001)
    assert torch.allclose(m, truth[0], atol=2e-3) and torch.allclose(s, truth[1], atol=2e-3)  # first order in tau
    near = ornstein_uhlenbeck(mean, cov, a, b, 0.7, 0.4 + 1e-6)
    slope = (near[1] - truth[1]) / 1e-6
    assert torch.allclose(slope, -a @ truth[1] - truth[1] @ a + 1.4 * torch.eye(3), atol=1e-4)


def test_the_stationary_law_is_a_fixed_point_for_every_tau():
    a, b = spd(3, 2), torch.ones(3, dtype=torch.float64)
    for tau in (0.01, 1.0, 30.0):
        m, s = gaussian_jko_step(b, torch.linalg.inv(a), a, b, 1.0, tau)
        assert torch.allclose(m, b) and torch.allclose(s, torch.linalg.inv(a))


def test_no_gaussian_nearby_has_a_lower_objective_than_the_implicit_step():
    a, s_0, b, tau = spd(3, 3), spd(3, 4), torch.zeros(3, dtype=torch.float64), 0.5
    zero = torch.zeros(3, dtype=torch.float64)
    _, s = gaussian_jko_step(zero, s_0, a, b, 1.0, tau)

    def objective(c):
        entropy = -torch.linalg.slogdet(c).logabsdet / 2
        return (a @ c).trace() / 2 + entropy + gaussian_w2(zero, s_0, zero, c) ** 2 / (2 * tau)

    for seed in range(10):
        e = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert objective(s) < objective(s + 1e-3 * (e + e.mT))
    # and the map onto it has the stated form K = (M - c S'^{-1})^{-1}
    k = torch.linalg.inv(torch.eye(3) + tau * a - tau * torch.linalg.inv(s))
    assert torch.allclose(k, bures_map(zero, s_0, zero, s)[0])


def test_kl_between_gaussians_is_zero_at_equality_and_known_on_the_line():
    assert float(gaussian_kl(ZERO, ONE, ZERO, ONE)) == pytest.approx(0.0)
    assert float(gaussian_kl(ZERO + 1, ONE, ZERO, 4 * ONE)) == pytest.approx(0.5 * (0.25 + 0.25 - 1 + math.log(4)))


def test_barenblatt_profiles_have_the_known_radii_constants_and_energy():
    assert barenblatt_constant(2, 1) == pytest.approx(0.75)
    assert barenblatt_constant(2, 2) == pytest.approx(2 / math.pi)
    assert barenblatt_radius(0.5, 0.1, 2, 1) == pytest.approx(1.008265, abs=1e-6)
    for n, value in ((10, 0.989192), (100, 1.006214)):
        r = 0.5
        for _ in range(n):
            r = barenblatt_jko_radius(r, 0.1 / n, 2, 1)
        assert r == pytest.approx(value, abs=1e-6)
    steady = barenblatt_continuous_radius(0.5, 50.0, 2, 1, stiffness=2.0)
    assert steady == pytest.approx(1.144714, abs=1e-6)
    assert barenblatt_energy(steady, 2, 1, stiffness=2.0) == pytest.approx(0.786222, abs=1e-6)
    assert barenblatt_jko_radius(steady, 0.3, 2, 1, stiffness=2.0) == pytest.approx(steady)


def test_aggregation_comes_to_rest_at_the_known_radius_and_energy():
    assert aggregation_energy(math.sqrt(2), 1) == pytest.approx(3 / 8 + math.log(2) / 4)
    for d in (1, 2):
        rest = aggregation_radius(3.0, 50.0, d)
        assert aggregation_jko_radius(rest, 0.2, d) == pytest.approx(rest)
        h = 1e-6  # the energy is least there
        assert aggregation_energy(rest, d) < min(aggregation_energy(rest - h, d), aggregation_energy(rest + h, d))
