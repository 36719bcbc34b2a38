"""Atoms, the closed form of a burst atom, and pictures as densities."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from gengrad.data import Diracs, ImageDensity, RieszProfile, generator_for
from gengrad.data.image_density import smiley
from gengrad.data.riesz_profile import dilations, profile_radius
from gengrad.functionals import RieszMMD


def draws(distribution, n, seed=0):
    return distribution.sample(n, generator_for(seed, "test"))


@pytest.mark.parametrize(("d", "radius"), [(1, 1.0), (2, math.pi / 4), (3, 2 / 3), (10, 0.697388)])
def test_the_radius_at_r_one_is_the_published_one(d, radius):
    assert profile_radius(d, 1.0) == pytest.approx(radius, abs=5e-7)


def test_on_a_line_the_profile_at_r_one_is_uniform():
    x = draws(RieszProfile(d=1), 20_000)[:, 0].sort().values
    uniform = torch.linspace(-1, 1, 20_000)
    assert (x - uniform).abs().max() < 2 * 5 * 0.5 / 20_000**0.5  # five standard errors of a quantile, on width 2


@pytest.mark.parametrize(("d", "r"), [(1, 0.5), (1, 1.5), (2, 0.5), (2, 1.0), (2, 1.5), (3, 0.5), (3, 1.0), (10, 1.5)])
def test_the_profile_moves_as_its_formula_says(d, r):
    """At time t the exact velocity is x / ((2 - r) t) everywhere on the support."""
    profile, n = RieszProfile(d=d, r=r, time=1.2), 4000
    x = draws(profile, n)
    v, expected = RieszMMD(r=r).velocity(x), x / ((2 - r) * 1.2)
    # n draws leave fluctuations of a few 1 / sqrt(n), more at the singular kernels of small r
    assert (v - expected).norm() / expected.norm() < (0.25 if r < 1 else 0.05)
    slope = (v * x).sum() / (expected * x).sum()
    assert slope == pytest.approx(1, abs=0.06 if r < 1 else 0.03)


@pytest.mark.parametrize("r", [0.5, 1.0, 1.5])
def test_the_profile_is_its_law(r):
    profile = RieszProfile(d=2, r=r, time=0.7)
    radii = draws(profile, 20_000).norm(dim=1).sort().values
    inner = radii < 0.9999 * profile.radius  # at r = 1.5 fp32 rounds one in a hundred draws onto the edge
    distance = (profile.radial_cdf(radii) - torch.arange(20_000) / 20_000).abs()[inner]
    assert distance.max() < 1.95 / 20_000**0.5  # Kolmogorov at odds 1e-3
    levels = torch.linspace(0.01, 0.9, 50, dtype=torch.float64)
    assert torch.allclose(profile.radial_cdf(profile.radial_quantile(levels)), levels)
    assert radii.square().mean() == pytest.approx(profile.mean_square(), rel=0.02)
    assert radii.max() <= profile.radius * (1 + 1e-6)


@pytest.mark.parametrize("r", [0.5, 1.0, 1.5])
def test_dilations_solve_their_recursion_and_tend_to_the_flow(r):
    s = [0.0, *dilations(r, 0.01, 200)]
    for before, after in pairwise(s):
        assert after - before == pytest.approx(0.01 * after ** (r - 1), rel=1e-9)
    assert s[-1] == pytest.approx(((2 - r) * 2.0) ** (1 / (2 - r)), rel=0.04)  # first order in tau


def test_dilations_are_minimisers_of_the_backward_step_on_the_line():
    """F + W^2 / (2 tau) of the dilated profile is least at the recursion's factor, among dilations."""
    tau, r = 0.3, 1.5
    before, after = dilations(r, tau, 2)
    x = draws(RieszProfile(d=1, r=r, dilation=1.0), 3000).double()
    energy, square = float(RieszMMD(r=r)(x)), float(x.square().mean())

    def objective(s):
        return s**r * energy + (s - before) ** 2 * square / (2 * tau)

    # at the optimum E|x|^2 = -r F for the exact profile; 3000 draws keep that to about 2 %
    found = min(np.linspace(0.5 * after, 1.5 * after, 2001), key=objective)
    assert found == pytest.approx(after, rel=0.03)


def test_a_dirac_of_one_number_fits_any_space():
    assert torch.equal(draws(Diracs(points=[[0.5]], event_shape=(1, 4, 4)), 3), torch.full((3, 1, 4, 4), 0.5))
    assert Diracs(points=[[0.0, 1.0, 2.0]]).event_shape == (3,)


def test_diracs_have_their_weights():
    x = draws(Diracs(points=[[0.0, 0.0], [1.0, 0.0]], weights=[1.0, 3.0]), 4000)
    assert x[:, 0].mean() == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 4000) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"points": [[0.0], [0.0, 1.0]]}, "as many coordinates"),
        ({"points": [[0.0], [1.0]], "weights": [1.0]}, "1 weights for 2 points"),
        ({"points": [[0.0, 1.0]], "event_shape": (3,)}, "give 3 coordinates"),
        ({"points": []}, "at least 1 item"),
    ],
)
def test_diracs_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Diracs(**settings)


def save(tmp_path, pixels, name="picture.png"):
    Image.fromarray(pixels).save(tmp_path / name)
    return str(tmp_path / name)


def test_mass_lies_where_the_picture_is_dark_and_upright(tmp_path):
    pixels = np.full((20, 40), 255, np.uint8)
    pixels[0, 0] = 0  # the upper left corner, and half as dark the lower right one
    pixels[-1, -1] = 128
    x = draws(ImageDensity(path=save(tmp_path, pixels)), 6000)
    left = x[:, 0] < 0
    assert left.double().mean() == pytest.approx(255 / (255 + 127), abs=5 * (0.22 / 6000) ** 0.5)
    # the picture is 2 x 1 and fills [-1, 1] in its width; a pixel has side 1/20
    assert (x[left] - torch.tensor([-0.975, 0.475])).abs().max() <= 0.025 + 1e-6
    assert (x[~left] - torch.tensor([0.975, -0.475])).abs().max() <= 0.025 + 1e-6


def test_a_drawing_with_alpha_lies_on_white_and_sixteen_bits_are_scaled(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)  # black ink, nowhere opaque but in one row
    clear[2, :, 3] = 255
    x = draws(ImageDensity(path=save(tmp_path, clear)), 500)
    assert ((x[:, 1] - 0.375).abs() <= 0.125).all()
    deep = np.full((8, 8), 65535, np.uint16)
    deep[:, 5] = 20_000
    x = draws(ImageDensity(path=save(tmp_path, deep, "deep.png")), 500)
    assert ((x[:, 0] - 0.375).abs() <= 0.125).all()


def test_inverted_the_light_holds_the_mass(tmp_path):
    path = save(tmp_path, (smiley(64) * 255).astype(np.uint8))
    assert torch.equal(draws(ImageDensity(path=path, invert=True), 50), draws(ImageDensity(path=path, invert=True), 50))
    dark = save(tmp_path, 255 - (smiley(64) * 255).astype(np.uint8), "dark.png")
    assert torch.equal(draws(ImageDensity(path=path, invert=True), 500), draws(ImageDensity(path=dark), 500))


def test_a_picture_without_mass_is_refused_with_what_to_change(tmp_path):
    white = save(tmp_path, np.full((8, 8), 255, np.uint8))
    with pytest.raises(ValueError, match=r"all white.*invert to true"):
        ImageDensity(path=white)
    with pytest.raises(ValueError, match=r"all black.*invert to false"):
        ImageDensity(path=save(tmp_path, np.zeros((8, 8), np.uint8), "black.png"), invert=True)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="not a readable image"):
        ImageDensity(path=str(tmp_path / "text.png"))
    whole = save(tmp_path, (np.random.default_rng(0).random((64, 64)) * 255).astype(np.uint8))
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "picture.png").read_bytes()[:900])
    with pytest.raises(ValueError, match="cut short"):
        ImageDensity(path=str(cut))
    with pytest.raises(FileNotFoundError, match="no image file"):
        ImageDensity(path=whole + "x")
