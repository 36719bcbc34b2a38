"""Closed forms, limits and invariances of the Sinkhorn velocity and divergence."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from references import BACKENDS, clouds, relative

import gengrad.ot as ot

seeds = st.integers(0, 10_000)
few = settings(max_examples=8, deadline=None)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, d=st.integers(1, 6), epsilon=st.floats(1e-3, 10.0))
@few
def test_diracs_feel_the_straight_velocity_and_half_the_squared_distance(backend, seed, d, epsilon):
    x, y = torch.randn(2, 1, d, generator=torch.Generator().manual_seed(seed))
    cost = float((x - y).square().sum()) / 2
    epsilon = max(epsilon, 1e-4 * cost)
    v = ot.sinkhorn_velocity(x, y, epsilon=epsilon, backend=backend).velocity
    assert torch.allclose(v, y - x, atol=1e-5)  # fp32 rounding of coordinates of size 3
    s = ot.sinkhorn_divergence(x, y, epsilon=epsilon, backend=backend)
    assert float(s) == pytest.approx(cost, rel=1e-5, abs=1e-6)  # the same


@pytest.mark.parametrize("d", [1, 2, 10])
@pytest.mark.parametrize("epsilon_rel", [0.01, 0.3])
def test_a_cloud_against_itself_has_no_velocity_and_no_divergence(d, epsilon_rel):
    x = clouds(80, 80, d)[0]
    r = ot.sinkhorn_velocity(x, x.clone(), epsilon_rel=epsilon_rel, tol=1e-6, max_iter=20_000)
    assert float(r.velocity.abs().max()) < 1e-7  # coordinates of size one, both maps converged far below
    assert bool(r.converged)
    assert abs(float(ot.sinkhorn_divergence(x, x.clone(), epsilon_rel=epsilon_rel, tol=1e-6))) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds)
@few
def test_permuting_the_points_permutes_the_velocity(backend, seed):
    x, y = clouds(70, 60, 3, seed, torch.float32)
    g = torch.Generator().manual_seed(seed)
    i, j = torch.randperm(70, generator=g), torch.randperm(60, generator=g)
    v = ot.sinkhorn_velocity(x, y, tol=1e-4, backend=backend).velocity
    w = ot.sinkhorn_velocity(x[i], y[j], tol=1e-4, backend=backend).velocity
    assert relative(w, v[i]) < 3e-4  # two solves, each to 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds)
@few
def test_moving_both_clouds_changes_nothing_and_rotating_them_rotates_the_velocity(backend, seed):
    x, y = clouds(70, 60, 3, seed, torch.float32)
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]
    options = {"tol": 1e-4, "backend": backend}
    v = ot.sinkhorn_velocity(x, y, **options).velocity
    assert relative(ot.sinkhorn_velocity(x + 10, y + 10, **options).velocity, v) < 3e-4  # two solves
    assert relative(ot.sinkhorn_velocity(x @ q, y @ q, **options).velocity, v @ q) < 3e-4


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, c=st.floats(0.01, 100.0))
@few
def test_scaling_by_c_with_epsilon_by_c_squared_scales_the_velocity_by_c(backend, seed, c):
    x, y = clouds(70, 60, 2, seed, torch.float32)
    v = ot.sinkhorn_velocity(x, y, epsilon=0.2, tol=1e-4, backend=backend).velocity
    w = ot.sinkhorn_velocity(c * x, c * y, epsilon=0.2 * c * c, tol=1e-4, backend=backend).velocity
    assert relative(w, c * v) < 3e-4  # two solves, each to 1e-4


def test_duplicating_every_point_leaves_the_velocity_unchanged():
    x, y = clouds(50, 40, 2)
    v = ot.sinkhorn_velocity(x, y, epsilon=0.1, tol=1e-7).velocity
    w = ot.sinkhorn_velocity(x.repeat(2, 1), y.repeat(3, 1), epsilon=0.1, tol=1e-7).velocity
    assert relative(w, v.repeat(2, 1)) < 1e-6  # two solves, each to 1e-7


def test_weights_equal_to_multiplicities_act_as_duplicates():
    x, y = clouds(30, 20, 2)
    times = torch.arange(20) % 3 + 1
    b = times / times.sum()
    v = ot.sinkhorn_velocity(x, y, epsilon=0.1, b=b.double(), tol=1e-7).velocity
    w = ot.sinkhorn_velocity(x, y.repeat_interleave(times, 0), epsilon=0.1, tol=1e-7).velocity
    assert relative(v, w) < 1e-6  # two solves, each to 1e-7


def test_points_of_weight_zero_are_as_if_absent():
    x, y = clouds(30, 20, 2)
    far = torch.full((5, 2), 3.0, dtype=torch.float64)
    a = torch.cat([torch.full((30,), 1 / 30), torch.zeros(5)]).double()
    b = torch.cat([torch.full((20,), 1 / 20), torch.zeros(5)]).double()
    v = ot.sinkhorn_velocity(x, y, epsilon=0.1, tol=1e-7).velocity
    w = ot.sinkhorn_velocity(torch.cat([x, far]), torch.cat([y, -far]), epsilon=0.1, a=a, b=b, tol=1e-7).velocity
    assert relative(w[:30], v) < 1e-6  # two solves
    assert bool(torch.isfinite(w).all())


def test_as_epsilon_vanishes_the_velocity_between_gaussians_tends_to_the_bures_map():
    """In one dimension on quantile grids, where discretisation errors are far below the tolerance."""
    normal = torch.distributions.Normal(0.0, 1.0)
    grid = normal.icdf((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    x, y = 0.8 * grid + 1.0, 1.7 * grid - 0.5
    one = torch.ones(1, 1, dtype=torch.float64)
    k, offset = ot.bures_map(one[0], 0.64 * one, -0.5 * one[0], 2.89 * one)
    exact = x @ k.T + offset - x
    errors = [relative(ot.sinkhorn_velocity(x, y, epsilon=e, tol=1e-4).velocity, exact) for e in (0.2, 0.05, 0.0125)]
    # debiased maps err in the second order of epsilon: a factor 4 in epsilon is a factor of about 16
    # until the grid's own 4e-4, most of it in the tails, is reached
    assert errors[1] < errors[0] / 6 and errors[2] < 5e-4


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_the_entropic_cost_between_gaussians_is_that_of_janati_et_al(epsilon):
    normal = torch.distributions.Normal(0.0, 1.0)
    grid = normal.icdf((torch.arange(1500, dtype=torch.float64) + 0.5) / 1500)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    x, y = 0.8 * grid + 1.0, 1.7 * grid - 0.5
    exact = ot.gaussian_entropic_cost(one[0], 0.64 * one, -0.5 * one[0], 2.89 * one, epsilon)
    found = ot.sinkhorn(x, y, epsilon=epsilon, tol=1e-5).value
    assert float(found) == pytest.approx(float(exact), rel=2e-3)  # the grid cuts the tails: variance off by 1e-3


def test_the_entropic_gaussian_cost_tends_to_half_the_squared_wasserstein_distance():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 4, generator=g, dtype=torch.float64)
    m, p = torch.randn(2, 4, generator=g, dtype=torch.float64)
    a, b = a @ a.T + 0.1 * torch.eye(4), b @ b.T + 0.1 * torch.eye(4)
    half = float(ot.gaussian_w2(m, a, p, b)) ** 2 / 2
    cost = float(ot.gaussian_entropic_cost(m, a, p, b, 1e-6))
    assert cost == pytest.approx(half, abs=1e-4)  # the entropy of four directions times 1e-6 log 1e6


def test_the_bures_map_carries_one_covariance_to_the_other_and_is_symmetric():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 5, 5, generator=g, dtype=torch.float64)
    m, p = torch.randn(2, 5, generator=g, dtype=torch.float64)
    a, b = a @ a.T + 0.1 * torch.eye(5), b @ b.T
    k, offset = ot.bures_map(m, a, p, b)
    assert torch.allclose(k @ a @ k.T, b, atol=1e-9)  # float64, conditioning 1e3
    assert torch.allclose(k, k.T, atol=1e-9)
    assert torch.allclose(k @ m + offset, p, atol=1e-9)


def test_gaussian_closed_forms_refuse_what_is_no_covariance():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="no"):
        ot.gaussian_w2(torch.zeros(2), -eye, torch.zeros(2), eye)
    with pytest.raises(ValueError, match="epsilon"):
        ot.gaussian_entropic_cost(torch.zeros(2), eye, torch.zeros(2), eye, 0.0)


def test_exact_transport_agrees_with_the_assignment_and_with_one_dimensional_sorting():
    x, y = clouds(40, 40, 1, dtype=torch.float32)
    j = ot.exact_assignment(x, y)
    assert torch.equal(y[j][x[:, 0].argsort()], y.sort(0).values)  # monotone
    mean_square = float((x.sort(0).values - y.sort(0).values).square().mean())
    assert ot.wasserstein2(x, y) == pytest.approx(math.sqrt(mean_square), rel=1e-5)  # fp32 inputs
    assert torch.allclose(ot.exact_plan(x, y)[torch.arange(40), j], torch.full((40,), 1 / 40))


@pytest.mark.parametrize("guess", ["good", "zero", "wrong"])
def test_an_assignment_from_a_potential_is_exact_however_good_the_potential_is(guess):
    x, y = clouds(90, 90, 3, dtype=torch.float32)
    solved = ot.sinkhorn(x, y, epsilon_rel=0.01).g
    potential = {"good": solved, "zero": 0 * solved, "wrong": -3 * solved.flip(0)}[guess]
    assert torch.equal(ot.exact_assignment(x, y, potential), ot.exact_assignment(x, y))


@pytest.mark.parametrize("n", [1, 2, 5, 40, 130])
@pytest.mark.parametrize("ties", [False, True])
def test_the_compiled_assignment_is_as_cheap_as_scipys_from_any_start(n, ties):
    assign = pytest.importorskip("gengrad.ot.assignment_numba").assign
    from scipy.optimize import linear_sum_assignment

    random = np.random.default_rng(n)
    for scale in (0.0, 1.0, 10.0):
        cost = random.integers(0, 4, (n, n)).astype(float) if ties else random.random((n, n))
        columns = assign(cost.copy(), scale * random.normal(size=n))
        best = cost[linear_sum_assignment(cost)].sum()
        assert sorted(columns) == list(range(n)) and cost[np.arange(n), columns].sum() == pytest.approx(best)


def test_an_assignment_without_numba_is_the_same(monkeypatch):
    x, y = clouds(60, 60, 2, dtype=torch.float32)
    g = ot.sinkhorn(x, y, epsilon_rel=0.01).g
    compiled = ot.exact_assignment(x, y, g)
    monkeypatch.setattr(ot.exact, "has_numba", lambda: False)
    assert torch.equal(ot.exact_assignment(x, y, g), compiled)


def test_exact_transport_refuses_clouds_of_unequal_size_for_an_assignment():
    with pytest.raises(ValueError, match="as many"):
        ot.exact_assignment(*clouds(4, 5))
    with pytest.raises(ValueError, match="potential"):
        ot.exact_assignment(*clouds(4, 4), torch.zeros(5))


def test_a_flow_in_the_span_of_its_points_is_the_flow_itself():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 15, 400, generator=g, dtype=torch.float64)
    p, q, basis = ot.rotate_to_span(x, y[:12])
    assert p.shape == (15, 27) and basis.shape == (400, 27)
    for _ in range(3):
        x = x + 0.3 * ot.sinkhorn_velocity(x, y[:12], epsilon=20.0, tol=1e-8).velocity
        p = p + 0.3 * ot.sinkhorn_velocity(p, q, epsilon=20.0, tol=1e-8).velocity
    assert relative(p @ basis.T, x) < 1e-8  # both solved to that


def test_clouds_of_low_dimension_are_not_rotated():
    x, y = clouds(10, 8, 3)
    p, q, basis = ot.rotate_to_span(x, y)
    assert p is x and q is y and torch.equal(basis, torch.eye(3, dtype=x.dtype))
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        ot.rotate_to_span(x[None], y)
