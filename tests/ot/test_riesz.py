"""Kernel sums: tiles, sorting and slices agree with the sums written out, and with one another."""

import math

import pytest
import torch

from gengrad.ot import choose_route, kernel_mean, riesz, riesz_sums, slicing_directions


def cloud(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(x, y, r):
    """Potential and gradient from all differences, coincident pairs left out."""
    s = x[:, None] - y
    size = s.norm(dim=-1, keepdim=True)
    weight = torch.where(size > 0, r * size ** (r - 2), 0.0)
    return (size**r).mean(1)[:, 0], (weight * s).mean(1)


@pytest.mark.parametrize("d", [1, 2, 4, 5, 12])
@pytest.mark.parametrize("r", [0.5, 1.0, 1.7])
def test_tiles_are_the_sums_written_out(d, r, monkeypatch):
    monkeypatch.setattr(riesz, "TILE", ((16, 48), (16, 48)))  # several tiles, the last ones cut off
    x, y = cloud(70, d, 0), cloud(101, d, 1) + 0.5
    y[3] = x[5]
    for other in (y, x):
        found = riesz_sums(x, other, r, route="tiles")
        potential, gradient = written_out(x, other, r)
        # the product of d > 4 sees 1e-16 of |x|^2, which the fourth root of r = 1/2 magnifies for the coincident pair
        assert torch.allclose(found.potential, potential, rtol=1e-9, atol=1e-5)
        assert torch.allclose(found.gradient, gradient, rtol=1e-9, atol=1e-9)


def test_duplicates_keep_the_gradient_finite_and_far_clouds_their_digits():
    x = torch.cat([cloud(20, 8, 0), cloud(20, 8, 0)]) + 1000
    found = riesz_sums(x.float(), x.float(), 0.5)
    expected = written_out(x, x, 0.5)[1]
    # fp32 at 1000 keeps 6e-5 of a coordinate; a pair at distance one has a slope of about one
    assert torch.allclose(found.gradient.double(), expected, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorting_agrees_with_tiles_on_the_line_with_ties(dtype):
    x, y = cloud(60, 1, 0, dtype), cloud(75, 1, 1, dtype)
    x[7] = x[3]
    y[:2] = x[3]
    for other in (x, y):
        by_sort, by_tiles = (riesz_sums(x, other, route=route) for route in ("sort", "tiles"))
        atol = 1e-6 if dtype == torch.float32 else 1e-12
        assert torch.allclose(by_sort.potential, by_tiles.potential, atol=atol)
        assert torch.allclose(by_sort.gradient, by_tiles.gradient, atol=atol)


@pytest.mark.parametrize(("d", "counts", "order"), [(2, (16, 64), 1.0), (3, (96, 1536), 0.5), (10, (160, 2560), 0.5)])
def test_slices_tend_to_tiles_at_the_rate_of_their_directions(d, counts, order):
    x, y = cloud(80, d, 0), cloud(90, d, 1) + 1
    exact = riesz_sums(x, y, route="tiles")
    few, many = (riesz_sums(x, y, route="slices", directions=count) for count in counts)
    error = [float((s.gradient - exact.gradient).norm() / exact.gradient.norm()) for s in (few, many)]
    # one draw of directions scatters about its rate: half of the gain is asked for
    assert error[1] < 2 * error[0] * (counts[0] / counts[1]) ** order
    assert error[1] < (0.02 if d == 2 else 0.1)
    assert torch.allclose(many.potential, exact.potential, rtol=0.1)


def test_on_a_line_the_slice_is_the_line():
    x, y = cloud(30, 1, 0), cloud(40, 1, 1)
    one, other = riesz_sums(x, y, route="slices"), riesz_sums(x, y, route="sort")
    assert torch.allclose(one.gradient, other.gradient) and torch.allclose(one.potential, other.potential)


@pytest.mark.parametrize("r", [0.8, 1.0, 1.5])
@pytest.mark.parametrize("d", [1, 3, 7])
def test_the_differentiable_means_have_the_gradients_of_finite_differences(d, r):
    x, y = cloud(7, d, 0).requires_grad_(), cloud(9, d, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kernel_mean(a, b, r), (x, y), atol=1e-6)
    assert torch.autograd.gradcheck(lambda a: kernel_mean(a, a, r), (x,), atol=1e-6)


def test_the_mean_of_many_is_taken_without_a_matrix_of_pairs():
    x = cloud(20_000, 2, 0, torch.float32)  # the matrix would be 1.6 GB
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    riesz_sums(x, x)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100e6


@pytest.mark.parametrize(
    ("n", "d", "r", "expected"),
    [(10, 1, 1.0, "sort"), (10, 1, 1.5, "tiles"), (8000, 2, 1.0, "tiles"), (300_000, 2, 1.0, "slices"),
     (300_000, 2, 1.5, "tiles"), (8000, 784, 1.0, "tiles")],
)  # fmt: skip
def test_the_route_follows_from_the_sizes_and_says_why(n, d, r, expected):
    route, reason = choose_route(n, n, d, r)
    assert route == expected and reason


def test_the_route_is_logged_and_can_be_chosen(caplog):
    x = cloud(5, 1, 0)
    with caplog.at_level("DEBUG", logger="gengrad.ot.riesz"):
        assert riesz_sums(x, x).route == "sort"
        assert riesz_sums(x, x, route="tiles").reason == "as asked"
    assert "on a line with r = 1 a sort is exact" in caplog.text


@pytest.mark.parametrize(
    ("x", "y", "settings", "says"),
    [
        (torch.zeros(3), torch.zeros(3, 1), {}, r"x\[:, None\]"),
        (torch.zeros(3, 2), torch.zeros(3, 1), {}, r"\(n, d\) and \(m, d\)"),
        (torch.zeros(0, 2), torch.zeros(3, 2), {}, "not empty"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"r": 2.0}, "0 < r < 2"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"r": 0.0}, "0 < r < 2"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"route": "sort"}, "points on a line"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"r": 1.5, "route": "slices"}, "needs r = 1"),
    ],
)
def test_what_cannot_be_summed_is_refused_with_what_is_allowed(x, y, settings, says):
    with pytest.raises(ValueError, match=says):
        riesz_sums(x, y, **settings)


def test_directions_are_even():
    u = slicing_directions(5, 15)
    assert torch.allclose(u.norm(dim=0), torch.ones(15, dtype=torch.float64))
    assert torch.allclose(u @ u.T / 15, torch.eye(5, dtype=torch.float64) / 5)
    angles = torch.atan2(*slicing_directions(2, 6).flip(0))
    assert torch.allclose(angles, torch.arange(6, dtype=torch.float64) * math.pi / 6)
