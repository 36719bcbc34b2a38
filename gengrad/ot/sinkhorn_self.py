"""The self problem of a cloud in plain batched PyTorch, in the letters of `sinkhorn_core`: solved, or provably nothing.

The plan is symmetric, P_ij = exp(x_i . x_j / eps + s_i + s_j), so the state is one potential.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sinkhorn_kernels import BlockedKernel, DenseKernel, matvec, product


@dataclass
class SelfSolution:
    """The symmetric solve of a cloud with itself: P_ij = exp(x_i . x_j / eps + s_i + s_j)."""

    s: Tensor  # (B, n)
    log_row: Tensor  # (B, n), of the last sweep
    iterations: Tensor
    marginal_error: Tensor
    error: Tensor  # (B,) bound on the rms error of the self map, in the units of x


def solve_self(
    kernel: DenseKernel | BlockedKernel,
    s: Tensor,
    a: Tensor,
    eps: Tensor,
    spread: Tensor,
    rate: Tensor,
    goal: Tensor,
    residual_goal: float,
    max_iter: int,
) -> SelfSolution:
    """Iterate s <- s + theta r, r = log a - s - log_row(s) less its constant part, until the self map is within
    `goal` (B,) in rms, and s within `residual_goal`.

    The Gaussian kernel is positive definite, so the plan's correlation operator has its spectrum in [0, 1], the 1
    being that of constants, which the plan's total mass settles exactly. With the rest in [0, rate], theta =
    2 / (2 + rate) contracts by rate / (2 + rate), at most 1/3, at every eps: no annealing. `rate` (B,) is a first
    guess, raised where two residuals show a slower mode. The potential's error is at most the residual, the map's at
    most that times `spread`, the deviation of a row of the plan along one direction.
    """
    log_a = torch.log(a).clamp_min(-1e4)
    kernel.at(eps)
    before = None
    for k in range(1, max_iter + 1):
        log_row = kernel.rows(s)
        log_total = torch.logsumexp(s + log_row, -1, keepdim=True)
        r = log_a - s - log_row + log_total
        s, log_row = s - log_total / 2, log_row - log_total / 2  # a plan of mass one
        size = torch.sqrt((a * r.square()).sum(-1))
        error = size * spread
        if k == max_iter or bool(((error <= goal) & (size <= residual_goal)).all()):
            break
        if before is not None:
            rate = slower_mode(rate, theta, (a * r * before).sum(-1), (a * before.square()).sum(-1))  # noqa: F821
        theta, before = 2 / (2 + rate), r
        s = s + theta[:, None] * r
    marginal = (torch.exp(s + log_row) - a).abs().sum(-1)
    return SelfSolution(s, log_row, torch.full_like(eps, k), marginal, error)


def slower_mode(rate: Tensor, theta: Tensor, inner: Tensor, square: Tensor) -> Tensor:
    """The rate, raised to the eigenvalue that two residuals of `solve_self` show: r' = (1 - theta (1 + rate)) r."""
    seen = (1 - inner / square.clamp_min(torch.finfo(square.dtype).tiny)) / theta - 1
    return torch.maximum(rate, seen.clamp(0.0, 1.0))


def skip_bound(x: Tensor, a: Tensor, eps: Tensor, coordinates: int, block: int = 2048) -> tuple[Tensor, Tensor]:
    """Lower bound on the self mass and upper bound on rms |self map - x|, from some of the coordinates only.

    Scalings at most 1 give P_ij / a_i <= sqrt(a_j / a_i) exp(-|x_i - x_j|^2 / (2 eps)); a distance in a subset of
    the coordinates is at most the whole one; t exp(-t^2 / (2 eps)) falls beyond t = sqrt(eps). Both bounds are
    rigorous and cost n^2 x `coordinates` instead of n^2 d.
    """
    d = x.shape[-1]
    z = x[..., :: max(1, d // coordinates)] / torch.sqrt(eps)[:, None, None]
    half, root = z.square().sum(-1) / 2, torch.sqrt(a)
    mass, square = torch.zeros_like(eps), torch.zeros_like(eps)
    for i in range(0, x.shape[1], block):
        rows = slice(i, i + block)
        gap = (half[:, rows, None] + half[:, None, :] - product(z[:, rows], z)).clamp_(
            0.0, 80.0
        )  # t^2 / (2 eps); beyond 80 the exponentials would be denormal, which a CPU takes 20 times as long for
        near = torch.where(gap > 0.5, gap.mul(2).sqrt_(), 1.0) * torch.exp(-gap.clamp_min(0.5))
        k = torch.exp(-gap)
        for w, out in ((k, "mass"), (near, "square")):
            w.diagonal(offset=i, dim1=1, dim2=2).zero_()
            row = matvec(w, root) * root[:, rows]  # a_i times the row's bound
            if out == "mass":
                mass += row.sum(-1)
            else:
                square += (row.square() / a[:, rows].clamp_min(1e-30)).sum(-1)
    return 1 - mass, torch.sqrt(square * eps)
