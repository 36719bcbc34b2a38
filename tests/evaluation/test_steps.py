"""Flows judged along their steps: on maps that are exact, every figure is that of the closed form."""

import pytest
import torch
from PIL import Image

from gengrad.data import Ball, Barenblatt, Gaussian, GaussianMixture, Semicircle, StandardNormal
from gengrad.evaluation.grid import GridTruth
from gengrad.evaluation.steps import errors_table, judge_end, judge_steps, steps_table
from gengrad.evaluation.truth import GaussianTruth, RadialTruth, RingTruth, truth_of_flow
from gengrad.flows import Flow
from gengrad.flows.gradient import GradientTransport
from gengrad.functionals.expression import build_expression, read_expression
from gengrad.networks import ICNN
from gengrad.ot import bures_map
from gengrad.plotting.densities import energy_figure
from gengrad.sampling import judge_along


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


def test_the_table_of_errors_has_the_exact_step_and_the_continuous_flow():
    source = Ball(radius=0.4, dimension=2)
    truth = truth_of_flow(method({"name": "interaction"}, 0.1), source)
    ratio = truth.implicit(1) / source.radius
    flow = Flow(source, [affine(ratio * torch.eye(2).double(), torch.zeros(2).double(), 1)])
    flow.transports[0].record |= {"energy": truth.energy(1, "implicit"), "energy_before": truth.energy(0)}
    rows = judge_steps(flow, truth, n=20_000, seed=0)
    # two uniform discs of radii r < R differ by 2 (1 - r^2 / R^2) in L1, whichever of them the particles fill
    r, big = sorted((truth.implicit(1), truth.exact(1)))
    assert rows[0]["density_error_exact"] == pytest.approx(2 * (1 - r**2 / big**2), rel=0.1)  # 20,000 particles
    energy, radius, density = (line.split("|")[1:-1] for line in errors_table(rows).splitlines()[2:])
    assert float(energy[1]) < 1e-9 and float(radius[1]) < 1e-3
    fall = truth.energy(0) - truth.energy(1)
    assert float(energy[2]) == pytest.approx(
        (truth.energy(1, "implicit") - truth.energy(1)) / fall, rel=0.05
    )  # 2 digits
    assert float(radius[2]) == pytest.approx(1 - r / big, rel=0.1) and float(density[2]) > float(density[1])
    assert not errors_table([{"step": 1, "energy": 0.0}])


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_ring_at_rest_has_the_energy_that_a_cloud_on_it_has(d):
    terms = method({"name": "interaction", "attraction": 4.0, "repulsion": 2.0})
    truth = truth_of_flow(terms, StandardNormal(event_shape=(d,)))
    assert isinstance(truth, RingTruth)
    cross = truth.radius * torch.cat([torch.eye(d), -torch.eye(d)]).double()  # mean 0, covariance R^2 / d
    energy = build_expression(terms["functional"])
    assert float(energy(cross)) == pytest.approx(truth.energy) and truth.radius_of(cross) == pytest.approx(truth.radius)
    assert energy.velocity(cross).abs().max() < 1e-12


def test_the_truth_is_recognised_only_where_it_holds():
    mixture = GaussianMixture()
    quadratic = {"name": "potential", "potential": "quadratic"}
    assert truth_of_flow(method([quadratic, "entropy"]), mixture) is None
    assert truth_of_flow(method([quadratic, quadratic]), StandardNormal()) is None
    assert truth_of_flow(method({"name": "power_entropy", "m": 3.0}), Barenblatt(m=2.0)) is None
    assert truth_of_flow(method({"name": "interaction", "attraction": 4.0, "repulsion": 3.0}), Semicircle()) is None
    rippled = [{"name": "potential", "potential": "rippled"}, "entropy"]
    assert isinstance(truth_of_flow(method(rippled), StandardNormal(event_shape=(1,))), GridTruth)
    assert truth_of_flow(method(rippled), StandardNormal(event_shape=(2,))) is None


@pytest.mark.parametrize(
    ("source", "functional", "told"),
    [
        (Barenblatt(m=2.0, radius=0.5), {"name": "power_entropy", "m": 2.0}, "| density in L1 |"),
        (Gaussian(), {"name": "interaction", "attraction": 4.0, "repulsion": 2.0}, "radius at rest"),
    ],
)
def test_evaluation_leaves_tables_and_pictures_with_a_frame_for_every_state(source, functional, told, tmp_path):
    d = source.event_shape[0]
    maps = [affine(0.9 * torch.eye(d).double(), torch.zeros(d).double(), k) for k in (1, 2)]
    for k, transport in enumerate(maps):
        transport.record |= {"energy": 1.0 - 0.1 * (k + 1), "energy_before": 1.0 - 0.1 * k, "residual": 0.5}
    config = {"method": method(functional), "data": {"name": "space", "dimension": d}}
    report = judge_along(Flow(source, maps, info={"config": config}), tmp_path, n=100, seed=0)
    assert report["pictures"] == "energy.png, density.png, density.gif" and told in report["table"]
    assert (tmp_path / "steps.md").read_text().strip() == report["table"]
    for name in ("energy.png", "density.png"):
        assert (tmp_path / name).stat().st_size > 0
    with Image.open(tmp_path / "density.gif") as gif:
        assert gif.n_frames == 3


def test_residuals_that_hardly_differ_are_drawn_on_an_axis_of_two_decades():
    rows = [{"time": t, "energy": 1.0, "energy_before": 1.0, "residual": 3e-5 * (1 + t / 100)} for t in (1.0, 2.0)]
    low, high = energy_figure(rows).axes[1].get_ylim()
    assert high / low == pytest.approx(100)


def test_the_energy_of_a_filter_jumps_where_an_observation_comes_in():
    before, after = (3.0, 2.0, 5.0, 4.0), (2.0, 1.0, 4.0, 3.5)
    rows = [
        {"time": k + 1.0, "energy_before": b, "energy": a, "energy_exact": a}
        for k, (b, a) in enumerate(zip(before, after))
    ]
    lines = {line.get_label(): line.get_xydata() for line in energy_figure(rows).axes[0].lines}
    assert lines["learned"].shape == (7, 2) and lines["learned"][4].tolist() == [
        2.0,
        5.0,
    ]  # at the time of the one before
    assert lines["learned"][3][0] != lines["learned"][3][0]  # a gap
    assert len(lines["continuous flow"]) == 7 and lines["continuous flow"][5].tolist() == [3.0, 4.0]
    steady = [{**row, "energy_before": b} for row, b in zip(rows, (3.0, 2.0, 1.0, 4.0))]
    assert len(energy_figure(steady).axes[0].lines[-1].get_xydata()) == 5
