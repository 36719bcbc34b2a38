"""Principal components against the eigenvectors of the covariance, and what they do to a coupling."""

import pytest
import torch

from gengrad.data.draws import generator_for
from gengrad.ot import exact_assignment, principal_components


def cloud(n=400, d=30):
    """Gaussian points with standard deviations 1, 1/2, 1/4, ... along turned axes, and a mean."""
    generator = generator_for(0, "test cloud")
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    widths = 0.5 ** torch.arange(d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * widths @ axes.T + 3


def test_components_are_the_first_eigenvectors_of_the_covariance():
    points = cloud()
    found = principal_components(points, 4, generator_for(0, "test"))
    vectors = torch.linalg.eigh(torch.cov(points.T)).eigenvectors.flip(1)[:, :4]
    assert torch.allclose((found * vectors).sum(0).abs(), torch.ones(4, dtype=torch.float64), atol=1e-9)


def test_components_are_orthonormal_and_a_function_of_the_generator():
    points = cloud(20, 60).float()  # fewer points than dimensions
    a, b = (principal_components(points, 19, generator_for(0, "test")) for _ in range(2))
    assert torch.equal(a, b) and torch.allclose(a.T @ a, torch.eye(19), atol=1e-5)


def test_more_components_than_there_are_directions_are_refused():
    for k in (0, 20, 31):
        with pytest.raises(ValueError, match="at most 19 exist"):
            principal_components(cloud(20), k, generator_for(0, "test"))


def test_a_matching_of_few_components_sorts_the_wide_direction_more_than_one_of_all():
    """With 128 points in 30 dimensions of width 1 and one of width 3: the plan in one component is the monotone map."""
    generator = generator_for(0, "test")
    x, y = (torch.randn(128, 31, generator=generator) for _ in range(2))
    y[:, 0] *= 3
    widths = torch.tensor([3.0] + 30 * [1.0])
    basis = principal_components(torch.randn(2000, 31, generator=generator) * widths, 1, generator)
    whole, few = y[exact_assignment(x, y)], y[exact_assignment(x @ basis, y @ basis)]
    correlation = [float(torch.corrcoef(torch.stack([x[:, 0], z[:, 0]]))[0, 1]) for z in (whole, few)]
    assert correlation[1] > 0.95 > 0.8 > correlation[0] > 0.2
