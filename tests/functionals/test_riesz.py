"""RieszMMD: its one-sided derivative at split atoms, its unbiased estimate, its closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from gengrad.functionals import EnergyDistance, RieszMMD


def cloud(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_atoms():
    """Particles of which three share a place with one another and with a target point."""
    x, y = cloud(6, 2, 0), cloud(4, 2, 1)
    x[1], x[4], y[2] = x[0], x[0], x[0]
    return x, y, cloud(6, 2, 2)


@pytest.mark.parametrize("towards", [True, False])
@pytest.mark.parametrize("r", [1.0, 1.5])
def test_the_directional_derivative_is_the_limit_of_differences_where_points_coincide(r, towards):
    x, y, v = with_atoms()
    functional, h = RieszMMD(y if towards else None, r=r), 1e-6
    slope = float(functional(x + h * v) - functional(x)) / h
    # coincident pairs leave h^(r - 1) = 1e-3 for r = 1.5, everything else h
    assert float(functional.directional_derivative(x, v)) == pytest.approx(slope, abs=1e-3 if r > 1 else 1e-5)


def test_for_r_below_one_atoms_burst_at_infinite_speed_and_a_target_holds_them():
    x, y, v = with_atoms()
    assert float(RieszMMD(r=0.5).directional_derivative(x, v)) == -math.inf
    # three particles on one target point of four: the pull 1/4 |v|^r is stronger than 1/12 |v - v'|^r
    assert float(RieszMMD(y, r=0.5).directional_derivative(x, v)) == math.inf
    assert math.isfinite(RieszMMD(y, r=0.5).directional_derivative(cloud(6, 2, 3), v))


@pytest.mark.parametrize("r", [1.0, 1.5])
def test_the_directional_derivative_is_positively_homogeneous(r):
    x, y, v = with_atoms()
    functional = RieszMMD(y, r=r)
    ahead, back = functional.directional_derivative(x, v), functional.directional_derivative(x, -v)
    assert torch.allclose(functional.directional_derivative(x, 3 * v), 3 * ahead)
    assert torch.allclose(back, -ahead) == (r > 1)  # one-sided only where coincident pairs count


def test_at_a_dirac_only_the_coincident_rule_is_left():
    x, v = torch.zeros(50, 3, dtype=torch.float64), cloud(50, 3, 0)
    pairs = torch.cdist(v, v).sum()
    assert float(RieszMMD().directional_derivative(x, v)) == pytest.approx(-float(pairs) / 2 / 50**2)
    unbiased = RieszMMD().directional_derivative(x, v, of_draws=True)
    assert float(unbiased) == pytest.approx(-float(pairs) / 2 / (50 * 49))
    assert float(RieszMMD(r=1.5).directional_derivative(x, v)) == 0


def test_the_derivative_can_be_descended_at_a_dirac():
    x, v = torch.zeros(20, 2, dtype=torch.float64), cloud(20, 2, 0).requires_grad_()
    RieszMMD().directional_derivative(x, v).backward()
    # d/dv_i of -1/2 mean |v_i - v_k| points inwards: minus the mean direction to the others
    expected = -((v[:, None] - v) / (torch.cdist(v, v)[..., None] + 1e-300)).sum(1) / 20**2
    assert torch.allclose(v.grad, expected, atol=1e-9)


@pytest.mark.parametrize("r", [0.5, 1.0, 1.5])
def test_without_coincident_points_the_derivative_is_minus_the_velocity_along_v(r):
    x, y, v = cloud(8, 2, 0), cloud(5, 2, 1), cloud(8, 2, 2)
    functional = RieszMMD(y, r=r)
    expected = -(functional.velocity(x) * v).sum() / 8
    assert torch.allclose(functional.directional_derivative(x, v), expected)


@pytest.mark.parametrize("towards", [True, False])
def test_the_estimate_from_draws_is_unbiased(towards):
    line = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([[0.5]], dtype=torch.float64)
    functional = RieszMMD(y if towards else None)
    triples = torch.cartesian_prod(*[torch.arange(3)] * 3)
    mean = sum(functional.of_draws(line[i]) for i in triples) / len(triples)  # over all equally likely draws of three
    assert float(mean) == pytest.approx(float(functional(line)))  # a single target point has no constant


def test_energy_distance_is_the_case_r_one():
    x, y = cloud(9, 3, 0), cloud(7, 3, 1)
    assert torch.equal(EnergyDistance(y)(x), RieszMMD(y, r=1.0)(x))
    with pytest.raises(ValueError, match="r"):
        EnergyDistance(y, r=1.5)


def test_the_functional_falls_along_its_flow_for_any_r_and_by_slices():
    from gengrad.flows import particle_flow

    x, y = cloud(60, 2, 0), cloud(50, 2, 1) + 3
    for settings in ({"r": 0.7}, {"r": 1.0, "route": "slices"}, {"r": 1.6}):
        values = particle_flow(RieszMMD(y, **settings), x, [0.2] * 8, record_values=True).values
        assert all(after < before for before, after in pairwise(values))


def test_interaction_conserves_the_mean():
    x = cloud(40, 3, 0)
    assert RieszMMD(r=1.3).velocity(x).mean(0).abs().max() < 1e-12


@pytest.mark.parametrize("r", [0.0, 2.0, -1.0])
def test_an_exponent_outside_of_zero_and_two_is_refused(r):
    with pytest.raises(ValueError, match="r"):
        RieszMMD(r=r)


def test_one_draw_makes_no_pair():
    for estimate in (RieszMMD().of_draws, lambda x: RieszMMD().directional_derivative(x, x, of_draws=True)):
        with pytest.raises(ValueError, match="at least two"):
            estimate(torch.zeros(1, 2))


def test_an_empty_target_is_refused():
    with pytest.raises(ValueError, match="interaction energy alone"):
        RieszMMD(torch.zeros(0, 2))
