"""Flows judged along their steps: on maps that are exact, every figure is that of the closed form."""

import pytest
import torch

from gengrad.data import Barenblatt, Gaussian, GaussianMixture, Semicircle, StandardNormal
from gengrad.evaluation.grid import GridTruth
from gengrad.evaluation.steps import judge_end, judge_steps, steps_table
from gengrad.evaluation.truth import GaussianTruth, RadialTruth, truth_of_flow
from gengrad.flows import Flow
from gengrad.flows.gradient import GradientTransport
from gengrad.functionals.expression import read_expression
from gengrad.networks import ICNN
from gengrad.ot import bures_map


def method(functional, tau=0.1):
    return {"functional": read_expression(functional), "tau": tau}


def affine(q, b, step, tau=0.1):
    net = ICNN(event_shape=(len(b),))
    net.set_affine(q, b)
    return GradientTransport(net, {"step": step, "tau": tau, "time": step * tau, "energy": 0.0})


def test_the_flow_of_the_exact_implicit_steps_is_at_the_floor():
    source = Gaussian(mean=[1.0, 0.0], covariance=[[2.0, 0.3], [0.3, 1.0]])
    truth = truth_of_flow(method([{"name": "potential", "potential": "quadratic"}, "entropy"]), source)
    assert isinstance(truth, GaussianTruth)
    maps = [bures_map(*truth.implicit(k), *truth.implicit(k + 1)) for k in range(3)]
    flow = Flow(source, [affine(q, b, k + 1) for k, (q, b) in enumerate(maps)])
    for k, row in enumerate(judge_steps(flow, truth, n=100, seed=0), start=1):
        assert row["symmetric_kl_to_implicit"] < 1e-9  # fp32 weights
        assert row["symmetric_kl"] == pytest.approx(truth.floor(k), rel=1e-2)
    assert "symmetric kl implicit" in steps_table(judge_steps(flow, truth, n=100, seed=0))


def test_divergences_by_means_agree_with_those_of_gaussians():
    source = StandardNormal(event_shape=(2,))
    flow = Flow(source, [affine(1.2 * torch.eye(2).double(), torch.zeros(2).double(), 1)])
    target = GaussianMixture(means=[[0.0, 0.0]], scales=[1.0])
    found = judge_end(flow, target, n=20_000, seed=0)
    # N(0, 1.44) against N(0, 1) in two dimensions: 0.44 - log 1.44 one way, symmetric 0.44 + 1/1.44 - 1
    assert found["symmetric_kl"] == pytest.approx(0.44 + 1 / 1.44 - 1, abs=0.02)  # about four standard errors


@pytest.mark.parametrize(
    ("source", "functional"),
    [
        (Barenblatt(m=2.0, radius=0.5), {"name": "power_entropy", "m": 2.0}),
        (Semicircle(radius=0.5), {"name": "interaction"}),
    ],
)
def test_the_dilation_of_the_exact_step_has_no_error(source, functional):
    truth = truth_of_flow(method(functional, 0.01), source)
    assert isinstance(truth, RadialTruth)
    ratio = truth.implicit(1) / source.radius
    flow = Flow(source, [affine(ratio * torch.eye(1).double(), torch.zeros(1).double(), 1, 0.01)])
    (row,) = judge_steps(flow, truth, n=20_000, seed=0)
    assert row["radius"] == pytest.approx(truth.implicit(1), rel=1e-3) and row["density_error"] < 1e-3


def test_the_truth_is_recognised_only_where_it_holds():
    mixture = GaussianMixture()
    quadratic = {"name": "potential", "potential": "quadratic"}
    assert truth_of_flow(method([quadratic, "entropy"]), mixture) is None
    assert truth_of_flow(method([quadratic, quadratic]), StandardNormal()) is None
    assert truth_of_flow(method({"name": "power_entropy", "m": 3.0}), Barenblatt(m=2.0)) is None
    assert truth_of_flow(method({"name": "interaction", "attraction": 4.0, "repulsion": 2.0}), Semicircle()) is None
    rippled = [{"name": "potential", "potential": "rippled"}, "entropy"]
    assert isinstance(truth_of_flow(method(rippled), StandardNormal(event_shape=(1,))), GridTruth)
    assert truth_of_flow(method(rippled), StandardNormal(event_shape=(2,))) is None
