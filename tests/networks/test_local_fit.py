"""Log densities that are known at the points of a cloud: what is fitted to them, and what a network sees of them."""

import math

import pytest
import torch

from gengrad.data.family_members import GaussianMembers
from gengrad.kernel_moments import KernelMoments
from gengrad.networks import local_fit
from gengrad.networks.kernels import RARE, Marks, smoothed, whole
from gengrad.networks.local_fit import SmoothMaps, fitted
from gengrad.networks.set_operator import SetOperator, determinant

SMALL = {"width": 16, "tokens": 4, "heads": 2, "log_density": True}


def cloud(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def width(h, *shape):
    return torch.full((*shape, 1, 1), h, dtype=torch.float64)


def mixture(n, d=2):
    """Two Gaussians as n independent points, log rho and the score there."""
    means = torch.tensor([[[-1.0, 0.3, 0.0][:d], [1.0, -0.2, 0.4][:d]]], dtype=torch.float64)
    factors = 0.6 * torch.eye(d, dtype=torch.float64).expand(1, 2, d, d)
    law = GaussianMembers(means, factors, torch.tensor([[0.4, 0.6]], dtype=torch.float64))
    x = law.push(torch.rand(1, n, d + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return x[0], law.log_density(x)[0], law.score(x)[0]


def operator(d=2, **settings):
    torch.manual_seed(0)
    network = SetOperator(event_shape=(d,), **(SMALL | settings)).double()
    torch.nn.init.normal_(network.affine.weight, std=0.3)
    torch.nn.init.normal_(network.head[-1].weight, std=0.3)
    return network


# ---------------------------------------------------------------- the fit


@pytest.mark.parametrize("d, n", [(1, 300), (2, 300), (3, 300), (1, 4096), (2, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_a_gaussian_the_fit_is_its_score_and_its_hessian(d, n, dtype):
    """log rho is a quadratic: nothing is left out, wherever and how densely the points lie, but rounding."""
    sizes = torch.tensor([1.0, 0.1, 0.5], dtype=torch.float64)[:d]  # oblong
    x = (sizes * cloud(n, d)).to(dtype)
    log_rho = (-(x.double() / sizes).square().sum(-1) / 2 + 5.0).to(dtype)
    seen, (rows, columns) = fitted(x, log_rho, width(1.0)).at(x).double(), torch.triu_indices(d, d)
    score = -x.double() / sizes**2
    assert (seen[:, :d] - score).norm() < (1e-3 if dtype == torch.float32 else 1e-5) * score.norm()
    hessian = -torch.diag(1 / sizes**2)[rows, columns]
    off = (seen[:, d:] - hessian).norm(dim=-1) / hessian.norm()
    assert off.quantile(0.95) < (0.05 if dtype == torch.float32 else 1e-4)


def test_what_rounding_makes_up_among_points_that_nearly_coincide_is_left_out():
    """A bootstrap with a little noise, in single precision: second differences of log rho are eps / distance^2."""
    x = cloud(50, 2).repeat(41, 1)
    for jitter in (1e-3, 1e-4, 1e-5, 1e-6):
        y = (x + jitter * cloud(*x.shape, seed=2)).float()
        seen = fitted(y, -y.square().sum(-1) / 2, width(1.0)).at(y)
        assert seen[:, 2:].abs().max() < 50 and (seen[:, :2] + y).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("narrow", [1.0, 0.01])
def test_independent_points_that_know_their_density_know_its_score(narrow):
    """A kernel estimate of the same points is forty times as far off: their noise is not in what they know."""
    x, log_rho, score = mixture(512)
    x, score = narrow * x, score / narrow
    found = fitted(x, log_rho, width(0.25)).at(x)[:, :2] / 0.25
    kernel = smoothed(x, x, width(0.25 * narrow), 1)[1][:, 0] / (0.25 * narrow)
    off = [float(((v - score).square().sum(-1).mean() / score.square().sum(-1).mean()).sqrt()) for v in (found, kernel)]
    assert off[0] < 0.015 and off[1] > 40 * off[0]


def test_more_points_know_more():
    off = []
    for n in (128, 512, 2048):
        x, log_rho, score = mixture(n)
        found = fitted(x, log_rho, width(1.0)).at(x)[:, :2]
        off.append(float(((found - score).norm(dim=-1) / score.norm(dim=-1)).median()))
    assert off[1] < off[0] / 2 and off[2] < off[1] / 2


def test_points_whose_density_is_not_known_have_the_line_of_the_nearest_that_is():
    x, log_rho, score = mixture(512)
    log_rho[::2] = math.nan
    log_rho[1] = math.inf
    known = log_rho.isfinite()
    found, without = fitted(x, log_rho, width(0.4)), fitted(x[known], log_rho[known], width(0.4))
    assert torch.equal(found.columns[known], without.columns)
    assert torch.equal(found.columns[~known], without.columns[torch.cdist(x[~known], x[known]).argmin(-1)])
    off = (found.at(x)[~known, :2] / 0.4 - score[~known]).square().sum(-1).mean() / score.square().sum(-1).mean()
    assert off.sqrt() < 0.1


def test_neither_the_size_of_a_cloud_nor_a_large_constant_matters():
    x, log_rho, _ = mixture(400)
    found = fitted(x, log_rho, width(0.3))
    assert torch.allclose(fitted(x, log_rho + 1e6, width(0.3)).columns, found.columns, atol=1e-3)
    for times in (1e-3, 1e3, 1e12):
        scaled = fitted(times * x, log_rho, width(0.3 * times))
        assert torch.allclose(scaled.at(times * x), found.at(x), rtol=1e-6, atol=1e-9)


def test_few_points_and_points_in_line_and_copies_fail_nobody():
    x, log_rho, _ = mixture(100)
    line = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0.5]]).double()
    seen = fitted(line, -line.square().sum(-1) / 2, width(1.0)).at(line)
    assert (seen[:, :2] + line)[3:-3].abs().max() < 1e-3  # along the line; across it nothing is known, and it is zero
    assert fitted(x[:0, None], log_rho[:0, None], width(1.0, 0)).columns.shape == (0, 1, 5)  # no cloud at all
    for n in (2, 3, 5):
        assert fitted(cloud(n, 2), cloud(n), width(1.0)).columns.isfinite().all()
    assert not fitted(cloud(1, 2).expand(30, 2), torch.zeros(30).double(), width(1.0)).columns.any()
    many = torch.randint(100, (1000,), generator=torch.Generator().manual_seed(0))
    many[:100] = torch.arange(100)
    assert torch.allclose(
        fitted(x[many], log_rho[many], width(1.0)).columns, fitted(x, log_rho, width(1.0)).columns[many]
    )


def test_log_densities_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"log densities \(50,\) of particles \(5, 50, 2\)"):
        fitted(cloud(5, 50, 2), cloud(50), width(0.4, 5))


def test_where_nothing_is_known_marks_are_zero():
    x = cloud(3, 20, 2)
    assert not fitted(x, torch.full((3, 20), math.nan), width(0.4, 3)).columns.any()


@pytest.mark.parametrize("tile", [1, 7, 150])
def test_the_fit_is_the_same_in_tiles_for_batches_repetition_and_shifts(tile, monkeypatch):
    x, log_rho = cloud(3, 30, 2), cloud(3, 30, seed=2)
    whole_ = fitted(x, log_rho, width(0.6, 3))
    monkeypatch.setattr(local_fit, "TILE", tile)
    assert torch.allclose(fitted(x, log_rho, width(0.6, 3)).columns, whole_.columns, atol=1e-9)
    assert torch.allclose(fitted(x[1], log_rho[1], width(0.6)).columns, whole_.columns[1], atol=1e-9)
    twice = fitted(torch.cat([x, x], 1), torch.cat([log_rho, log_rho], 1), width(0.6, 3))
    assert torch.allclose(twice.columns[:, :30], whole_.columns, atol=1e-9)
    assert torch.allclose(fitted(x + 3, log_rho - 7, width(0.6, 3)).at(x + 3), whole_.at(x), atol=1e-7)


def test_clouds_of_single_precision_are_fitted_as_well():
    x, log_rho, _ = mixture(400)
    one = fitted(x.float(), log_rho.float(), width(0.3).float())
    assert one.columns.dtype == torch.float32
    assert torch.allclose(one.at(x.float()).double(), fitted(x, log_rho, width(0.3)).at(x), atol=2e-3)


# ---------------------------------------------------------------- maps


def jacobians(x, y):
    return SmoothMaps(x).jacobians(x, y)


def bent(x):
    """A smooth map, and its derivative by autograd."""

    def move(z):
        return z + 0.3 * torch.sin(z + 0.5 * z.sum(-1, keepdim=True))  # fmt: skip

    return move(x), torch.func.vmap(torch.func.jacrev(move))(x)


@pytest.mark.parametrize("d, n, error, median", [(1, 30, 0.2, 0.01), (1, 400, 0.02, 2e-5), (2, 1000, 0.03, 2e-3),
                                                 (3, 1000, 0.15, 0.04)])  # fmt: skip
def test_the_derivative_of_a_map_is_known_by_where_it_brings_points(d, n, error, median):
    """Of independent points; most of the error is that of the outermost."""
    x = cloud(n, d)
    y, exact = bent(x)
    off, size = ((v.flatten(1).norm(dim=1)) for v in (jacobians(x, y) - exact, exact - torch.eye(d)))
    assert off.square().mean().sqrt() < error * size.square().mean().sqrt() and off.median() < median * size.median()


def test_more_points_know_more_of_a_map_and_single_precision_does_as_well():
    errors = []
    for n in (100, 1000):
        x = cloud(n, 2)
        y, exact = bent(x)
        errors.append(float((jacobians(x, y) - exact).norm() / (exact - torch.eye(2)).norm()))
        single = jacobians(x.float(), y.float())
        assert single.dtype == torch.float64 and (single - jacobians(x, y)).norm() < 1e-3 * single.norm()
    assert errors[1] < errors[0] / 5


def test_affine_maps_are_known_exactly_whatever_their_size_and_copies_count_once():
    x, a = cloud(50, 2), torch.tensor([[1.2, 0.3], [-0.1, 0.8]]).double()
    for size in (1e-4, 1.0, 1e4):
        assert torch.allclose(jacobians(size * x, size * x @ a.mT + 5), a.expand(50, 2, 2), atol=1e-6)
    x = 3 * x.sin()
    y, _ = bent(x)
    assert torch.equal(jacobians(torch.cat([x, x]), torch.cat([y, y])), jacobians(x, y).repeat(2, 1, 1))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(jacobians(x[order], y[order]), jacobians(x, y)[order], atol=1e-8)


def test_few_points_are_not_enough_and_fail_nobody():
    def enough(x):
        return SmoothMaps.where_enough(x) is not None

    assert [[enough(cloud(n, d)) for n in (99, 100, 299, 300, 699, 700)] for d in (1, 2, 3)] == [
        [False, True, True, True, True, True], [False, False, False, True, True, True], [False] * 5 + [True],
    ]  # fmt: skip
    assert not enough(cloud(60, 2).repeat(10, 1)) and not enough(cloud(2000, 4))
    for few in (
        cloud(2, 2),
        cloud(5, 1),
        torch.cat([cloud(40, 1), torch.zeros(40, 1).double()], 1),
    ):
        assert jacobians(few, 1.1 * few).isfinite().all()


@pytest.mark.parametrize("d, n", [(1, 100), (2, 300), (3, 700)])
def test_from_enough_points_on_log_det_is_known(d, n):
    """Of one wave across the cloud; the median, for the outermost of independent points are alone."""
    x = cloud(n, d)
    y = x + 0.15 * torch.sin(2 * x)
    exact = (1 + 0.3 * torch.cos(2 * x)).log().sum(1)
    off = torch.linalg.det(jacobians(x, y)).log() - exact
    assert off.abs().median() < 0.15 * exact.std() and (torch.linalg.det(jacobians(x, y)) > 0).all()


# ---------------------------------------------------------------- what a point sees of it


def test_kernel_moments_of_marks_are_sums_and_have_the_gradient_of_the_points():
    particles, marks = cloud(2, 12, 2, seed=2), cloud(2, 12, 3, seed=3)
    h = torch.tensor([0.7, 0.4], dtype=torch.float64).view(2, 1, 1)
    x = cloud(2, 5, 2).requires_grad_()
    found = KernelMoments.apply(x, particles, h, 2, 2, marks)
    for level in range(2):
        kernel = (-torch.cdist(x, particles).square() / (2 * (h / 2**level) ** 2)).exp() / 12
        by_hand = (marks[..., None] * particles[..., None, :]).flatten(-2)
        assert torch.allclose(found[level][..., 7:10], kernel @ marks, atol=1e-12)  # after 1, s, s s'
        assert torch.allclose(found[level][..., 10:], kernel @ by_hand, atol=1e-12)
        assert torch.allclose(found[level][..., :1], kernel.sum(-1, keepdim=True), atol=1e-12)
    for degree in (1, 2):
        assert torch.autograd.gradcheck(lambda z, k=degree: KernelMoments.apply(z, particles, h, 2, k, marks), x)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_point_sees_the_mean_line_of_the_particles_around_it(d):
    x, particles, along = cloud(4, d), cloud(25, d, seed=2), torch.eye(d, dtype=torch.float64)[:, None]
    columns = cloud(25, d * (d + 3) // 2, seed=3)
    marks, m = Marks(columns, width(0.7)), d * (d + 1) // 2
    scalars, vectors, rises, turns = smoothed(x, particles, width(1.0), 2, along, marks)
    plain = smoothed(x, particles, width(1.0), 2, along)
    assert torch.allclose(scalars[:, :2], plain[0], atol=1e-14) and torch.allclose(vectors[:, :2], plain[1], atol=1e-14)
    for level, h in enumerate((1.0, 0.5)):

        def line(z, h=h):
            kernel = (-(z - particles).square().sum(-1) / (2 * h * h)).exp()
            mean = (kernel[:, None] * columns).mean(0) / (kernel.mean() + RARE)
            return torch.cat([0.7 * (mean[:d] + whole(mean[d:], d) @ z), 0.49 * mean[d:]])

        for i, point in enumerate(x):
            value, slope = line(point), torch.autograd.functional.jacobian(line, point)
            bends = slice(2 + level * m, 2 + (level + 1) * m)
            assert torch.allclose(vectors[i, 2 + level], value[:d], atol=1e-12)
            assert torch.allclose(scalars[i, bends], value[d:], atol=1e-12)
            assert torch.allclose(turns[:, i, 2 + level], slope[:d].mT, atol=1e-10)
            assert torch.allclose(rises[:, i, bends], slope[d:].mT, atol=1e-10)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_jacobian_of_a_network_that_is_told_densities_is_autograds(d):
    network, x, y = operator(d), 0.6 * cloud(30, d) + 0.3, cloud(5, d, seed=2)
    context = network.context(x, 0.2, (), -x.square().sum(-1) / 2)
    moved, jacobian = network(y, context, jacobian=True)
    truth = torch.stack([torch.autograd.functional.jacobian(lambda z: network(z[None], context)[0], z) for z in y])
    assert torch.allclose(moved, network(y, context), atol=1e-13)
    assert torch.allclose(jacobian, truth, atol=1e-11)


def test_neither_order_nor_repetition_nor_a_constant_in_the_log_density_matter():
    network, x, log_rho = operator(), cloud(50, 2), cloud(50, seed=2)
    order = torch.randperm(50)
    moved = network(x, x, 0.1, log_density=log_rho)
    assert torch.allclose(moved[order], network(x[order], x[order], 0.1, log_density=log_rho[order]), atol=1e-9)
    twice = network.context(torch.cat([x, x]), 0.1, (), torch.cat([log_rho, log_rho]))
    assert torch.allclose(network(x, twice), moved, atol=1e-9)
    assert torch.allclose(network(x, x, 0.1, log_density=log_rho + 3.0), moved, atol=1e-9)
    assert (network(x, x, 0.1, log_density=-log_rho) - moved).abs().max() > 1e-3


def test_clouds_of_which_nothing_is_known_are_moved_by_a_network_of_their_own():
    network, x = operator(), cloud(2, 50, 2)
    torch.nn.init.normal_(network.blind.head[-1].weight, std=0.3)
    log_rho = -x.square().sum(-1) / 2
    unknown = torch.full((2, 50), math.nan, dtype=torch.float64)
    moved, jacobian = network(x, x, 0.1, jacobian=True)
    assert torch.allclose(moved, network.blind(x, x, 0.1), atol=1e-12) and (moved - x).abs().max() > 1e-3
    assert torch.equal(jacobian, network.blind(x, x, 0.1, jacobian=True)[1])
    assert torch.equal(network(x, x, 0.1, log_density=unknown), network(x, x, 0.1))
    assert (network(x, x, 0.1, log_density=log_rho) - moved).abs().max() > 1e-3
    log_rho[0, 9:] = math.nan  # at fewer points than a cubic has coefficients
    with pytest.raises(ValueError, match="log densities are known of 1 of 2 clouds"):
        network(x, x, 0.1, log_density=log_rho)


def test_marks_that_were_found_before_are_those_found_again():
    network, x, log_rho = operator(), cloud(3, 50, 2), cloud(3, 50, seed=2)
    log_rho[1, :20] = math.nan
    marks = network.marks(x, 0.1, log_rho)
    moved = network(x, x, 0.1, log_density=log_rho)
    assert torch.equal(network(x, x, 0.1, log_density=marks), moved)
    some = torch.tensor([True, False, True])
    assert torch.allclose(network(x[some], x[some], 0.1, log_density=marks.rows(some)), moved[some], atol=1e-12)


def test_narrow_measures_and_single_precision_stay_finite():
    network, x = operator(), cloud(200, 2)
    for scale in (1e-4, 1.0, 1e4):
        log_rho = -x.square().sum(-1) / 2 - 2 * math.log(scale)
        truth = network.double()(scale * x, scale * x, 0.1, log_density=log_rho, jacobian=True)
        y = (scale * x).float()
        found = network.float()(y, y, 0.1, log_density=log_rho.float(), jacobian=True)
        assert all(value.isfinite().all() for value in (*truth, *found))
        if scale == 1:
            assert (determinant(found[1]).double() - determinant(truth[1])).abs().max() < 1e-2


def test_densities_are_seen_through_kernels():
    with pytest.raises(ValueError, match="kernels=0 leaves none"):
        operator(kernels=0)
