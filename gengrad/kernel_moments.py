"""Means over a cloud of Gaussian kernels times products of its coordinates, tile by tile, with derivatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# log of what is nothing beside the peak: its fourth power is above the floats that a CPU is slow with
FAINT = {torch.float32: -20.0, torch.float64: -170.0}
NARROW = 0.02  # widths below which they are taken in float64: an exponent is a difference of squares over h^2
TILE = {"cpu": 2**17, "cuda": 2**26}  # kernel entries held at once: of a CPU's cache, of a GPU's memory


class KernelMoments(torch.autograd.Function):
    """E[k(s - x) f_j(s)] (levels, sets, n, columns) over the particles s (sets, N, d) at x (sets, n, d).

    k(z) = exp(-|z|^2 / (2 h^2)), one for each width h / 2^level; ``h`` (sets, 1, 1). The columns f_j are the products
    of coordinates of s up to ``degree``: 1, s, s s', ..., and after them, where particles have ``marks`` (sets, N, m),
    the products of these with coordinates up to ``degree`` - 1: m, m s', ... Those of one degree more are the
    derivative, d/dx E[k f] = (E[k f s'] - E[k f] x') / h^2, so no kernel matrix is kept; x has a gradient, once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, particles: Tensor, h: Tensor, levels: int, degree: int, marks: Tensor | None = None
    ) -> Tensor:
        deeper, blocks = int(ctx.needs_input_grad[0]), [(torch.ones_like(particles[..., :1]), degree)]
        if marks is not None:
            blocks.append((marks, degree - 1))
        powers = [_powers(one, particles, most + deeper) for one, most in blocks]
        found = _means(x, particles, torch.cat(powers, -1) / particles.shape[-2], h, levels)
        kept, higher = [], []
        for (one, most), some in zip(blocks, found.split([part.shape[-1] for part in powers], -1)):
            count = one.shape[-1] * sum(x.shape[-1] ** power for power in range(most + 1))
            kept.append(some[..., :count])
            higher.append(some[..., one.shape[-1] :])
        kept = torch.cat(kept, -1)
        if deeper:
            ctx.save_for_backward(x, torch.cat(higher, -1), kept, h)
        return kept.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple:
        x, higher, found, h = ctx.saved_tensors
        slope = higher.unflatten(-1, (-1, x.shape[-1])) - outer(found, x)
        narrower = 4.0 ** torch.arange(len(found), dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)
        return ((given[..., None, :] @ slope)[..., 0, :] * narrower / h**2).sum(0), None, None, None, None, None


def _powers(columns: Tensor, particles: Tensor, most: int) -> Tensor:
    """``columns`` (sets, N, c) times the products of 0, 1, ... ``most`` coordinates, side by side."""
    found = [columns]
    for _ in range(most):
        found.append(outer(found[-1], particles).flatten(-2))
    return torch.cat(found, -1)


def _means(x: Tensor, particles: Tensor, columns: Tensor, h: Tensor, levels: int) -> Tensor:
    """Kernels times ``columns`` (sets, N, c), (levels, sets, n, c), tile by tile.

    The exponent is one product, of (x, -|x|^2/2, 1)/h^2 and (s, 1, -|s|^2/2); half the width is the fourth power.
    """
    left = torch.cat([x, -0.5 * x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1) / h**2
    ones, squared = torch.ones_like(particles[..., :1]), particles.square().sum(-1, keepdim=True)
    right = torch.cat([particles, ones, -0.5 * squared], -1).mT
    n, faint, tile = x.shape[-2], FAINT[x.dtype], TILE["cpu" if x.device.type == "cpu" else "cuda"]
    sets, rows = max(1, tile // (n * particles.shape[-2])), max(1, tile // particles.shape[-2])
    found = x.new_empty(levels, len(x), n, columns.shape[-1])
    for some in (slice(k, k + sets) for k in range(0, len(x), sets)):
        for these in (slice(k, k + rows) for k in range(0, n, rows)):
            kernel = (left[some, these] @ right[some]).clamp_(faint, 0).exp_()
            for level in range(levels):
                if level:
                    kernel = kernel.square_().square_().clamp_min_(math.exp(faint))
                found[level, some, these] = kernel @ columns[some]
    return found


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]
