"""Gaussians and mixtures against SciPy's densities and their own moments; covariances that are none are refused."""

import math

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import multivariate_normal

from gengrad.data import Gaussian, GaussianMixture, StandardNormal, Uniform, generator_for

MEAN = [1.0, -2.0, 0.5]
COVARIANCE = [[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]]
N = 200_000


def test_a_gaussian_has_scipys_density():
    x = torch.randn(20, 3, dtype=torch.float64, generator=generator_for(0, "test"))
    ours = Gaussian(mean=MEAN, covariance=COVARIANCE).log_density(x).numpy()
    assert ours == pytest.approx(multivariate_normal(MEAN, COVARIANCE).logpdf(x.numpy()), abs=1e-10)


def test_draws_of_a_gaussian_have_its_mean_and_covariance():
    x = Gaussian(mean=MEAN, covariance=COVARIANCE).sample(N, generator_for(0, "test")).double()
    mean, covariance = torch.tensor(MEAN), torch.tensor(COVARIANCE)
    # five standard errors: sqrt(S_ii / N) of a mean, sqrt((S_ii S_jj + S_ij^2) / N) of a covariance
    variances = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() < 5 * (variances / N).sqrt()).all()
    errors = ((variances[:, None] * variances + covariance**2) / N).sqrt()
    assert ((x.T.cov() - covariance).abs() < 5 * errors).all()


def test_a_mixture_has_the_weighted_sum_of_densities():
    means, weights = [[0.0, 1.0], [3.0, -1.0]], [1.0, 3.0]
    covariances = [[[1.0, 0.2], [0.2, 0.5]], [[0.3, 0.0], [0.0, 2.0]]]
    mixture = GaussianMixture(means=means, weights=weights, covariances=covariances)
    x = 3 * torch.randn(20, 2, dtype=torch.float64, generator=generator_for(0, "test"))
    parts = [multivariate_normal(m, c).pdf(x.numpy()) for m, c in zip(means, covariances)]
    assert mixture.log_density(x).exp().numpy() == pytest.approx(0.25 * parts[0] + 0.75 * parts[1], rel=1e-10)


def test_draws_of_a_mixture_have_its_moments():
    weights, means, scales = [1.0, 3.0], [[-2.0, 0.0], [2.0, 1.0]], [0.5, 1.0]
    x = GaussianMixture(means=means, weights=weights, scales=scales).sample(N, generator_for(0, "test")).double()
    w, m, s = torch.tensor([0.25, 0.75]), torch.tensor(means), torch.tensor(scales)
    mean = w @ m
    second = torch.einsum("k,ki,kj->ij", w, m, m) + (w @ s**2) * torch.eye(2)
    # covariance of a mixture: E[m m^T] + E[s^2] I - mean mean^T; five standard errors, of variances below 4
    assert torch.allclose(x.mean(0).float(), mean, atol=5 * 2 / N**0.5)
    assert torch.allclose(x.T.cov().float(), second - mean[:, None] * mean, atol=5 * 4 * 3**0.5 / N**0.5)


CORRELATED = {"mean": [1.0, -2.0], "covariance": [[2.0, 0.6], [0.6, 0.5]]}
TWO = {"means": [[-2.0, 0.0], [2.0, 1.0]], "covariances": [[[0.3, 0.1], [0.1, 0.2]], [[0.5, 0.0], [0.0, 0.1]]]}


@pytest.mark.parametrize("law", [Gaussian(**CORRELATED), GaussianMixture(**TWO, weights=[1, 3]), StandardNormal()])
def test_even_points_stand_for_the_law_better_than_draws(law):
    """E cos(w x + 0.4) over 512 points against 2^17 of them, root mean square over eight clouds."""
    w = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-0.7, 0.7], [1.5, 1.5]], dtype=torch.float64).T

    def means(x):
        return (x @ w + 0.4).cos().mean(0)

    truth = means(law.even(2**17, generator_for(9, "test")))
    clouds = [law.even(512, generator_for(seed, "test")) for seed in range(8)]
    draws = [law.sample(512, generator_for(seed, "test")).double() for seed in range(8)]
    assert all(x.shape == (512, 2) and x.dtype == torch.float64 for x in clouds)
    even, drawn = (torch.stack([means(x) - truth for x in made]).square().mean().sqrt() for made in (clouds, draws))
    assert even < drawn / 4
    large = law.sample(2**17, generator_for(0, "test")).double()
    assert torch.allclose(means(large), truth, atol=6e-3)  # and it is the same law


def test_a_mixture_lists_its_means_as_modes_with_their_weights():
    mixture = GaussianMixture(means=[[0.0], [4.0]], weights=[1.0, 3.0], scales=[0.1, 0.2])
    assert mixture.modes.tolist() == [[0.0], [4.0]] and mixture.mode_weights.tolist() == [0.25, 0.75]
    assert mixture.mode_radius == pytest.approx(3 * 0.2)  # three of the widest standard deviation


def test_the_gradient_of_the_log_density_is_the_score():
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator_for(0, "test"), requires_grad=True)
    (score,) = torch.autograd.grad(Gaussian(mean=MEAN, covariance=COVARIANCE).log_density(x).sum(), x)
    precision = torch.tensor(COVARIANCE, dtype=torch.float64).inverse()
    assert torch.allclose(score, (torch.tensor(MEAN) - x) @ precision, atol=1e-10)


def test_noise_has_the_closed_form_log_density_on_any_event_shape():
    x = torch.zeros(2, 1, 4, 4)
    assert StandardNormal(event_shape=(1, 4, 4)).log_density(x).tolist() == pytest.approx(
        [-8 * math.log(2 * math.pi)] * 2, rel=1e-6
    )
    uniform = Uniform(half_width=2.0, event_shape=(1, 4, 4))
    assert uniform.log_density(x).tolist() == pytest.approx([-16 * math.log(4)] * 2, rel=1e-6)
    assert uniform.log_density(x + 2.1).tolist() == [-math.inf] * 2


@pytest.mark.parametrize(
    ("cls", "settings", "key", "words"),
    [
        (Gaussian, {"covariance": [[1.0, 2.0], [2.0, 1.0]]}, "covariance", "not positive definite"),
        (Gaussian, {"covariance": [[1.0, 1.0], [1.0, 1.0]]}, "covariance", "not positive definite"),
        (Gaussian, {"covariance": [[0.0, 0.0], [0.0, 0.0]]}, "covariance", "not positive definite"),
        (Gaussian, {"covariance": [[1.0, 0.5], [0.0, 1.0]]}, "covariance", "not symmetric"),
        (Gaussian, {"covariance": [[1.0, 0.5]]}, "covariance", "2 x 2"),
        (Gaussian, {"covariance": [[1.0], [0.0, 1.0]]}, "covariance", "2 x 2"),
        (Gaussian, {"mean": []}, "mean", "at least 1"),
        (Gaussian, {"mean": [math.nan, 0.0]}, "mean", "finite"),
        (GaussianMixture, {"means": [[0.0], [1.0, 2.0]]}, "means", "same dimension"),
        (GaussianMixture, {"weights": [1.0, 2.0, 3.0]}, "weights", "3 entries for 2 means"),
        (GaussianMixture, {"weights": [1.0, 0.0]}, "weights", "greater than 0"),
        (GaussianMixture, {"scales": [1.0]}, "scales", "1 entries for 2 means"),
        (GaussianMixture, {"scales": [1.0, -1.0]}, "scales", "greater than 0"),
        (GaussianMixture, {"covariances": [[[1.0, 0.0], [0.0, 1.0]], [[1.0]]]}, "covariances", "component 1"),
        (GaussianMixture, {"scales": [1.0, 1.0], "covariances": [[[1.0]]] * 2}, "covariances", "not both"),
    ],
)
def test_settings_that_are_no_distribution_are_refused_at_their_key(cls, settings, key, words):
    with pytest.raises(ValidationError) as caught:
        cls(**settings)
    errors = caught.value.errors()
    assert errors[0]["loc"][0] == key and words in str(caught.value)
