"""Maps of the line by a table: the update of a Gaussian by a Gaussian likelihood is known in closed form."""

import math

import pytest
import torch

from gengrad.data import Gaussian
from gengrad.flows import Flow
from gengrad.flows.monotone import MonotoneTransport, reweighting
from gengrad.flows.transports import transport_from


def update():
    source = Gaussian(mean=[1.0], covariance=[[4.0]])
    transport, log_z = reweighting(source.log_density, lambda x: -(x[:, 0] + 1).square() / 2, -15, 17)
    return source, transport, log_z


def test_an_observed_gaussian_is_the_gaussian_of_bayes_rule():
    source, transport, log_z = update()
    # precision 1/4 + 1, mean (1/4 - 1) / (5/4) = -0.6; Z = sqrt(2 pi) N(-1; 1, 5)
    assert log_z == pytest.approx(-4 / 10 - 0.5 * math.log(5), abs=1e-6)
    x = torch.linspace(-8, 9, 50)[:, None].double()
    exact = -0.6 + math.sqrt(0.8) / 2 * (x - 1)
    assert (transport.push(x) - exact).abs().max() < 1e-3  # cells of 32 / 4000
    flow = Flow(source, [transport])
    posterior = Gaussian(mean=[-0.6], covariance=[[0.8]])
    y = torch.linspace(-3, 2, 40)[:, None].double()
    assert torch.allclose(flow.log_density(y), posterior.log_density(y), atol=1e-2)  # constant in each cell


def test_it_is_inverted_counted_free_and_rebuilt():
    _, transport, _ = update()
    x = torch.randn(100, 1).double()
    assert torch.allclose(transport.inverse(transport.push(x)), x, atol=1e-10)
    assert transport.cost(7) == 0
    again = transport_from(transport.describe())
    again.load_state_dict(transport.state_dict())
    assert torch.equal(again.push(x), transport.push(x)) and torch.equal(again.log_det(x), transport.log_det(x))


def test_its_log_det_is_the_slope():
    _, transport, _ = update()
    x, h = torch.randn(50, 1).double(), 1e-7
    slope = (transport.push(x + h) - transport.push(x - h))[:, 0] / (2 * h)
    inside = transport.log_det(x + h) == transport.log_det(x - h)  # not across a knot
    assert torch.allclose(slope.log()[inside], transport.log_det(x)[inside], atol=1e-6)


def test_it_knows_the_score_of_the_density_that_it_leaves():
    _, transport, _ = update()
    x = torch.linspace(-8, 9, 50)[:, None].double()
    exact = -(transport.push(x) + 0.6) / 0.8
    assert (transport.score_after(x) - exact).abs().max() < 1e-3
    again = transport_from(transport.describe())
    again.load_state_dict(transport.state_dict())
    assert torch.equal(again.score_after(x), transport.score_after(x))
    line = torch.linspace(0, 1, 5)
    assert transport_from(MonotoneTransport(line, line).describe()).score_after(x) is None


def test_a_table_of_another_length_is_refused():
    with pytest.raises(ValueError, match="as many images as knots"):
        MonotoneTransport(torch.arange(3.0), torch.arange(4.0))
