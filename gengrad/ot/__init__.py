"""Optimal transport, nothing learned: entropic (Sinkhorn), exact, and the closed forms of Gaussians."""

from .exact import exact_assignment, exact_plan, wasserstein2
from .gaussian import bures_map, gaussian_entropic_cost, gaussian_w2
from .sinkhorn import MAX_MEMORY, SinkhornResult, sinkhorn, sinkhorn_velocity
from .sinkhorn_divergence import sinkhorn_divergence
from .span import rotate_to_span

__all__ = [
    "MAX_MEMORY",
    "SinkhornResult",
    "bures_map",
    "exact_assignment",
    "exact_plan",
    "gaussian_entropic_cost",
    "gaussian_w2",
    "rotate_to_span",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_velocity",
    "wasserstein2",
]
