"""The closed forms on the line and of the radial law, against particles and against themselves."""

import pytest
import torch

from gengrad.data import Gaussian, RieszProfile, generator_for
from gengrad.evaluation.riesz import quantile_flow, quantile_step, radial_distance, radial_kolmogorov, radius_error
from gengrad.flows import particle_flow
from gengrad.functionals import RieszMMD

N = 400
LEVELS = (torch.arange(N, dtype=torch.float64) + 0.5) / N


def uniform_cdf(q):
    return q.clamp(0, 1)


def normal_cdf(q):
    return torch.special.ndtr(q)


def dirac_cdf(q):
    return (q >= 0).double()


def test_towards_a_uniform_target_quantiles_decay_exponentially():
    start = 0.2 + 0.6 * LEVELS  # inside of [0, 1], where R(q) = q
    found = quantile_flow(start, LEVELS, uniform_cdf, 0.5, steps=4000)
    # first order: an error of tau = 1/8000 on differences below 0.2
    assert torch.allclose(found, LEVELS + torch.exp(torch.tensor(-1.0)) * (start - LEVELS), atol=1e-4)
    one = quantile_step(start, LEVELS, uniform_cdf, 0.3)
    assert torch.allclose(one, (start + 0.6 * LEVELS) / 1.6)


def test_a_dirac_on_its_way_to_another_stretches_and_piles_up():
    found = quantile_flow(torch.full_like(LEVELS, -1), LEVELS, dirac_cdf, 0.8)
    assert torch.allclose(found, (-1 + 2 * 0.8 * LEVELS).clamp_max(0), atol=2e-3)


@pytest.mark.parametrize("cdf", [uniform_cdf, normal_cdf, dirac_cdf])
def test_particles_on_the_line_follow_the_quantiles_within_a_hundredth(cdf):
    """The particle flow from a (nearly) Dirac at -1; targets at their exact quantiles."""
    levels, time, steps = LEVELS[:, None], 1.0, 200
    targets = {
        uniform_cdf: levels,
        normal_cdf: torch.special.ndtri(levels),
        dirac_cdf: torch.zeros(1, 1, dtype=torch.float64),
    }
    x = -1 + 1e-9 * levels
    found = particle_flow(RieszMMD(targets[cdf]), x, [time / steps] * steps).states[-1][:, 0]
    exact = quantile_flow(x[:, 0], LEVELS, cdf, time)
    # explicit against exact: both of first order, and particles that have met a Dirac step over it by tau
    assert (found - exact).abs().mean() < 0.01


def test_a_backward_step_lowers_the_energy_by_its_transport_cost():
    y = torch.special.ndtri(LEVELS)[:, None]
    functional, tau, x = RieszMMD(y), 0.4, torch.full_like(LEVELS, -2) + 0.1 * LEVELS
    after = quantile_step(x, LEVELS, normal_cdf, tau)
    paid = (after - x).square().mean() / (2 * tau)
    assert functional(after[:, None]) + paid < functional(x[:, None])


def test_exact_draws_have_no_error_but_their_number():
    for d in (1, 2, 3, 10):
        profile = RieszProfile(d=d, time=1.2)
        x = profile.sample(20_000, generator_for(0, "test"))
        assert abs(radius_error(x, profile)) < 0.01
        assert radial_distance(x, profile) < 5 * 0.3 / 20_000**0.5
        # a radius wrong by one in fifty shows as just that
        assert radius_error(1.02 * x, profile) == pytest.approx(0.02, abs=0.01)
        if profile.beta is not None:
            assert radial_kolmogorov(x, profile) < 1.95 / 20_000**0.5 < radial_kolmogorov(1.02 * x, profile)
        else:
            assert radial_distance(1.02 * x, profile) == pytest.approx(0.02, abs=1e-3)


def test_a_gaussian_is_not_the_profile():
    x = Gaussian().sample(5000, generator_for(0, "test"))
    assert radial_distance(x, RieszProfile(time=1.2)) > 0.1
