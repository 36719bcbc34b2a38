"""The inverse of a gradient map, by convex minimisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gengrad.networks.curvature import EXACT, conjugate_gradients

MOST = 100  # Newton steps; five or six are usual


@torch.no_grad()
def invert_gradient(network: nn.Module, y: Tensor, tol: float = 1e-11) -> Tensor:
    """x with grad u(x) = y, the minimiser of the strictly convex u(x) - <x, y>; y (n, d), float64 for full accuracy.

    Damped Newton with the exact Hessian, by conjugate gradients above d = 64; a step is halved for the points at which
    |grad u(x) - y| does not fall. Stops when that is below ``tol`` (in fp32 1e-5) of max(1, |y|) for every point.
    Raises ``ValueError`` for points not found after 100 steps.
    """
    tol = tol if y.dtype == torch.float64 else max(tol, 1e-5)
    goal = tol * y.norm(dim=1).clamp_min(1.0)
    x = y.clone()
    gap = network(x) - y
    error = gap.norm(dim=1)
    damping = torch.ones_like(error)
    for _ in range(MOST):
        left = (~(error <= goal)).nonzero()[:, 0]
        if not len(left):
            return x
        tried = x[left] - damping[left, None] * _newton_step(network, x[left], gap[left])
        new_gap = network(tried) - y[left]
        new_error = new_gap.norm(dim=1)
        better = new_error <= (1 - damping[left] / 4) * error[left]
        kept = left[better]
        x[kept], gap[kept], error[kept] = tried[better], new_gap[better], new_error[better]
        damping[kept] = (2 * damping[kept]).clamp_max(1.0)
        damping[left[~better]] /= 4
        # rounding is reached: no step can be better, and the error is as small as it gets
        error[left[~better & (error[left] <= 1e3 * goal[left]) & (damping[left] < 1e-3)]] = 0.0
    missed = int((error > goal).sum())
    raise ValueError(
        f"the inverse of a transport was not found for {missed} of {len(y)} points after {MOST} Newton steps "
        f"(largest error {float(error.max()):.2g}); such points lie far outside of the flow's mass"
    )


def _newton_step(network: nn.Module, x: Tensor, gap: Tensor) -> Tensor:
    """Hess u(x)^{-1} gap."""
    if x.shape[1] > EXACT:
        return conjugate_gradients(lambda v: network.hessian_product(x, v), gap, iterations=2 * x.shape[1], tol=1e-10)
    return torch.cholesky_solve(gap[..., None], torch.linalg.cholesky(network.hessian(x)))[..., 0]
