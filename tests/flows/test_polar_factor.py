"""What a map moves within a measure is taken out of it, and nothing else."""

import pytest
import torch

from gengrad.data.family_members import GaussianMembers
from gengrad.flows.polar_factor import circulation
from gengrad.networks.local_fit import SmoothMaps, slopes


def points(n=600, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x, angle=0.05, skew=0.0):
    """Turned around the origin in the first two coordinates, faster farther out where there is ``skew``."""
    angle = angle * (1 + skew * x.square().sum(-1))
    one, other = x[:, 0] * angle.cos() - x[:, 1] * angle.sin(), x[:, 0] * angle.sin() + x[:, 1] * angle.cos()
    return torch.cat([torch.stack([one, other], -1), x[:, 2:]], 1)


def taken_out(x, y, score, hessian):
    return circulation(SmoothMaps(x), x, y, score, hessian)


def standard(y):
    """Score and Hessian of N(0, I)."""
    return -y, -torch.eye(y.shape[1]).to(y).expand(len(y), -1, -1)


@pytest.mark.parametrize("d, skew, left", [(2, 0.0, 0.02), (2, 0.3, 0.1), (3, 0.0, 0.05)])
def test_a_measure_that_is_turned_within_itself_stays_where_it_is(d, skew, left):
    """N(0, I) is the same however it is turned: the optimal map is the identity. v is of first order in the angle."""
    x = points(1000, d)
    y = turned(x, 0.02, skew)
    assert (y + taken_out(x, y, *standard(y)) - x).norm() < left * (y - x).norm()


def test_a_gradient_is_left_as_it_is():
    x, a = points(), torch.tensor([[1.3, 0.2], [0.2, 0.8]]).double()
    y = x @ a
    score, hessian = -y @ torch.linalg.inv(a @ a), -torch.linalg.inv(a @ a).expand(len(y), -1, -1)
    assert taken_out(x, y, score, hessian).norm() < 1e-5 * (y - x).norm()


def test_of_a_gradient_after_a_turn_the_gradient_is_left():
    """y = A R x: the optimal map from N(0, I) to N(0, A^2) is A x."""
    x, a = points(), torch.tensor([[1.3, 0.2], [0.2, 0.8]]).double()
    y = turned(x, 0.03) @ a
    score, hessian = -y @ torch.linalg.inv(a @ a), -torch.linalg.inv(a @ a).expand(len(y), -1, -1)
    assert (y + taken_out(x, y, score, hessian) - x @ a).norm() < 0.05 * (y - x @ a).norm()


def test_what_circulates_in_each_part_of_a_mixture_is_taken_out_and_the_mixture_is_the_same():
    """Two vortices, one in each component, the other way round: v has no sources, E <grad f, v> = 0 for every f."""
    eye = torch.eye(2, dtype=torch.float64)
    law = GaussianMembers(torch.tensor([[[-1.5, 0.0], [1.5, 0.0]]]).double(), 0.5 * eye.expand(1, 2, 2, 2),
                          torch.full((1, 2), 0.5).double())  # fmt: skip
    u = torch.rand(1, 2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = law.push(u)[0]
    log_rho = law.log_density(x[None])[0]
    score = slopes(x, log_rho)[0]
    stream, rise = (0.1 * x[:, 0]).sin()[:, None], torch.stack([0.1 * (0.1 * x[:, 0]).cos(), 0 * x[:, 0]], -1)
    flow = 0.05 * (rise + stream * score)
    y = x + torch.stack([flow[:, 1], -flow[:, 0]], -1)
    v = taken_out(x, y, *slopes(y, log_rho + ((y - x) * score).sum(-1)))
    assert (y + v - x).norm() < 0.15 * (y - x).norm()
    for slope in (y, torch.stack([y[:, 1], y[:, 0]], -1), y**2, y.sin()):  # of test functions
        assert (slope * v).sum(-1).mean().abs() < 4 * (slope * v).sum(-1).std() / len(y) ** 0.5


def test_neither_order_nor_repetition_nor_size_matter():
    x = points(500)
    y = turned(x, 0.03, 0.2)
    v, order = taken_out(x, y, *standard(y)), torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        taken_out(x[order], y[order], *standard(y[order])), v[order], atol=1e-6 * float(v.abs().max())
    )
    both = torch.cat([x, x]), torch.cat([y, y])
    assert (taken_out(*both, *standard(both[1]))[:500] - v).norm() < 0.1 * v.norm()  # twice as many are doubted less
    score, hessian = standard(y)
    large = taken_out(10 * x, 10 * y, score / 10, hessian / 100)
    assert torch.allclose(large, 10 * v, atol=1e-5 * float(large.abs().max()))


def test_there_is_none_on_the_line_and_of_few():
    for x in (points(500, 1), points(99)):
        assert taken_out(x, 1.1 * x, *standard(x)) is None
