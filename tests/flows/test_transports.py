"""Solvers keep their order; transports count what they spend."""

import math

import pytest
import torch
from torch import nn

from gengrad.flows.solvers import EVALUATIONS, SOLVERS, integrate, steps_for
from gengrad.flows.transports import VelocityTransport, transport_from
from gengrad.networks import MLP

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def error(solver, steps):
    """|x(1) - exact| for dx/dt = x cos t, x(0) = 1: x(1) = exp(sin 1)."""
    *_, x = integrate(lambda x, t: x * t.cos()[:, None], torch.ones(1, 1, dtype=torch.float64), 0.0, 1.0, steps, solver)
    return abs(float(x) - math.exp(math.sin(1)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver):
    measured = math.log2(error(solver, 8) / error(solver, 16))
    assert measured == pytest.approx(ORDER[solver], abs=0.25)  # the next term of the expansion is a fraction of 1/8


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_budget_is_what_the_network_is_asked(solver):
    asked = []

    class Counting(MLP):
        def forward(self, x, t, y=None):
            asked.append(len(x))
            return super().forward(x, t)

    transport = VelocityTransport(Counting(event_shape=(2,)), solver=solver)
    nfe = 3 * EVALUATIONS[solver]
    assert transport.cost(nfe) == nfe
    transport.push(torch.randn(5, 2), nfe=nfe)
    assert asked == [5] * nfe


def test_an_odd_budget_is_refused_by_a_solver_of_two_evaluations():
    with pytest.raises(ValueError, match="no multiple of 2"):
        steps_for("heun", 5)
    with pytest.raises(ValueError, match="at least 1"):
        steps_for("euler", 0)


def test_a_constant_velocity_is_followed_exactly_in_one_evaluation():
    class Constant(nn.Module):
        event_shape = (2,)

        def forward(self, x, t, y=None):
            return torch.ones_like(x)

    x = torch.randn(4, 2)
    assert torch.allclose(VelocityTransport(Constant(), 0.25, 1.0).push(x, nfe=1), x + 0.75)


def test_a_transport_is_rebuilt_from_its_description():
    transport = VelocityTransport(MLP(event_shape=(3,), width=8), 0.2, 0.9, "heun")
    again = transport_from(transport.describe())
    again.load_state_dict(transport.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(again.push(x, nfe=6), transport.push(x, nfe=6))
    with pytest.raises(ValueError, match="unknown transport 'teleport'"):
        transport_from({"kind": "teleport"})
