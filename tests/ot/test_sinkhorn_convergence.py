"""Against an independent solver: the answers, and whether `converged` and `velocity_error` tell the truth."""

import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import references
from references import BACKENDS, clouds, relative

import gengrad.ot as ot


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("epsilon_rel", [0.02, 0.1, 1.0])
def test_float64_agrees_with_an_independent_newton_solver_to_a_millionth(d, epsilon_rel):
    x, y = clouds(60, 50, d)
    r = ot.sinkhorn_velocity(x, y, epsilon_rel=epsilon_rel, tol=1e-6)
    eps = float(r.epsilon)
    assert bool(r.converged)
    assert relative(r.velocity, references.velocity(x, y, eps)) < 1e-6  # the tolerance asked for
    _, f, g = references.plan(x, y, eps)
    loose = 1e-4 * eps  # potentials: a velocity converged to 1e-6 pins them much less
    assert np.abs(r.f.numpy() - f).max() < loose and np.abs(r.g.numpy() - g).max() < loose


@pytest.mark.parametrize("weighted", [False, True])
def test_the_value_is_the_primal_one_and_potentials_have_their_gauge(weighted):
    x, y = clouds(50, 40)
    g = torch.Generator().manual_seed(3)
    a = torch.rand(50, generator=g, dtype=torch.float64) + 0.1 if weighted else torch.ones(50).double()
    b = torch.rand(40, generator=g, dtype=torch.float64) + 0.1 if weighted else torch.ones(40).double()
    a, b = a / a.sum(), b / b.sum()
    r = ot.sinkhorn(x, y, epsilon=0.2, a=a, b=b, tol=1e-7)
    assert float(r.value) == pytest.approx(references.value(x, y, 0.2, a, b), rel=1e-9)  # errs in second order
    assert float((a * r.f).sum()) == pytest.approx(float((b * r.g).sum()), rel=1e-9)
    assert relative(r.target - x, r.velocity) < 1e-12  # its definition without debiasing
    s = ot.sinkhorn_divergence(x, y, epsilon=0.2, a=a, b=b, tol=1e-7)
    parts = [references.value(*p) for p in ((x, y, 0.2, a, b), (x, x, 0.2, a, a), (y, y, 0.2, b, b))]
    assert float(s) == pytest.approx(parts[0] - parts[1] / 2 - parts[2] / 2, rel=1e-7)


def test_pot_gives_the_same_plan_at_twice_epsilon():
    pot = pytest.importorskip("ot")
    x, y = clouds(50, 40)
    cost = torch.cdist(x, y).square().numpy()  # unhalved, hence the 2 below
    p = pot.sinkhorn(np.full(50, 1 / 50), np.full(40, 1 / 40), cost, 2 * 0.3, stopThr=1e-12, numItermax=20_000)
    assert relative(ot.sinkhorn(x, y, epsilon=0.3, tol=1e-7).target, 50 * p @ y.numpy()) < 1e-7


def test_geomloss_gives_the_same_divergence_and_velocity_at_blur_root_epsilon():
    geomloss = pytest.importorskip("geomloss")
    x, y = clouds(50, 40)
    x.requires_grad_()
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.3**0.5, scaling=0.99, backend="tensorized")(x, y)
    v = -50 * torch.autograd.grad(loss, x)[0]
    r = ot.sinkhorn_velocity(x.detach(), y, epsilon=0.3, tol=1e-7)
    assert relative(r.velocity, v) < 1e-2  # geomloss has no convergence test: 0.3 % is its error at this scaling
    value = ot.sinkhorn_divergence(x.detach(), y, epsilon=0.3, tol=1e-6)
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-4)


def image_like(n, d):
    """Noise, and smooth bounded fields, as columns of pixels."""
    g = torch.Generator().manual_seed(0)
    fields = torch.randn(n, d, generator=g).cumsum(1) / math.sqrt(d)
    return torch.randn(n, d, generator=g), torch.tanh(2 * fields)


CELLS = [
    (250, 2, 0.05),
    (250, 2, 0.5),
    (200, 10, 0.05),
    (200, 64, 0.05),
    (200, 64, 0.5),
    (150, 400, 0.05),
    (150, 400, 0.5),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, d, f", CELLS)
def test_the_true_error_is_below_tol_and_the_estimate_does_not_flatter(backend, n, d, f):
    x, y = image_like(n, d) if d >= 400 else clouds(n, n, d, dtype=torch.float32)
    x, y = x.float(), y.float()
    exact = ot.sinkhorn_velocity(x.double(), y.double(), epsilon_rel=2 * f * f, tol=1e-7, skip_self_mass=2.0)
    assert float(exact.marginal_error) < 1e-6
    for tol in (0.1, 0.03, 1e-2, 3e-3):
        r = ot.sinkhorn_velocity(x, y, epsilon=float(exact.epsilon), tol=tol, backend=backend)
        error = relative(r.velocity, exact.velocity)
        assert bool(r.converged)
        assert error <= 1.05 * tol  # the promise; 5 % for fp32's own error in the reference's inputs
        assert error <= 1.05 * float(r.velocity_error) + 1e-6


def separated_clusters(seed):
    """Clusters of unequal numbers of points, which must exchange mass over many kernel widths."""
    g = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(5, 2, generator=g)
    draw = [centres[torch.randint(5, (120,), generator=g)] + 0.3 * torch.randn(120, 2, generator=g) for _ in "xy"]
    return draw[0], draw[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("epsilon_rel", [0.003, 0.03])
def test_mass_in_the_wrong_cluster_is_not_mistaken_for_convergence(seed, epsilon_rel):
    """The case in which residuals say little. In float64 Newton steps solve it; float32 may give up, and says so."""
    x, y = separated_clusters(seed)
    fine = ot.sinkhorn_velocity(x.double(), y.double(), epsilon_rel=epsilon_rel, tol=1e-6)
    exact = references.velocity(x, y, float(fine.epsilon))
    assert bool(fine.converged) and relative(fine.velocity, exact) < 1e-6
    for backend in BACKENDS:
        r = ot.sinkhorn_velocity(x, y, epsilon=float(fine.epsilon), backend=backend)
        assert relative(r.velocity, exact) <= 1e-2 or not bool(r.converged)
        assert bool(r.converged) or epsilon_rel < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_solve_cut_short_says_so_and_warns(backend, caplog):
    x, y = clouds(100, 100, 2, dtype=torch.float32)
    with caplog.at_level(logging.WARNING, "gengrad.ot.sinkhorn"):
        r = ot.sinkhorn_velocity(x, y, epsilon_rel=1e-3, tol=1e-3, max_iter=6, backend=backend)
    assert not bool(r.converged)
    assert "missed the tolerance" in caplog.text and "max_iter" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
def test_along_a_flow_the_relative_error_stays_below_tol_although_the_velocity_shrinks(backend):
    x, y = clouds(150, 150, 2, dtype=torch.float32)
    epsilon, warm, first = 0.05, None, None
    for _ in range(15):
        warm = ot.sinkhorn_velocity(x, y, epsilon=epsilon, warm_start=warm, backend=backend)
        v = ot.sinkhorn_velocity(x.double(), y.double(), epsilon=epsilon, tol=1e-7).velocity
        first = first or float(v.norm())
        assert bool(warm.converged) and relative(warm.velocity, v) < 1e-2
        x = x + 0.3 * warm.velocity
    assert float(v.norm()) < 0.03 * first  # it did shrink


def test_float32_admits_that_it_cannot_reach_a_millionth():
    x, y = clouds(100, 100, 2, dtype=torch.float32)
    r = ot.sinkhorn_velocity(x, y, epsilon_rel=0.01, tol=1e-6)
    assert float(r.velocity_error) > 1e-6  # rounding is part of the estimate


def test_iterations_fall_with_a_warm_start_and_the_answer_stays():
    x, y = clouds(200, 200, 2)
    cold = ot.sinkhorn_velocity(x, y, epsilon=0.05, tol=1e-5)
    moved = x + 0.1 * cold.velocity
    warm = ot.sinkhorn_velocity(moved, y, epsilon=0.05, tol=1e-5, warm_start=cold)
    again = ot.sinkhorn_velocity(moved, y, epsilon=0.05, tol=1e-5)
    assert relative(warm.velocity, again.velocity) < 2e-5  # two solves, each to 1e-5
    assert int(warm.iterations) < int(again.iterations)


def test_a_useless_warm_start_costs_time_but_not_accuracy():
    x, y = clouds(100, 80, 2)
    other = ot.sinkhorn_velocity(x + 5, torch.flip(y, [0]) * 3, epsilon=0.05)
    r = ot.sinkhorn_velocity(x, y, epsilon=0.05, tol=1e-5, warm_start=other)
    assert relative(r.velocity, ot.sinkhorn_velocity(x, y, epsilon=0.05, tol=1e-5).velocity) < 2e-5
