"""One Newton step of the step's own condition: against closed forms, and where it is not to be trusted."""

import math

import pytest
import torch

from gengrad.flows.least_squares import monomials
from gengrad.flows.newton_correction import Correction, Polynomials, _second_derivative, corrections_of, is_corrected
from gengrad.flows.operator_transport import OperatorTransport
from gengrad.functionals import EnergyDistance, Entropy, InteractionEnergy, PotentialEnergy, PowerEntropy
from gengrad.functionals.base import Density
from gengrad.functionals.expression import read_expression
from gengrad.networks import SetOperator
from gengrad.networks.set_operator import FOLD

TAU = 0.1


def correction_of(*given):
    """The first of the corrections, of the highest degree."""
    return next(corrections_of(*given), None)


def eye(d):
    return torch.eye(d, dtype=torch.float64)


def points(n=60, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heat_step(scale, extra=0.0, n=200, d=2, tau=TAU):
    """(x, y, log rho' and score at y, K x) of independent points of N(0, scale^2 I), y = K (1 + extra) x, K exact."""
    k = (1 + math.sqrt(1 + 4 * tau / scale**2)) / 2
    x = scale * points(n, d)
    y, std = k * (1 + extra) * x, k * (1 + extra) * scale
    log_rho = -y.square().sum(-1) / (2 * std**2) - d * math.log(std * math.sqrt(2 * math.pi))
    return x, y, log_rho, -y / std**2, k * x


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("degree", [1, 2])
def test_the_exact_step_is_left_as_it_is_whatever_the_points(d, degree):
    """Independent: the residual is zero at every one of them."""
    x, y, log_rho, score, _ = heat_step(0.7, n=400, d=d)
    found = correction_of(Entropy(), TAU, x, y, Density(log_rho, score), degree)
    assert found is not None and found.coefficients.abs().max() < 1e-12


@pytest.mark.parametrize("extra", [0.02, -0.02])
@pytest.mark.parametrize("degree, n", [(1, 120), (1, 6000), (3, 400)])
def test_newtons_method_squares_an_error_whatever_the_points(extra, degree, n):
    """2 % to 0.04 %, a fiftieth of it, and what the means of second derivatives over so few add of it."""
    x, y, log_rho, score, exact = heat_step(0.7, extra, n)
    found = correction_of(Entropy(), TAU, x, y, Density(log_rho, score), degree)
    moved, jacobian = found(y), found.jacobian(y)
    off = (moved - exact).square().mean().sqrt() / (y - exact).square().mean().sqrt()
    assert off < 0.05
    assert torch.allclose(jacobian, jacobian[:1].expand_as(jacobian), atol=5e-3)


def test_what_is_rough_is_no_reason_to_go_anywhere():
    """Scores with noise at an exact step: its mean over the particles, and no more, as if H were 1 / tau alone."""
    x, y, log_rho, score, _ = heat_step(0.7, n=1000)
    alone = TAU * 0.3 * (20 / 1000) ** 0.5  # of twenty coefficients
    moved = []
    for seed in range(5, 9):
        noise = 0.3 * points(1000, seed=seed)
        found = correction_of(Entropy(), TAU, x, y, Density(log_rho, score + noise), 3)
        moved.append(float((found(y) - y).square().sum(-1).mean()))
    assert sum(moved) / 4 < alone**2


def test_a_bend_that_the_map_lacks_is_found():
    """F = E V alone, V of the fourth degree: y + tau V'(y) = x; a cubic of y comes nearer than an affine map of it."""
    functional = PotentialEnergy(lambda x: x.square().sum(-1).square() / 8)
    exact = points(400, 1)
    x, y = exact + TAU * exact**3 / 2, exact + 0.02 * exact**2 - 0.01 * exact**3
    errors = []
    for degree in (1, 3):
        moved = correction_of(functional, TAU, x, y, None, degree)(y)
        errors.append(float((moved - exact).square().mean().sqrt()))
    assert errors[1] < 0.3 * errors[0] < 0.3 * float((y - exact).square().mean().sqrt())


def test_the_porous_medium_too():
    """m = 2 on the line, Barenblatt profiles: T x = (R' / R) x with R' - R = tau 3 / R'^2 (2-methods, O4)."""
    radius, after, tau = 1.0, 1.0, 0.05
    for _ in range(100):
        after = radius + tau * 3 / after**2
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    theta = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)  # quantiles of 3/4 (1 - z^2), by its law
    z = -theta.cos()
    law = (2 + 3 * z - z**3) / 4
    x = radius * z[torch.searchsorted(law, u)][:, None]
    stretch = 1.02 * after / radius
    y = stretch * x
    end = stretch * radius
    room = 1 - y[:, 0].square() / end**2
    log_rho, score = (0.75 * room / end).log(), -2 * y / end**2 / room[:, None]
    moved = correction_of(PowerEntropy(m=2.0), tau, x, y, Density(log_rho, score), 1)(y)
    assert float((moved / x).mean()) == pytest.approx(after / radius, rel=1e-3)


def test_there_is_none_for_what_is_not_to_be_trusted():
    x, y, log_rho, score, _ = heat_step(0.7, 0.02)

    def found(functional=None, log_rho=log_rho, score=score):
        return correction_of(functional or Entropy(), TAU, x, y, Density(log_rho, score), 1)

    assert found() is not None
    assert found(score=torch.zeros_like(score)) is None  # a box: no score inside, all of it at the edge
    assert found(score=2 * score) is None
    assert found(log_rho=torch.where(torch.arange(200) < 130, math.nan, log_rho)) is None  # two thirds fold
    assert (
        found(log_rho=torch.where(torch.arange(200) < 30, math.nan, log_rho)) is not None
    )  # the others say what to do
    assert correction_of(Entropy(), TAU, x, x, Density(log_rho, score), 1) is None  # a map that stays where it is
    assert correction_of(Entropy(), TAU, x[:99], y[:99], Density(log_rho[:99], score[:99]), 1) is None  # too few points
    assert correction_of(Entropy(), TAU, x, y, Density(log_rho, score), 3).degree == 1  # a cubic has ten terms
    twice = torch.cat([y, y])
    assert correction_of(InteractionEnergy(), TAU, torch.cat([x, x]), twice, None, 1) is None  # infinite
    assert found(PotentialEnergy(lambda x: (x - 50).square().sum(-1)) + Entropy()) is None  # many times the step itself
    assert found(PotentialEnergy(lambda x: -20 * x.square().sum(-1)) + Entropy()) is None  # no minimum


@pytest.mark.parametrize("d", [1, 2])
def test_a_density_with_an_edge_has_none(d):
    """A Gaussian cut at 1.5 deviations: its score inside is that of the whole, and misses what the edge does."""
    x = points(4000, d)
    x = x[(x.abs() < 1.5).all(-1)]
    found = correction_of(Entropy(), TAU, x, 1.09 * x, Density(-x.square().sum(-1) / 2, -x / 1.09), 3)
    whole = points(4000, d)
    same = correction_of(Entropy(), TAU, whole, 1.09 * whole, Density(-whole.square().sum(-1) / 2, -whole / 1.09), 3)
    assert found is None and same is not None


def test_the_order_of_the_particles_and_their_number_do_not_matter():
    """The same of every particle that comes twice; where every one meets every other, by places, not by numbers."""
    x, y, log_rho, score, _ = heat_step(0.7, 0.02, n=700)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    for functional in (Entropy(), Entropy() + 0.1 * InteractionEnergy(attraction=2.0, repulsion=None)):
        one = correction_of(functional, TAU, x, y, Density(log_rho, score), 2)
        two = correction_of(functional, TAU, x[order], y[order], Density(log_rho[order], score[order]), 2)
        both = (torch.cat([v, v]) for v in (x, y))
        three = correction_of(functional, TAU, *both, Density(log_rho.repeat(2), score.repeat(2, 1)), 2)
        assert torch.allclose(two(y), one(y), atol=1e-8)
        near = 1e-8 if isinstance(functional, Entropy) else 1e-3  # of pairs a part is taken
        assert torch.allclose(three(y), one(y), atol=near) and (one(y) - y).abs().max() > 0.02


def test_an_energy_of_particles_needs_no_density():
    """W = |x - y|^2 / 2: every particle goes towards the mean, by tau / (1 + tau); any affine map is put right.

    But for the second derivatives of F, which a part of the particles knows to some percent.
    """
    functional, x = InteractionEnergy(attraction=2.0, repulsion=None), points(500)
    exact = x.mean(0) + (x - x.mean(0)) / (1 + TAU)
    y = exact + 0.02 * x @ torch.tensor([[0.5, 0.3], [-0.2, 0.4]]).double() + 0.01
    moved = correction_of(functional, TAU, x, y, None, 1)(y)
    assert (moved - exact).norm() < 0.06 * (y - exact).norm()
    x4 = points(500, 4)  # no determinant is written out there, and none is needed
    y4 = (x4 - x4.mean(0)) / (1.02 + TAU)
    moved = correction_of(functional, TAU, x4, y4, None, 1)(y4)
    assert (moved - x4.mean(0) - (x4 - x4.mean(0)) / (1 + TAU)).norm() < 0.03 * (moved - x4).norm()


def test_where_a_high_degree_would_fold_a_lower_one_is_taken():
    """A wall that a step of 0.3 has run into: what follows it folds, what is of a lower degree does not."""
    x = points(400, 1)
    for height, at, asked, degree in ((3.0, 1.5, 3, 3), (10.0, 1.5, 3, 1), (30.0, 1.0, 4, 1), (30.0, 1.0, 2, 1)):
        wall = PotentialEnergy(lambda x, c=height, at=at: (c * torch.relu(x - at).square() - 3 * x).sum(-1))
        found = correction_of(wall, TAU, x, x + 0.3, None, asked)
        assert found.degree == degree and (found.jacobian(x + 0.3) > FOLD).all()


def second_of(functional, y, density, degree=2):
    """Of polynomials of y itself, with their values and slopes."""
    found = _second_derivative(functional, TAU, y, density, Polynomials(y, torch.tensor(1.0), degree), 1e-7)
    return found, *monomials(y, degree, 1)


@pytest.mark.parametrize("internal", [Entropy(), PowerEntropy(m=2.5), 0.5 * Entropy() + PowerEntropy(m=3.0)])
def test_the_second_derivative_is_that_of_the_objective(internal):
    """d^2/de^2 of E |y + e q - x|^2 / (2 tau) + E V + the internal energy of the density that is carried along."""
    y = points(40, 2)
    log_rho, functional = y.square().sum(-1) / 10 - 1, internal + PotentialEnergy(lambda x: x.square().sum(-1).square())
    found, values, slopes = second_of(functional, y, Density(log_rho, torch.zeros_like(y)))
    c = points(values.shape[1], 2, seed=1) / 10

    def objective(e):
        moved = y + e * values @ c
        det = torch.linalg.det(eye(2) + e * torch.einsum("ta,ntb->nab", c, slopes))
        return (e * values @ c).square().sum(-1).mean() / (2 * TAU) + functional(moved, Density(log_rho - det.log()))

    exact = torch.autograd.functional.hessian(objective, torch.zeros((), dtype=torch.float64))
    assert c.flatten() @ found @ c.flatten() == pytest.approx(float(exact), rel=1e-5)
    assert torch.allclose(found, found.mT)


def test_the_second_derivative_of_pairs_too():
    y, functional = points(40, 2), 0.7 * InteractionEnergy(attraction=4.0, repulsion=2.0)
    found, values, _ = second_of(functional, y, None)
    c = points(values.shape[1], 2, seed=1) / 10
    ahead, here, back = (functional(y + e * values @ c) for e in (1e-3, 0.0, -1e-3))
    exact = (values @ c).square().sum(-1).mean() / TAU + (ahead - 2 * here + back) / 1e-6
    assert c.flatten() @ found @ c.flatten() == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("n, d, most", [(1024, 1, 0.6), (1024, 2, 0.9), (4000, 2, 0.7)])
def test_energies_of_pairs_are_mended_by_high_degrees_too(n, d, most):
    """W = |z|^2 / 2, a smooth error: a part of the particles says how pairs bend, all of them what the way costs."""
    functional, before, after = InteractionEnergy(attraction=2.0, repulsion=None), 0.0, 0.0
    for seed in range(4):
        x = points(n, d, seed)
        exact = x.mean(0) + (x - x.mean(0)) / (1 + TAU)
        y = exact + 0.005 * torch.sin(3 * x)
        before += float((y - exact).square().mean())
        after += float((correction_of(functional, TAU, x, y, None, 7)(y) - exact).square().mean())
    assert after < most**2 * before


def test_a_correction_goes_at_most_twice_as_far_as_the_step_or_a_little_of_the_cloud():
    """F = -c E x, whose step is a shift by tau c."""
    x = points(200, 1)
    for c, far in ((2.5, False), (3.5, True)):
        found = correction_of(PotentialEnergy(lambda x, c=c: -c * x.sum(-1)), TAU, x, x + 0.1, None, 1)
        assert found is None if far else torch.allclose(found(x + 0.1), x + TAU * c, atol=1e-6)
    for c, far in ((0.15, False), (0.3, True)):  # of a map that hardly moves, a hundredth of the cloud's size is near
        found = correction_of(PotentialEnergy(lambda x, c=c: -c * x.sum(-1)), TAU, x, x + 1e-4, None, 1)
        assert found is None if far else torch.allclose(found(x + 1e-4), x + TAU * c, atol=1e-6)


def test_which_energies_are_corrected():
    assert is_corrected(InteractionEnergy() + Entropy())
    assert is_corrected(InteractionEnergy())

    class Leaning(PotentialEnergy):  # a user's, of whose density nothing is known
        needs_density = True

    assert not is_corrected(Leaning(lambda x: x.sum(-1)) + Entropy())
    assert not is_corrected(Entropy() + EnergyDistance(points()))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_jacobian_is_that_of_the_polynomial_and_it_is_packed_as_it_is(d):
    torch.manual_seed(0)
    terms = math.comb(d + 3, d)
    reach = torch.full((d,), 0.8).double()
    made = Correction(torch.randn(terms, d).double(), torch.randn(d).double(), torch.tensor(1.7).double(), reach)
    y = points(5, d)
    moved, jacobian = made(y), made.jacobian(y)
    for k in range(5):
        whole = torch.autograd.functional.jacobian(lambda z: made(z[None])[0], y[k])
        assert torch.allclose(jacobian[k], whole)
    assert made.degree == 3 and torch.equal(Correction.unpacked(made.packed(3))(y), moved)
    wider = Correction.unpacked(made.packed(5))
    assert wider.degree == 5 and torch.allclose(wider(y), moved)
    assert torch.equal(Correction.none(d)(y.float()), y.float())
    assert Correction.unpacked(Correction.none(d).packed(3)).degree == 3
    far = y + 100  # beyond its cloud, all that is known is what it does at the edge
    assert torch.allclose(made(far) - far, made(y + 200) - y - 200) and torch.equal(made.jacobian(far)[0], eye(d))


def test_log_rho_is_carried_through_the_correction():
    """On the line: rho' dy = rho dx for neighbours, to the second order of their distance."""
    torch.manual_seed(0)
    network = SetOperator(event_shape=(1,), width=8, tokens=2, heads=2, blocks=1).double()
    with torch.no_grad():
        network.affine.bias[0] = 0.8  # T x = 1.08 x; exact is 1.09 x
        network.head[-1].weight.normal_(0, 0.02)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x = (2**0.5 * torch.erfinv(2 * u - 1))[:, None]
    log_rho = -x[:, 0].square() / 2 - math.log(2 * math.pi) / 2
    operator = OperatorTransport(network, x[None], x[:0], TAU, read_expression("entropy"), correction=3)
    y, logs, found, _ = operator.moved(x, log_rho)
    assert found is not None and found.coefficients.abs().max() > 1e-3
    mass = (logs.exp()[1:] + logs.exp()[:-1]) / 2 * y[:, 0].diff()
    before = (log_rho.exp()[1:] + log_rho.exp()[:-1]) / 2 * x[:, 0].diff()
    assert torch.allclose(mass[100:-100], before[100:-100], rtol=1e-4)
