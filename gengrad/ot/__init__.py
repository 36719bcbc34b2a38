"""Optimal transport, nothing learned: entropic (Sinkhorn), exact, and the closed forms of Gaussians."""

from .components import principal_components
from .exact import exact_assignment, exact_plan, wasserstein2
from .gaussian import (
    bures_map,
    gaussian_entropic_cost,
    gaussian_jko_step,
    gaussian_kl,
    gaussian_w2,
    ornstein_uhlenbeck,
)
from .riesz import RieszSums, choose_route, kernel_mean, riesz_sums
from .sinkhorn import MAX_MEMORY, SinkhornResult, sinkhorn, sinkhorn_velocity
from .sinkhorn_divergence import sinkhorn_divergence
from .slices import slicing_directions
from .span import rotate_to_span

__all__ = [
    "MAX_MEMORY",
    "RieszSums",
    "SinkhornResult",
    "bures_map",
    "choose_route",
    "exact_assignment",
    "exact_plan",
    "gaussian_entropic_cost",
    "gaussian_jko_step",
    "gaussian_kl",
    "gaussian_w2",
    "kernel_mean",
    "ornstein_uhlenbeck",
    "principal_components",
    "riesz_sums",
    "rotate_to_span",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_velocity",
    "slicing_directions",
    "wasserstein2",
]
