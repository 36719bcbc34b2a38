"""Clouds as near to their measures as so many points come: lattices of the cube, and points that settle."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gengrad.kernel_moments import KernelMoments

# of the kernels by which points settle: the width in mean distances between neighbours, and the steps. Wide ones first:
# a narrow one does not see what is wrong far away
KERNELS = ((6.0, 3), (3.0, 5), (2.0, 7))


def lattice(u: Tensor, d: int, within: Tensor | float = 0.5) -> Tensor:
    """u (count, n, k) with its first d coordinates those of a lattice of n points, in the order of u, shifted as u is.

    The first one is (r + ``within``) / n at the rank r of u, the others are r g^-1, r g^-2, ... modulo 1, g the root of
    g^d = g + 1: for d = 2 the golden ratio, whose lattice of so many points has the least discrepancy.
    """
    rank, g = u[..., :1].argsort(1).argsort(1).to(u.dtype), 2.0
    for _ in range(64):
        g = (1 + g) ** (1 / max(d, 2))
    turns = g ** -torch.arange(1, d, dtype=u.dtype)
    return torch.cat([(rank + within) / u.shape[1], (rank * turns + u[:, :1, 1:d]) % 1.0, u[..., d:]], -1)


def settled(x: Tensor, log_density: Callable[[Tensor], Tensor], smoothed: Callable[[Tensor], Callable]) -> Tensor:
    """x (count, n, d), d > 1, moved until a kernel estimate of their density is the smoothed density of their measures.

    x_i <- x_i - h^2 (grad rho_h - grad (rho * k_h)) / max(rho_h, rho * k_h) at x_i: the gradient flow of the squared
    MMD to the measure with a Gaussian kernel k_h, each point at the pace of its density. A lattice that is pushed
    through quantiles is stretched with them: of mixtures in the plane as 1,024 points, an estimate at the width of 4 of
    their distances has a score that is off by 8 %, and of settled points by 3 %. ``log_density``: of the measures,
    (count, n, d) -> (count, n); ``smoothed``: widths h (count, 1, 1) -> the log density of what they are after a
    convolution with N(0, h^2 I).
    """
    n, d = x.shape[-2:]
    apart = (-log_density(x).mean(1)[:, None, None] / d).exp() / n ** (1 / d)
    for width, steps in KERNELS:
        h = width * apart
        wide = smoothed(h)
        for _ in range(steps):
            x = x - _ahead(x, h, wide)
    return x


def _ahead(x: Tensor, h: Tensor, smoothed: Callable[[Tensor], Tensor]) -> Tensor:
    """h^2 (grad rho_h - grad rho) / max(rho_h, rho) at the points, rho_h theirs and rho that of the log density."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        logs = smoothed(leaf)
        (score,) = torch.autograd.grad(logs.sum(), leaf)
    away = x - x.mean(1, keepdim=True)
    scale = away.square().mean((1, 2), keepdim=True).sqrt()
    y = (away / scale).float()
    found = KernelMoments.apply(y, y, (h / scale).float(), 1, 1)[0].to(x.dtype)
    rho, pull = found[..., :1], (found[..., 1:] - found[..., :1] * y) * scale
    exact = (2 * math.pi * h.square()) ** (x.shape[-1] / 2) * logs.detach().exp()[..., None]
    return (pull - exact * h.square() * score) / torch.maximum(rho, exact)
