"""The toy densities against the closed forms of their moments and supports."""

import math

import pytest
import torch

from gengrad.data import (
    Checkerboard,
    EightGaussians,
    Moons,
    Pinwheel,
    SwissRoll,
    TwentyFiveGaussians,
    TwoSpirals,
    generator_for,
)

N = 100_000


def draws(data):
    return data.sample(N, generator_for(0, "test")).double()


def assert_moments(x, mean, second):
    """Means and mean squares of each coordinate within five standard errors of the draws at hand."""
    for values, expected in ((x, mean), (x.square(), second)):
        error = values.std(0) / N**0.5
        assert ((values.mean(0) - torch.tensor(expected, dtype=torch.float64)).abs() < 5 * error).all()


def test_eight_gaussians_sit_on_the_circle_with_torchcfms_spread():
    data = EightGaussians()
    assert data.modes.norm(dim=1).tolist() == pytest.approx([5.0] * 8, rel=1e-6)
    # E x^2 = r^2 / 2 + sqrt(0.1) in either coordinate
    assert_moments(draws(data), [0.0, 0.0], [12.5 + math.sqrt(0.1)] * 2)


def test_twenty_five_gaussians_sit_on_the_grid():
    data = TwentyFiveGaussians()
    assert len({tuple(mode) for mode in data.modes.tolist()}) == 25 and data.modes.abs().max() == 4
    assert_moments(draws(data), [0.0, 0.0], [8 + 0.01] * 2)  # mean of {16, 4, 0, 4, 16} is 8


def test_moons_have_the_moments_of_two_half_circles():
    # before scaling: x = cos a or 1 - cos a: mean 1/2, E x^2 = (1/2 + 3/2)/2 = 1 ; y = sin a or 1/2 - sin a:
    # mean 1/4, E y^2 = (1/2 + 3/4 - 2/pi)/2; noise adds .04; then 3 c - 1
    ex, exx = 0.5, 1 + 0.04
    ey, eyy = 0.25, (1.25 - 2 / math.pi) / 2 + 0.04
    assert_moments(draws(Moons()), [3 * ex - 1, 3 * ey - 1], [9 * exx - 6 * ex + 1, 9 * eyy - 6 * ey + 1])


def test_the_checkerboard_fills_its_eight_dark_fields_evenly():
    x = draws(Checkerboard())
    field = (x / 2).floor().long() + 2
    assert field.min() >= 0 and field.max() <= 3
    counts = torch.bincount(4 * field[:, 0] + field[:, 1], minlength=16).reshape(4, 4)
    dark = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert (counts[~dark] == 0).all()
    assert ((counts[dark] - N / 8).abs() < 5 * (N * 7 / 64) ** 0.5).all()  # five binomial standard deviations
    assert_moments(x, [0.0, 0.0], [16 / 3] * 2)  # uniform on [-4, 4] in either coordinate


def test_the_swiss_roll_without_noise_lies_on_its_spiral():
    x = 5 * draws(SwissRoll(noise=0.0))
    t = x.norm(dim=1)
    assert t.min() > 1.5 * math.pi - 1e-4 and t.max() < 4.5 * math.pi + 1e-4
    assert torch.allclose(x, t[:, None] * torch.stack([t.cos(), t.sin()], dim=1), atol=1e-4)  # float32 angles
    assert t.mean().item() == pytest.approx(3 * math.pi, abs=5 * 3 * math.pi / 12**0.5 / N**0.5)


def test_noise_on_the_swiss_roll_adds_its_variance():
    clean, noisy = draws(SwissRoll(noise=0.0)), draws(SwissRoll(noise=1.0))
    added = noisy.square().sum(1).mean() - clean.square().sum(1).mean()
    assert added.item() == pytest.approx(2 / 25, abs=5 * 3.5 / N**0.5)  # the radius squared has deviation 2.4


def test_the_two_spirals_are_mirror_images_of_the_right_length():
    x = draws(TwoSpirals(noise=0.0))
    assert (x.mean(0).abs() < 5 * x.std(0) / N**0.5).all()  # a fair sign: mean zero
    # arm a = s u(s) + w, s of density 2 s / S^2, S = 3 pi, w uniform on [0, 1/2]^2:
    # E|a|^2 = E s^2 + E|w|^2 + 2 E w . E s u(s) = S^2 / 2 + 1/6 + (1 + 2 / S - 4 / S^2)
    s = 3 * math.pi
    radius = 3 * x.norm(dim=1)
    assert radius.max() < s + 0.5**0.5 + 1e-4
    error = 5 * radius.square().std().item() / N**0.5
    assert radius.square().mean().item() == pytest.approx(s**2 / 2 + 1 / 6 + 1 + 2 / s - 4 / s**2, abs=error)


def test_an_unbent_pinwheel_without_width_is_a_star_of_its_arms():
    x = draws(Pinwheel(arms=3, tangential=0.0, bend=0.0))
    radius = x.norm(dim=1)
    # E|x|^2 = 4 (1 + radial^2)
    assert radius.square().mean().item() == pytest.approx(4 * 1.09, abs=5 * 2.6 / N**0.5)
    turns = torch.atan2(x[:, 1], x[:, 0]) * 3 / (2 * math.pi)
    on_an_arm = (turns - turns.round()).abs() < 1e-4
    assert on_an_arm.double().mean() > 0.998  # 1 + 0.3 Z is negative with probability 4e-4


def test_the_ranges_that_the_docstrings_name_hold_and_are_not_wide():
    def draws(cls, **settings):
        return cls(**settings).sample(20_000, torch.Generator().manual_seed(0))

    moons = draws(Moons, noise=0.0)
    assert torch.allclose(moons.amin(0), torch.tensor([-4.0, -2.5]), atol=0.01)
    assert torch.allclose(moons.amax(0), torch.tensor([5.0, 2.0]), atol=0.01)
    roll = draws(SwissRoll, noise=0.0).norm(dim=1)
    assert float(roll.min()) == pytest.approx(0.94, abs=0.01) and float(roll.max()) == pytest.approx(2.83, abs=0.01)
    assert 3.2 < float(draws(TwoSpirals, noise=0.0).norm(dim=1).max()) < 3.4
    assert float((draws(Pinwheel).norm(dim=1) < 4).float().mean()) > 0.995
