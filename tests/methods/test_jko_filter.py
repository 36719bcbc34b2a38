"""Filtering: on a linear model the Kalman filter is known; a resumed run takes every observation once."""

import math

import pytest
import torch

from gengrad.data import Gaussian, StandardNormal
from gengrad.data.space import Space
from gengrad.evaluation.grid import GridTruth
from gengrad.evaluation.truth import truth_of_flow
from gengrad.flows import Flow
from gengrad.functionals.potential import Quadratic
from gengrad.methods import JKOFilter, Problem
from gengrad.methods.jko_filter import simulate
from gengrad.networks import ICNN
from gengrad.ot import gaussian_jko_step

TERMS = [{"name": "potential", "potential": {"name": "quadratic", "stiffness": 2.0}}, {"name": "entropy"}]
SOURCE = Gaussian(mean=[1.0], covariance=[[0.5]])


def filtered(flow=None, steps=4):
    method = JKOFilter(functional=TERMS, tau=0.1, jko_steps=steps, cloud=4096, tol=1e-3,
                       observations=[[0.1, 0.5], [0.3, -0.4]])  # fmt: skip
    make = lambda: ICNN(event_shape=(1,), width=8)  # noqa: E731
    asked = Problem(SOURCE, Space(dimension=1), make, 0, steps, 64, torch.device("cpu"))
    flow = flow or Flow(SOURCE)
    for number, stage in enumerate(method.stages(asked, flow)):
        if stage.networks:
            flow.transports.append(stage.transport(stage.networks))
        assert number < steps
    return flow


def test_on_a_linear_model_it_is_the_kalman_filter_with_implicit_steps():
    flow = filtered()
    assert [t.kind for t in flow.transports] == ["gradient", "monotone", "gradient", "gradient", "monotone", "gradient"]
    one = torch.ones(1, 1, dtype=torch.float64)
    mean, var = torch.ones(1).double(), 0.5 * one
    for k in range(4):
        for time, value in ((1, 0.5), (3, -0.4)):
            if time == k:
                gain = var / (var + 1)
                mean, var = mean + (gain * (value - mean))[0], var - gain * var
        mean, var = gaussian_jko_step(mean, var, 2 * one, torch.zeros(1).double(), 1.0, 0.1)
    x = flow.sample(20_000, seed=0)
    # four standard errors of 20,000 draws, and the table's cells
    assert float(x.mean()) == pytest.approx(float(mean), abs=4 * math.sqrt(float(var) / 2e4) + 2e-3)
    assert float(x.var()) == pytest.approx(float(var), rel=0.05)
    grid = torch.linspace(-1.5, 1.5, 20).double()[:, None]
    truth = -(grid[:, 0] - mean).square() / (2 * var[0]) - 0.5 * torch.log(2 * math.pi * var[0])
    assert (flow.log_density(grid) - truth).abs().max() < 0.05


def test_a_flow_that_stands_already_is_not_updated_twice():
    whole = filtered()
    part = Flow(SOURCE, list(whole.transports[:3]))
    again = filtered(part)
    assert len(again.transports) == len(whole.transports)
    x = torch.linspace(-1, 1, 9)[:, None].double()
    assert torch.allclose(again.log_density(x), whole.log_density(x), atol=1e-6)


def test_the_truth_on_a_grid_is_the_kalman_filter_of_the_continuous_model():
    method = {"functional": [{"weight": 1.0, "potential": None, **term} for term in TERMS], "tau": 0.1, "noise": 1.0,
              "observations": [[0.1, 0.5]]}  # fmt: skip
    method["functional"][1]["weight"] = 1.0
    truth = truth_of_flow(method, SOURCE)
    assert isinstance(truth, GridTruth)
    decay = math.exp(-0.2)
    mean, var = decay, 0.5 * decay**2 + 0.5 * (1 - decay**2)
    gain = var / (var + 1)
    mean, var = decay * (mean + gain * (0.5 - mean)), decay**2 * (var - gain * var) + 0.5 * (1 - decay**2)
    x = truth.law(2).centres
    width, density = float(x[1] - x[0]), truth.law(2).density
    assert float((x * density).sum() * width) == pytest.approx(mean, abs=1e-4)
    assert float(((x - mean).square() * density).sum() * width) == pytest.approx(var, rel=2e-3)  # cells of second order
    assert truth.symmetric_kl(2, truth.law(2).log_density) == pytest.approx(0.0, abs=1e-9)


def test_simulated_observations_have_the_law_of_the_process():
    seen = [simulate(Quadratic(stiffness=1.0), 1.0, [0.2], 0.5, seed)[0][1] for seed in range(40)]
    variance = (1 - math.exp(-0.4)) + 0.25
    # a chi-squared of 40 degrees: relative deviation sqrt(2/40), four of them
    assert torch.tensor(seen).var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / 40))


@pytest.mark.parametrize(
    ("observations", "says"),
    [([[0.5]], "pair"), ([[0.2, 1.0], [0.1, 1.0]], "increase"), ([[0.15, 1.0]], "begins"), ([[9.0, 1.0]], "begins")],
)
def test_observations_that_fit_no_step_are_refused(observations, says):
    with pytest.raises(ValueError, match=says):
        JKOFilter(functional=TERMS, tau=0.1, jko_steps=10, observations=observations)


def test_a_state_of_several_dimensions_is_refused():
    found = JKOFilter(functional=TERMS, jko_steps=10).objections(StandardNormal(event_shape=(2,)), Space(dimension=2))
    assert len(found) == 1 and "on the line" in found[0]
