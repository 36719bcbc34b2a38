"""Gradient transports: densities by change of variables, the way back, what is saved; and clouds that carry both."""

import pytest
import torch
from torch.distributions import MultivariateNormal

import gengrad
from gengrad.data import Gaussian, StandardNormal
from gengrad.data.draws import generator_for
from gengrad.flows import Flow
from gengrad.flows.density_cloud import Cloud, matched, pushed_score
from gengrad.flows.gradient import GradientTransport
from gengrad.flows.transports import VelocityTransport, transport_from
from gengrad.networks import ICNN, MLP


def network(seed, d=2, size=0.3):
    torch.manual_seed(seed)
    net = ICNN(event_shape=(d,), width=8, gain=2.0)
    with torch.no_grad():
        net.scales.uniform_(0, size)
        net.shift.normal_()
    return net


def flow(d=2, count=3):
    return Flow(StandardNormal(event_shape=(d,)), [GradientTransport(network(k, d)) for k in range(count)])


@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_way_back_ends_where_the_way_began(d):
    f = flow(d)
    x = torch.randn(200, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x
    for transport in f.transports:
        y = transport.double().push(y)
    assert (f.to_source(y) - x).abs().max() < 1e-8


def test_the_density_has_unit_mass_and_is_the_source_s_at_step_zero():
    f = flow(1, 2)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    for step in (0, 1, 2):
        mass = torch.trapezoid(f.log_density(grid, step=step).exp(), grid[:, 0])
        assert float(mass) == pytest.approx(1.0, abs=1e-4)  # the trapezoidal rule on 4001 points of a smooth density
    assert torch.allclose(f.log_density(grid, step=0), StandardNormal(event_shape=(1,)).log_density(grid))


def test_affine_maps_carry_a_gaussian_to_the_gaussian_they_should():
    q, b = torch.tensor([[1.5, 0.4], [0.4, 0.8]]).double(), torch.tensor([1.0, -1.0]).double()
    net = ICNN(event_shape=(2,))
    net.set_affine(q, b)
    f = Flow(StandardNormal(event_shape=(2,)), [GradientTransport(net)])
    x = f.sample(50, seed=1)
    truth = MultivariateNormal(b, q @ q).log_prob(x.double())
    assert torch.allclose(f.log_density(x), truth, atol=1e-5)  # the weights are fp32


def test_units_count_in_the_density():
    f = flow()
    scaled = Flow(f.source, list(f.transports), units=(torch.tensor([3.0, 4.0]), 2.0))
    x = torch.randn(10, 2).double()
    expected = f.log_density(x) - 2 * torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert torch.allclose(scaled.log_density(torch.tensor([3.0, 4.0]) + 2 * x), expected, atol=1e-6)


def test_sampling_stops_at_the_step_asked_for_and_counts_one_evaluation_a_step():
    f = flow()
    path = f.trajectory(5, seed=2)
    for step in range(4):
        drawn = f.draw_samples(5, seed=2, step=step)
        assert torch.allclose(drawn.x, path[step], atol=1e-6) and drawn.nfe == step
    with pytest.raises(ValueError, match="not a whole number between 0 and the flow's 3"):
        f.sample(5, step=4)


def test_a_flow_is_loaded_with_its_densities_and_records(tmp_path):
    f = flow()
    f.transports[0].record = {"tau": 0.1, "energy": 1.5}
    f.save(tmp_path)
    again = gengrad.load(tmp_path)
    x = torch.randn(10, 2)
    assert torch.equal(again.log_density(x), f.log_density(x)) and again.transports[0].record["energy"] == 1.5
    assert transport_from(f.transports[0].describe()).record == f.transports[0].record


def test_densities_are_refused_where_there_are_none():
    f = Flow(StandardNormal(event_shape=(2,)), [VelocityTransport(MLP(event_shape=(2,), width=4))])
    with pytest.raises(ValueError, match="transport 1 is a 'velocity'"):
        f.log_density(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no densities"):
        f.to_source(torch.zeros(1, 2))
    moons = gengrad.data.Moons()
    with pytest.raises(ValueError, match="'moons' has no log density"):
        Flow(moons, [GradientTransport(network(0))]).log_density(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        ([[0.0, 0.0]], "found a list"),
        (torch.zeros(3), r"found a tensor of shape \(3,\)"),
        (torch.zeros(3, 1), r"tensor of shape \(n, 2\)"),
        (torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]), "1 of 2 points are not, first that of row 1"),
    ],
)
def test_what_is_no_point_of_the_flow_is_refused(x, says):
    for ask in (flow().log_density, flow().to_source):
        with pytest.raises(ValueError, match=says):
            ask(x)
    with pytest.raises(ValueError, match="is not a whole number"):
        flow().log_density(torch.zeros(1, 2), step=1.5)


def test_a_cloud_carries_the_density_and_the_score_of_its_flow():
    f, n = flow(), 64
    cloud = Cloud.of(f.source, n, 0, n, torch.device("cpu"))
    for transport in f.transports:
        cloud = cloud.pushed(transport.network.double())
    assert torch.allclose(cloud.log_rho, f.log_density(cloud.x), atol=1e-8)
    h = 1e-5
    for axis in torch.eye(2).double():
        slope = (f.log_density(cloud.x + h * axis) - f.log_density(cloud.x - h * axis)) / (2 * h)
        assert torch.allclose(cloud.score @ axis, slope, atol=1e-5)  # central differences: h^2 and rounding over h


def test_outposts_lie_further_out_and_carry_the_density_of_the_flow():
    f, n = flow(), 512
    cloud = Cloud.of(f.source, n, 0, n, torch.device("cpu"), outposts=n)
    spread = [part.x.sub(cloud.x.mean(0)).square().sum(1).mean().sqrt() for part in (cloud, cloud.outposts)]
    assert 1.3 < spread[1] / spread[0] < 1.8  # the root mean square of factors in [1, 2] is 1.53
    for transport in f.transports:
        cloud = cloud.through(transport)
    far = cloud.outposts
    assert torch.allclose(far.log_rho, f.log_density(far.x), atol=1e-4)  # a curved map moves them in float32
    h = 1e-3
    for axis in torch.eye(2).double():
        slope = (f.log_density(far.x + h * axis) - f.log_density(far.x - h * axis)) / (2 * h)
        assert torch.allclose(far.score @ axis, slope, atol=1e-2)
    assert cloud.first(4).outposts is None


def test_affine_scores_need_no_derivative_of_the_volume():
    net = ICNN(event_shape=(2,)).double()
    net.set_affine(torch.diag(torch.tensor([2.0, 0.5])).double(), torch.zeros(2).double())
    x = torch.randn(5, 2).double()
    assert torch.allclose(pushed_score(net, x, -x), -x / torch.tensor([2.0, 0.5]))


def test_matched_particles_have_the_moments_of_their_source_in_every_block():
    source = Gaussian(mean=[1.0, 2.0], covariance=[[2.0, 0.5], [0.5, 1.0]])
    x = matched(source.sample(5000, generator_for(0, "test")).double(), source.moments())
    for block in x.split(4096):
        assert torch.allclose(block.mean(0), source.mean, atol=1e-10)
        centred = block - block.mean(0)
        assert torch.allclose(centred.mT @ centred / len(block), source.covariance, atol=1e-10)
