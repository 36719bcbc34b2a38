"""The radial profiles: unit mass, known second moments, samples that follow their density."""

import pytest
import torch
from scipy.special import betaincinv

from gengrad.data import Ball, Barenblatt, Semicircle, generator_for

# E |x|^2 = R^2 (d/2) / (p + 1 + d/2)
CASES = [
    (Barenblatt(m=2.0, radius=0.5, dimension=1), 0.25 * 0.5 / 2.5),
    (Barenblatt(m=3.0, radius=2.0, dimension=2), 4 / 2.5),
    (Semicircle(radius=2.0), 4 * 0.5 / 2),
    (Ball(radius=2.0, dimension=3), 4 * 1.5 / 2.5),
]


@pytest.mark.parametrize(("profile", "second"), CASES)
def test_a_profile_has_its_second_moment(profile, second):
    x = profile.sample(100_000, generator_for(0, "test")).double()
    # stratified radii: the error of the mean is far below 1 / sqrt(n)
    assert float(x.square().sum(1).mean()) == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("profile", [CASES[0][0], CASES[2][0], Ball(dimension=1)])
def test_a_profile_on_the_line_has_unit_mass_and_none_outside(profile):
    grid = torch.linspace(-1.2, 1.2, 20001, dtype=torch.float64)[:, None] * profile.radius
    density = profile.log_density(grid).exp()
    assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1.0, abs=1e-3)  # a jump or a root at the edge
    assert (density[grid[:, 0].abs() > profile.radius] == 0).all()


def test_samples_follow_the_density_in_the_plane():
    profile = Barenblatt(m=2.0, radius=1.0, dimension=2)
    x = profile.sample(50_000, generator_for(0, "test"))
    inside = float((x.norm(dim=1) < 0.5).double().mean())
    # mass within r of the profile (1 - r^2) 2/pi: 2 r^2 - r^4
    assert inside == pytest.approx(2 * 0.25 - 0.0625, abs=2e-3)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_samples_are_spread_more_evenly_than_independent_ones(dimension):
    source = Ball(radius=1.0, dimension=dimension)
    draws = torch.stack([source.sample(256, torch.Generator().manual_seed(seed)) for seed in range(40)])
    second = 1 / (dimension + 2)  # E x_i^2
    assert draws.mean(1).std(0).max() < 0.5 * (second / 256) ** 0.5  # of independent ones: (second / 256)^(1/2)
    assert draws.mean((0, 1)).abs().max() < 0.02 and abs(float(draws.square().mean()) - second) < 0.005


@pytest.mark.parametrize(
    "law", [Barenblatt(dimension=1), Barenblatt(m=3.0, dimension=2), Semicircle(), Ball(), Ball(dimension=3)]
)
def test_an_even_cloud_has_the_law_and_is_nearer_to_it_than_draws(law):
    """By the shares of mass within nine radii, and the mean of the points, which is the centre."""
    (d,), p = law.event_shape, law.power()
    shares = torch.arange(1, 10, dtype=torch.float64) / 10
    radii = torch.from_numpy(betaincinv(d / 2, p + 1, shares.numpy())).sqrt() * law.radius

    def off(x):
        within = (x.norm(dim=1)[:, None] <= radii).double().mean(0)
        return float((within - shares).abs().max()), float(x.mean(0).norm()) / law.radius

    even, drawn = (
        torch.tensor([off(make(500, generator_for(seed, "test")).double()) for seed in range(5)]).amax(0)
        for make in (law.even, law.sample)
    )
    # quantiles in the radius but for half a point on either side; on the line these are of the coordinate
    assert even[0] <= 1.5 / 500 and even[1] < 0.01
    assert even.sum() < 0.8 * drawn.sum()
    assert law.log_density(law.even(500, generator_for(0, "test"))).isfinite().all()
