"""The two phases of NSGF++ at sampling time: closed forms with constant fields, the split of the budget, the bill."""

import pytest
import torch
from torch import nn

import gengrad
from gengrad.flows import Flow, PhasedTransport
from gengrad.flows.solvers import EVALUATIONS
from gengrad.networks import MLP
from gengrad.networks.time_predictor import TimePredictor
from gengrad.registry import DATASETS


class Constant(nn.Module):
    """The field that is ``value`` everywhere."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x, t):
        return torch.full_like(x, self.value)


class Clock(nn.Module):
    """Tells the time from the first coordinate."""

    def forward(self, x):
        return x[:, 0]


def made(**changes) -> PhasedTransport:
    torch.manual_seed(0)
    shape = (2,)
    settings = {"until": 0.5, "predictor": TimePredictor(event_shape=shape), "straight": MLP(event_shape=shape)}
    return PhasedTransport(MLP(event_shape=shape), **{**settings, **changes})


@pytest.mark.parametrize("solver", list(EVALUATIONS))
def test_each_sample_goes_straight_from_its_own_predicted_time(solver):
    t = PhasedTransport(Constant(0.4), 0.5, predictor=Clock(), straight=Constant(10.0), solver=solver)
    x = torch.tensor([[0.0, 0.0], [0.3, 1.0], [0.1, -2.0]])
    after_phase_1 = x + 0.5 * 0.4
    tau = after_phase_1[:, :1]
    expected = after_phase_1 + (1 - tau) * 10.0
    assert torch.allclose(t.push(x, nfe=9 if solver != "rk4" else 13), expected, atol=1e-5)


def test_predicted_times_stay_where_the_straight_flow_was_trained():
    t = PhasedTransport(Constant(0.0), 0.5, predictor=Clock(), straight=Constant(1.0), earliest=0.4)
    assert torch.allclose(t.tau(torch.tensor([[-3.0], [0.45], [7.0]])), torch.tensor([0.4, 0.45, 0.999]))


def test_a_fixed_tau_overrules_the_predictor_and_without_one_the_clock_goes_on():
    assert torch.equal(made(fixed_tau=0.7).tau(torch.zeros(3, 2)), torch.full((3,), 0.7))
    assert torch.equal(made(predictor=None).tau(torch.zeros(3, 2)), torch.full((3,), 0.5))


def test_the_straight_phase_has_the_order_of_its_solver():
    class Field(nn.Module):
        def forward(self, x, t):
            return t.view(-1, 1).cos() * x  # x(1) = x(tau) exp(sin 1 - sin tau)

    def error(solver, steps):
        t = PhasedTransport(Constant(0.0), 0.25, straight=Field(), solver=solver, phase_1=1)
        x = torch.ones(1, 1)
        exact = torch.exp(torch.sin(torch.tensor(1.0)) - torch.sin(torch.tensor(0.25)))
        return float((t.push(x, nfe=1 + steps * EVALUATIONS[solver]) - exact).abs())

    # halving the step divides the error by 2^order; 0.3 for what the next order adds at so few steps
    assert abs(torch.tensor(error("euler", 8) / error("euler", 16)).log2() - 1) < 0.3
    assert abs(torch.tensor(error("heun", 4) / error("heun", 8)).log2() - 2) < 0.3


@pytest.mark.parametrize(
    ("nfe", "solver", "split"),
    [
        (1, "euler", (1, 0)),
        (2, "euler", (1, 1)),
        (5, "euler", (2, 3)),
        (7, "euler", (3, 4)),
        (20, "euler", (5, 15)),
        (59, "euler", (5, 54)),
        (7, "heun", (3, 4)),
        (9, "rk4", (5, 4)),
    ],
)
def test_the_budget_is_shared_out_between_the_phases(nfe, solver, split):
    assert made(solver=solver).split(nfe) == split


def test_a_budget_that_the_phases_cannot_spend_is_refused():
    with pytest.raises(ValueError, match="nfe >= 3"):
        made(solver="heun").split(2)
    with pytest.raises(ValueError, match="leaves 0 evaluations"):
        made(phase_1=5).split(4)
    with pytest.raises(ValueError, match="0 to 5 steps"):
        made(phase_1=6)
    assert made(phase_1=3).split(10) == (3, 7)


@pytest.mark.parametrize("parts", [{}, {"straight": None, "shared": True}, {"predictor": None, "straight": None}])
def test_a_phased_flow_samples_the_same_after_saving_and_loading(parts, tmp_path):
    source = DATASETS.build({"name": "normal"}, event_shape=(2,))
    flow = Flow(source, [made(**parts)])
    flow.save(tmp_path)
    again = gengrad.load(tmp_path)
    assert torch.equal(again.sample(5, nfe=4), flow.sample(5, nfe=4))
    assert flow.trajectory(5, nfe=4)[-1].equal(flow.sample(5, nfe=4))


def test_the_bill_counts_the_velocities_and_names_the_predictor_apart():
    flow = Flow(DATASETS.build({"name": "normal"}, event_shape=(2,)), [made()])
    for nfe in (1, 2, 7, 20):
        drawn = flow.draw_samples(10, nfe, chunk=4)
        assert drawn.nfe == nfe == flow.cost(nfe)
        assert drawn.others == ({"time predictor": 1.0} if nfe > 1 else {})
    shared = Flow(flow.source, [made(straight=None, shared=True)])
    assert shared.draw_samples(10, 7).nfe == 7
