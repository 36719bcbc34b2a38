"""How far samples are from the closed forms of Riesz flows: the radial law from a Dirac, quantiles on the line."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gengrad.data.riesz_profile import RieszProfile


def radius_error(x: Tensor, profile: RieszProfile) -> float:
    """Relative error of the radius that the samples' mean square gives: sqrt(mean |x|^2 / E|x|^2) - 1; x (n, d)."""
    return float((x.double().square().sum(1).mean() / profile.mean_square()).sqrt()) - 1


def radial_distance(x: Tensor, profile: RieszProfile) -> float:
    """W_1 between the samples' radii and the exact radial law, in units of the radius; x (n, d).

    On a sphere it is mean | |x| / radius - 1 |. Its floor for n exact draws of a ball is about 0.3 / sqrt(n).
    """
    radii = x.double().norm(dim=1).sort().values
    levels = (torch.arange(len(radii), dtype=torch.float64) + 0.5) / len(radii)
    return float((radii - profile.radial_quantile(levels)).abs().mean()) / profile.radius


def radial_kolmogorov(x: Tensor, profile: RieszProfile) -> float:
    """sup_s |P_n(|x| <= s) - P(|x| <= s)|, for balls; 1 for spheres, whatever the error.

    A sharp figure: at d = 2, r = 1 the outermost hundredth of the radius holds 14 % of the mass, so that radii wrong
    by 1 % show as 0.14. The floor for n exact draws is about 0.87 / sqrt(n).
    """
    radii, n = x.double().norm(dim=1).sort().values, len(x)
    exact, steps = profile.radial_cdf(radii), torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((exact - steps[:-1]).abs(), (exact - steps[1:]).abs()).max())


def quantile_step(quantiles: Tensor, levels: Tensor, cdf: Callable[[Tensor], Tensor], tau: float) -> Tensor:
    """One exact backward step on the line at r = 1 towards a target with the given CDF R.

    Solves Q + 2 tau R(Q) = Q_old + 2 tau s by bisection: its left side increases by at least 1. quantiles, levels s
    (n,), float64. As tau -> 0 these are the flow dQ_s/dt = 2 (s - R(Q_s)) (arXiv 2301.11624; Hertrich et al. 2023).
    """
    right = quantiles + 2 * tau * levels
    low, high = right - 2 * tau, right.clone()
    for _ in range(60):
        middle = (low + high) / 2
        below = middle + 2 * tau * cdf(middle) < right
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def quantile_flow(
    quantiles: Tensor, levels: Tensor, cdf: Callable[[Tensor], Tensor], time: float, steps: int = 1000
) -> Tensor:
    """The quantiles after ``time``, by so many exact backward steps; first order in time / steps."""
    for _ in range(steps):
        quantiles = quantile_step(quantiles, levels, cdf, time / steps)
    return quantiles
