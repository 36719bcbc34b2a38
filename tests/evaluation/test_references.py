"""References of steps from members of families: where two are known they agree, where none is, it is said."""

import math

import pytest
import torch

from gengrad.data.families import points_of_the_cube
from gengrad.data.family_members import BarenblattMembers, GaussianMembers, ProductMembers
from gengrad.data.gaussians import Gaussian
from gengrad.evaluation.references import reference_of, reference_of_member
from gengrad.evaluation.truth import truth_of_flow
from gengrad.flows import OperatorTransport
from gengrad.flows.implicit_steps import axes_of, of_coordinates, on_the_line
from gengrad.functionals.expression import read_expression
from gengrad.networks import SetOperator
from gengrad.ot import bures_map
from gengrad.ot.spreading import barenblatt_jko_radius

TAU, TURNED = 0.1, torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)
ENTROPY = {"name": "entropy", "weight": 0.5}
BOWL = {"name": "potential", "potential": {"name": "quadratic", "matrix": [[1.36, -0.48], [-0.48, 1.64]]}}
WELLS = {"name": "potential", "potential": {"name": "double_well"}}


def transport(terms: object, tau: float = TAU) -> OperatorTransport:
    network = SetOperator(event_shape=(2,), width=8, tokens=2, heads=2)
    return OperatorTransport(network, torch.randn(1, 8, 2), torch.empty(0, 2), tau, read_expression(terms)).double()


def on_line(means: list[float], stds: list[float]) -> GaussianMembers:
    means, stds = (torch.tensor(values, dtype=torch.float64) for values in (means, stds))
    weights = torch.ones(1, len(means), dtype=torch.float64) / len(means)
    return GaussianMembers(means[None, :, None], stds[None, :, None, None], weights)


def product(axes: torch.Tensor) -> ProductMembers:
    return ProductMembers([on_line([0.5], [0.4]), on_line([-0.3], [0.9])], axes)


def drawn(members, n: int = 256):
    d = len(members.axes if isinstance(members, ProductMembers) else members.centres[0])
    x = members.cloud(points_of_the_cube(1, n, d + members.spare, torch.Generator().manual_seed(0)))
    return x[0], members.log_density(x)[0]


@pytest.mark.parametrize("terms", [ENTROPY, [BOWL, ENTROPY]])
def test_coordinate_by_coordinate_a_gaussian_goes_as_its_closed_form_says(terms):
    """The bowl's directions are those of the axes: (1, 2) along them."""
    operator, members = transport(terms), product(TURNED)
    x, log_rho = drawn(members)
    covariance = TURNED.T @ torch.diag(torch.tensor([0.16, 0.81], dtype=torch.float64)) @ TURNED
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64) @ TURNED
    law = Gaussian(mean=mean.tolist(), covariance=covariance.tolist())
    closed = reference_of(operator, law, x, log_rho)
    solved = reference_of_member(operator, members, x, log_rho)
    for k in (1, 4):
        assert (closed(k)[0] - x).norm(dim=1).mean() > 0.05 * math.sqrt(k)
        for one, two in zip(closed(k), solved(k)):
            assert torch.allclose(one, two, atol=2e-3)


def test_each_coordinate_of_a_product_does_not_see_the_others():
    two = ProductMembers([on_line([-1.0, 1.0], [0.4, 0.3]), on_line([0.2], [0.5])], torch.eye(2, dtype=torch.float64))
    three = ProductMembers([two.marginals[0], on_line([0.9, -0.7], [0.3, 0.8])], torch.eye(2, dtype=torch.float64))
    x, _ = drawn(two)
    operator, moved = transport([WELLS, ENTROPY]), []
    for members in (two, three):
        state = reference_of_member(operator, members, x, members.log_density(x[None])[0])(3)
        moved.append(state[0])
        slopes = state[1] - members.log_density(x[None])[0]  # -log det DT, which rises where points are drawn together
        assert slopes.std() > 0.05
    assert torch.equal(moved[0][:, 0], moved[1][:, 0]) and not torch.allclose(moved[0][:, 1], moved[1][:, 1], atol=0.1)


def test_mixtures_move_along_turned_axes_as_they_do_on_the_line():
    """In space: each coordinate where the solver on the line brings it, the density by the product of the slopes."""
    axes = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    laws = [on_line([-1.0, 1.0], [0.4, 0.3]), on_line([0.2], [0.5]), on_line([0.9, -0.7], [0.3, 0.8])]
    members = ProductMembers(laws, axes)
    x, log_rho = drawn(members)
    functional = transport(ENTROPY).functional()
    moved, logs = of_coordinates(functional, TAU, members, x, log_rho)(2)
    change = 0.0
    for k, law in enumerate(laws):
        at = (x @ axes[k])[:, None]
        own = law.log_density(at[None])[0]
        line, after = on_the_line(functional, TAU, lambda z, law=law: law.log_density(z[None])[0], at, own)(2)
        assert torch.allclose(moved @ axes[k], line[:, 0], atol=1e-9) and (line - at).abs().mean() > 0.05
        change = change + after - own
    assert torch.allclose(logs - log_rho, change, atol=1e-9)


@pytest.mark.parametrize("terms", [[WELLS, ENTROPY], {"name": "power_entropy"}])
def test_what_is_no_sum_over_the_coordinates_has_no_reference(terms):
    """Wells along the axes of space are none along turned ones; rho^2 is a product."""
    operator, members = transport(terms), product(TURNED)
    x, log_rho = drawn(members)
    assert reference_of_member(operator, members, x, log_rho) is None
    with pytest.raises(ValueError, match="no reference is known here"):
        of_coordinates(operator.functional(), TAU, members, x, log_rho)


@pytest.mark.parametrize("m", [1.95, 2.0])  # 1 / (1 / 0.95) is not 0.95
def test_a_profile_spreads_around_its_own_centre(m):
    centres, sizes = torch.tensor([[0.7, -0.4]]).double(), torch.tensor([[0.5]]).double()
    operator, members = transport({"name": "power_entropy", "m": m}, 0.02), BarenblattMembers(centres, sizes, m)
    x, log_rho = drawn(members)
    y, log_after = reference_of_member(operator, members, x, log_rho)(1)
    grown = barenblatt_jko_radius(0.5, 0.02, m, 2) / 0.5
    assert grown > 1.02
    assert torch.allclose(y, centres + grown * (x - centres), atol=1e-9)
    assert torch.allclose(log_after, log_rho - 2 * math.log(grown), atol=1e-9)
    assert reference_of_member(transport([BOWL, {"name": "power_entropy"}]), members, x, log_rho) is None


def test_a_profile_of_another_equation_has_none():
    members = BarenblattMembers(torch.zeros(1, 2).double(), torch.ones(1, 1).double(), 3.0)
    assert reference_of_member(transport({"name": "power_entropy"}), members, *drawn(members)) is None


def test_the_axes_of_a_functional_are_those_of_its_potentials():
    bowl = axes_of(transport([BOWL, ENTROPY]).functional(), 2)
    assert torch.allclose((bowl @ TURNED.T).abs(), torch.eye(2).double(), atol=1e-6)
    wells = axes_of(transport([WELLS, ENTROPY]).functional(), 2)
    assert torch.allclose(wells.abs().sort(1)[0], torch.tensor([[0.0, 1.0]] * 2).double(), atol=1e-6)
    assert axes_of(transport(ENTROPY).functional(), 2) is not None  # any
    assert axes_of(transport([BOWL, WELLS, ENTROPY]).functional(), 2) is None  # others of each
    other = {"name": "potential", "potential": {"name": "quadratic", "matrix": [[2.0, 0.7], [0.7, 1.0]]}}
    both = axes_of(transport([BOWL, other, ENTROPY]).functional(), 2)  # two bowls are one
    whole = torch.tensor([[3.36, 0.22], [0.22, 2.64]], dtype=torch.float64)
    assert torch.allclose(both @ whole @ both.T, torch.linalg.eigvalsh(whole).diag(), atol=1e-6)
    assert axes_of(transport(BOWL).functional(), 2) is None  # no density: its particles go by themselves
    assert axes_of(transport({"name": "power_entropy"}).functional(), 2) is None


def test_steps_of_a_gaussian_follow_one_another_where_nothing_commutes():
    """Each point y of step k + 1 is at the optimum of its step from x: (y - x) / tau + grad V(y) + score(y) = 0.

    So that the points turn: the optimal map from the start to step k, which leads to the same law, leads elsewhere.
    """
    operator = transport([BOWL, {"name": "entropy"}])
    bowl = torch.tensor(BOWL["potential"]["matrix"], dtype=torch.float64)
    law = Gaussian(mean=[0.5, -1.0], covariance=[[0.2, 0.1], [0.1, 1.5]])
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.tensor([0.5, -1.0])
    closed = reference_of(operator, law, x, law.log_density(x))
    truth = truth_of_flow({"functional": operator.terms, "tau": TAU}, law).implicit
    for k in range(6):
        (before, _), (after, log_rho) = closed(k), closed(k + 1)
        mean, covariance = truth(k + 1)
        away = after - mean
        score = -away @ torch.linalg.inv(covariance)
        assert ((after - before) / TAU + after @ bowl + score).abs().max() < 1e-8
        own = -(away * (away @ torch.linalg.inv(covariance))).sum(1) / 2 - torch.logdet(2 * math.pi * covariance) / 2
        assert torch.allclose(log_rho, own)
    straight = bures_map(*truth(0), *truth(6))
    assert (x @ straight[0].mT + straight[1] - closed(6)[0]).norm(dim=1).mean() > 1e-3
