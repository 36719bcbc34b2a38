"""Families of densities: what is sampled has the log density that is handed out with it."""

import math

import pytest
import torch

from gengrad.data.families import clouds, points_of_the_cube, read_families
from gengrad.data.family_members import mixture_quantile
from gengrad.registry import FAMILIES

CASES = [(name, d) for name in FAMILIES for d in (1, 2, 3)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(low, high, cells, d):
    line = low + (high - low) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    return torch.cartesian_prod(*[line] * d).view(-1, d), ((high - low) / cells) ** d


@pytest.mark.parametrize(("name", "d"), CASES)
def test_the_density_has_mass_one(name, d):
    members = FAMILIES.build({"name": name, "reach": 0.5, "smallest": 0.5, "largest": 0.8}).members(3, d, generator())
    x, cell = grid(-4.6, 4.6, {1: 20_000, 2: 500, 3: 110}[d], d)
    mass = members.log_density(x.expand(3, -1, -1)).exp().sum(1) * cell
    # cells that a sharp edge cuts: a share of their number along the edge, 2 % in space
    assert torch.allclose(mass, torch.ones(3, dtype=torch.float64), atol={1: 1e-3, 2: 6e-3, 3: 3e-2}[d])


@pytest.mark.parametrize(("name", "d"), CASES)
def test_the_samples_have_that_density(name, d):
    """E cos(w x) over the samples and by the density on a grid: characteristic functions tell laws apart."""
    members = FAMILIES.build({"name": name, "reach": 0.5, "smallest": 0.5, "largest": 0.8}).members(2, d, generator())
    x = members.push(points_of_the_cube(2, 16_384, d + members.spare, generator(1)))
    points, cell = grid(-4.6, 4.6, {1: 20_000, 2: 500, 3: 110}[d], d)
    rho = members.log_density(points.expand(2, -1, -1)).exp() * cell
    for w in (torch.full((d,), 1.0), torch.arange(1, d + 1).double(), torch.full((d,), -2.5)):
        w = w.double()
        sampled, there = (x @ w + 0.3).cos().mean(1), (rho * (points @ w + 0.3).cos()).sum(1)
        assert torch.allclose(sampled, there, atol={1: 2e-3, 2: 8e-3, 3: 3e-2}[d])  # the edges again


@pytest.mark.parametrize(("name", "d"), CASES)
def test_every_sample_lies_where_its_density_is_positive(name, d):
    x, log_rho, score, _ = clouds([{"name": name}], 4, 256, d, generator())
    assert x.shape == (4, 256, d) and log_rho.shape == (4, 256)
    assert x.isfinite().all() and log_rho.isfinite().all()
    assert score.isfinite().all() if name in ("gaussians", "mixtures", "products") else score.isnan().all()


@pytest.mark.parametrize(("name", "d"), CASES)
def test_weighed_means_over_points_that_reach_farther_are_those_of_the_measure(name, d):
    """E cos(w x) by both; Gaussians reach 1.5 times as far, what has an edge no farther."""
    members = FAMILIES.build({"name": name, "reach": 0.5, "smallest": 0.5, "largest": 0.8}).members(2, d, generator())
    u = points_of_the_cube(2, 16_384, d + members.spare, generator(1))
    x, (far, weight) = members.push(u), members.push_wide(u, 1.5)
    for w in (torch.full((d,), 1.0), torch.arange(1, d + 1).double()):
        one, two = (x @ w.double()).cos().mean(1), (weight * (far @ w.double()).cos()).mean(1)
        assert torch.allclose(one, two, atol=5e-3)
    if members.smooth:
        assert far.std(1).min() > 1.2 * x.std(1).min() and weight.std() > 0.3
    else:
        assert torch.equal(far, x) and (weight == 1).all()


def test_the_first_points_of_clouds_are_of_the_measure_and_the_others_reach_farther():
    x, log_rho, _, weight = clouds(read_families("gaussians"), 8, 256, 1, generator(), first=128, tails=1.5)
    plain = clouds(read_families("gaussians"), 8, 256, 1, generator(), first=128)
    assert torch.equal(x[:, :128], plain[0][:, :128]) and torch.equal(log_rho[:, :128], plain[1][:, :128])
    assert (weight[:, :128] == 1).all() and (plain[3] == 1).all()
    ratio = x[:, 128:].std(1) / plain[0][:, 128:].std(1)
    assert torch.allclose(ratio, torch.full_like(ratio, 1.5), atol=0.05)
    assert log_rho[:, 128:].min() < plain[1][:, 128:].min()  # the measure's own density at them


@pytest.mark.parametrize("d", [1, 2, 3])
def test_clouds_of_gaussians_and_mixtures_have_the_measures_own_moments(d):
    members = FAMILIES.build({"name": "mixtures", "smallest": 0.5}).members(3, d, generator())
    x = members.cloud(points_of_the_cube(3, 512, d + members.spare, generator(1)))
    mean, covariance = members.moments()
    away = x - x.mean(1, keepdim=True)
    assert torch.allclose(x.mean(1), mean, atol=1e-12)
    assert torch.allclose(away.mT @ away / 512, covariance, atol=1e-12)
    far = members.push(points_of_the_cube(3, 2**17, d + members.spare, generator(2)))
    assert torch.allclose(far.mean(1), mean, atol=2e-3)  # and these are the moments of what is drawn
    away = far - far.mean(1, keepdim=True)
    assert torch.allclose(away.mT @ away / 2**17, covariance, atol=1e-3)


def test_a_cloud_says_of_a_mixture_on_the_line_what_its_quantiles_say():
    """The points are those of (k + 1/2) / n, up to the affine move to the moments, a hundredth of them."""
    members = FAMILIES.build({"name": "mixtures", "components": 3}).members(4, 1, generator())
    x = members.cloud(points_of_the_cube(4, 256, 2, generator(1)))[..., 0].sort(-1)[0]
    z = (x[..., None] - members.means[:, None, :, 0]) / members.factors[:, None, :, 0, 0]
    share = (members.weights[:, None] * torch.special.ndtr(z)).sum(-1)
    assert (share - (torch.arange(256) + 0.5) / 256).abs().max() < 0.5 / 256


AXES = [[0.8, 0.6], [-0.6, 0.8]]


def test_the_coordinates_of_products_are_independent_along_their_axes():
    members = FAMILIES.build({"name": "products", "axes": AXES}).members(3, 2, generator())
    x = torch.randn(3, 50, 2, generator=generator(1), dtype=torch.float64)
    parts = [law.log_density((x @ axis)[..., None]) for law, axis in zip(members.marginals, members.axes)]
    assert torch.allclose(members.log_density(x), sum(parts), atol=1e-9)
    assert len({tuple(law.means.flatten().tolist()) for law in members.marginals}) == 2  # not the same twice


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([], "at least 1 item"),
        ([[1.0, 0.0]], "as many rows"),
        ([[1.0], [0.0]], "as many rows"),
        ([[1.0, 0.0], [0.6, 0.8]], "at right angles"),
    ],
)
def test_axes_that_are_no_axes_are_refused(axes, said):
    with pytest.raises(ValueError, match=said):
        read_families({"name": "products", "axes": axes})


def test_axes_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match="2 axes for points of d = 1"):
        FAMILIES.build({"name": "products", "axes": AXES}).members(1, 1, generator())


@pytest.mark.parametrize("u", [1e-6, 0.2, 0.5, 1 - 1e-6])
def test_the_quantile_of_a_mixture_solves_its_distribution_function(u):
    """Narrow components far apart, where Newton's method alone would leave the bracket; one has no weight."""
    means = torch.tensor([-30.0, 0.0, 2.0, 50.0], dtype=torch.float64)
    stds = torch.tensor([0.01, 1.0, 0.1, 5.0], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.3, 0.4, 0.0], dtype=torch.float64)
    x = mixture_quantile(torch.tensor([u], dtype=torch.float64), means, stds, weights)
    assert (weights * torch.special.ndtr((x[:, None] - means) / stds)).sum() == pytest.approx(u, abs=1e-12)


def test_the_quantiles_of_mixtures_of_narrow_and_wide_components_are_all_found():
    """Newton's method within the bracket alone cycles on some of these."""
    given = generator(5)
    means = 4 * torch.randn(200, 1, 4, generator=given, dtype=torch.float64)
    stds = 10 ** (1 - 3 * torch.rand(200, 1, 4, generator=given, dtype=torch.float64))
    weights = torch.rand(200, 1, 4, generator=given, dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    u = torch.rand(200, 500, generator=given, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    x = mixture_quantile(u, means, stds, weights)
    share = (weights * torch.special.ndtr((x[..., None] - means) / stds)).sum(-1)
    assert (share - u).abs().max() < 1e-10


def test_the_particles_of_the_loss_are_others_than_those_of_the_context():
    x = clouds(read_families([{"name": "boxes"}, {"name": "gaussians"}]), 8, 128, 1, generator(), first=64)[0]
    one, two = x[:, :64].sort(1)[0], x[:, 64:].sort(1)[0]
    assert (one - two).abs().amax((1, 2)).min() > 1e-5
    assert torch.allclose(one[:, 4:-4], two[:, 4:-4], atol=0.2)  # of the same measures


def test_the_score_of_a_gaussian_is_its_closed_form():
    members = FAMILIES.build({"name": "gaussians"}).members(2, 2, generator())
    x = torch.randn(2, 5, 2, dtype=torch.float64)
    covariance = members.factors[:, 0] @ members.factors[:, 0].mT
    closed = -torch.linalg.solve(covariance, (x - members.means).mT).mT
    assert torch.allclose(members.score(x), closed, atol=1e-10)


def test_the_log_density_of_a_gaussian_is_its_closed_form():
    members = FAMILIES.build({"name": "gaussians"}).members(2, 2, generator())
    x = torch.randn(2, 5, 2, dtype=torch.float64)
    for k in range(2):
        factor = members.factors[k, 0]
        law = torch.distributions.MultivariateNormal(members.means[k, 0], scale_tril=factor)
        assert torch.allclose(members.log_density(x)[k], law.log_prob(x[k]), atol=1e-10)


def test_even_points_estimate_a_mean_far_better_than_independent_ones():
    errors = {}
    for even in (True, False):
        u = points_of_the_cube(200, 256, 2, generator(), even)
        errors[even] = float((u.square().sum(-1).mean(1) - 2 / 3).square().mean().sqrt())
    assert errors[False] == pytest.approx(math.sqrt(2 * 4 / 45 / 256), rel=0.2)  # of 200 clouds
    assert errors[True] < errors[False] / 10


def test_clouds_are_a_function_of_the_generator_and_all_families_come():
    families = read_families(["gaussians", {"name": "boxes", "reach": 0}])
    one, two = (clouds(families, 64, 32, 2, generator(3))[0] for _ in range(2))
    assert torch.equal(one, two)
    centred = (one.mean(1).abs().amax(1) < 0.35).double().mean()  # boxes lie at the origin
    assert 0.35 < centred < 0.75


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("gausians", "Did you mean 'gaussians'"),
        ([], "at least one family"),
        ({"name": "boxes", "smallest": 2.0, "largest": 1.0}, "smallest=2 is above largest=1"),
        ({"name": "boxes", "reach": -1.0}, "reach: .*greater than or equal to 0"),
        ({"reach": 1.0}, "a family's name, one of"),
    ],
)
def test_a_family_that_cannot_be_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        read_families(given)


@pytest.mark.parametrize("name", ["annuli", "barenblatts"])
def test_round_families_are_refused_above_three_dimensions(name):
    with pytest.raises(ValueError, match="d <= 3"):
        clouds([{"name": name}], 1, 8, 4, generator())


def test_a_share_of_the_contexts_are_independent_points():
    """Even clouds of the line are quantiles of their measure; between independent points there are gaps and clumps."""
    families = read_families(["gaussians"])
    even, mixed = (clouds(families, 64, 96, 1, generator(1), first=64, independent=share) for share in (0.0, 0.5))
    clumps = [x[:, :64, 0].sort(1).values.diff(dim=1).clamp_min(1e-12).log().amin(1) for x, *_ in (even, mixed)]
    assert 0.3 < float((clumps[1] < clumps[0].min() - 0.5).float().mean()) < 0.7
    x, log_rho, score, _ = mixed
    slope = (log_rho[:, 1:64] - log_rho[:, :63]) / (
        x[:, 1:64, 0] - x[:, :63, 0]
    )  # of a quadratic, the mean of the ends
    apart = (x[:, 1:64, 0] - x[:, :63, 0]).abs() > 0.1
    assert torch.allclose(slope[apart], (score[:, 1:64, 0] + score[:, :63, 0])[apart] / 2, rtol=1e-2, atol=1e-2)
    boxes = read_families(["boxes"])  # are not smooth
    only, same = (clouds(boxes, 8, 96, 1, generator(1), first=64, independent=share)[0] for share in (1.0, 0.0))
    assert torch.equal(only, same)
