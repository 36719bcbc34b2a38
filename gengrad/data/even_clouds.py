"""Clouds as near to their measures as so many points come: lattices of the cube, and points that settle."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gengrad.kernel_moments import NARROW, KernelMoments

# of the kernels by which points settle: the width in mean distances between neighbours, and the steps. Wide ones first:
# a narrow one does not see what is wrong far away
KERNELS = ((6.0, 3), (3.0, 5), (2.0, 7))
MOST = 4096  # points that settle: the time grows with their square
FLAT = 3  # dimensions up to which lattices are better than nets, and n points are dense enough to settle


def ranks(u: Tensor, within: Tensor | float = 0.5) -> Tensor:
    """(r + ``within``) / n at the rank r of each coordinate of u (count, n, k) among its n."""
    return (u.argsort(1).argsort(1).to(u.dtype) + within) / u.shape[1]


def lattice(u: Tensor, d: int, within: Tensor | float = 0.5) -> Tensor:
    """u (count, n, k) with its first d coordinates those of a lattice of n points, in the order of u, shifted as u is.

    The first one is (r + ``within``) / n at the rank r of u, the others are r g^-1, r g^-2, ... modulo 1, g the root of
    g^d = g + 1: for d = 2 the golden ratio, whose lattice of so many points has the least discrepancy. Above d = 3,
    where g is so near to 1 that coordinates resemble each other, each has its own ``ranks``.
    """
    if d == 1 or d > FLAT:
        return torch.cat([ranks(u[..., :d], within), u[..., d:]], -1)
    rank, g = u[..., :1].argsort(1).argsort(1).to(u.dtype), 2.0
    for _ in range(64):
        g = (1 + g) ** (1 / d)
    turns = g ** -torch.arange(1, d, dtype=u.dtype, device=u.device)
    return torch.cat([(rank + within) / u.shape[1], (rank * turns + u[:, :1, 1:d]) % 1.0, u[..., d:]], -1)


def settled(x: Tensor, log_density: Callable[[Tensor], Tensor], smoothed: Callable[[Tensor], Callable]) -> Tensor:
    """x (count, n, d) moved until a kernel estimate of their density is the smoothed density of their measures.

    x_i <- x_i - h^2 (grad rho_h - grad (rho * k_h)) / max(rho_h, rho * k_h) at x_i: the gradient flow of the squared
    MMD to the measure with a Gaussian kernel k_h, each point at the pace of its density. A lattice that is pushed
    through quantiles is stretched with them, and the scores of kernel estimates are about twice as far off as those of
    settled points. ``log_density``: of the measures, (count, n, d) -> (count, n); ``smoothed``: widths h (count, 1, 1)
    -> the log density of what they are after a convolution with N(0, h^2 I).

    There is one h for all of a measure, of the mean distance between neighbours: components far narrower than that are
    left as they are. As they are, too: points on the line (quantiles, nothing is nearer) and above d = 3, up to 4 d of
    them, and more than ``MOST``, whose lattice is near enough.
    """
    n, d = x.shape[-2:]
    if not 1 < d <= FLAT or not 4 * d < n <= MOST:
        return x
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
    y, width = away / scale, h / scale
    if float(width.min()) > NARROW:
        y, width = y.float(), width.float()
    found = KernelMoments.apply(y, y, width, 1, 1)[0].to(x.dtype)
    rho, pull = found[..., :1], (found[..., 1:] - found[..., :1] * y) * scale
    exact = (2 * math.pi * h.square()) ** (x.shape[-1] / 2) * logs.detach().exp()[..., None]
    return (pull - exact * h.square() * score) / torch.maximum(rho, exact)
