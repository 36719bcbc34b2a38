"""Gaussian kernel estimates of a cloud's density and its gradient, as features of a point, with derivatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

RARE = 3e-4  # of the kernel's peak: a density below which the particles around a point say nothing of it
NARROW = 0.02  # widths below which moments are taken in float64: they are divided by h^2 after their means cancel
# log of what is nothing beside the peak: its fourth power is above the floats that a CPU is slow with
FAINT = {torch.float32: -20.0, torch.float64: -170.0}
TILE = {"cpu": 2**17, "cuda": 2**26}  # kernel entries held at once: of a CPU's cache, of a GPU's memory


class KernelMoments(torch.autograd.Function):
    """E[k(s - x) f_j(s)] (levels, sets, n, columns) over the particles s (sets, N, d) at x (sets, n, d).

    k(z) = exp(-|z|^2 / (2 h^2)), one for each width h / 2^level; ``h`` (sets, 1, 1). The columns f_j are the products
    of coordinates of s up to ``degree``: 1, s, s s', ... Those of one degree more are the derivative, d/dx E[k f] =
    (E[k f s'] - E[k f] x') / h^2, so no kernel matrix is kept; x has a gradient, once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, particles: Tensor, h: Tensor, levels: int, degree: int) -> Tensor:
        columns = [torch.ones_like(particles[..., :1])]
        for _ in range(degree + ctx.needs_input_grad[0]):
            columns.append(_outer(columns[-1], particles).flatten(-2))
        found = _means(x, particles, torch.cat(columns, -1) / particles.shape[-2], h, levels)
        count = sum(x.shape[-1] ** power for power in range(degree + 1))
        ctx.save_for_backward(x, found[..., 1:], found[..., :count], h)
        return found[..., :count].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple:
        x, higher, found, h = ctx.saved_tensors
        slope = higher.unflatten(-1, (-1, x.shape[-1])) - _outer(found, x)
        narrower = 4.0 ** torch.arange(len(found), dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)
        return ((given[..., None, :] @ slope)[..., 0, :] * narrower / h**2).sum(0), None, None, None, None


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


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


@torch.autocast("cpu", enabled=False)  # squared distances of bfloat16 points would be noise
@torch.autocast("cuda", enabled=False)
def smoothed(
    x: Tensor, particles: Tensor, h: Tensor, levels: int, along: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """l = log(rho_h + RARE) and h grad l at x (..., n, d) for each width h (..., 1, 1), h / 2, h / 4, ...

    rho_h(x) = E k_h(x_i - x) over the particles (..., N, d), a Gaussian kernel estimate without constant. RARE keeps
    l and its slope finite away from the particles, where an estimate is that of the nearest one alone. Returns l (...,
    n, levels), h grad l (..., n, levels, d) and, with directions ``along`` (k, ..., 1, d), the derivatives of both.
    Raises ``ValueError`` where a gradient of the particles is asked for.

    With s = x_i - x, a = E[k s], S = E[k s s']: grad l = a / (h^2 (rho + RARE)) and h^2 Da = S - h^2 rho.
    """
    if particles.requires_grad and torch.is_grad_enabled():
        raise ValueError("kernels have a gradient of the points alone, none of the particles: detach these")
    d, dtype, logs, slopes, rises, turns = x.shape[-1], x.dtype, [], [], [], []
    narrow = dtype == torch.float64 or float(h.min()) < NARROW * 2 ** (levels - 1)
    x, particles, h = (z.to(torch.float64 if narrow else torch.float32) for z in (x, particles, h))
    along = None if along is None else along.to(x)
    sets = torch.broadcast_shapes(x.shape[:-2], particles.shape[:-2], h.shape[:-2])
    flat = [z.expand(*sets, *z.shape[-2:]).reshape(-1, *z.shape[-2:]) for z in (x, particles, h)]
    moments = KernelMoments.apply(*flat, levels, 1 if along is None else 2)
    for level, found in enumerate(moments.unflatten(1, sets) if sets else moments[:, 0]):
        width = h / 2**level
        rho, first = found[..., :1], found[..., 1 : d + 1]
        a, total = first - rho * x, width * (rho + RARE)
        logs.append((rho + RARE).log())
        slopes.append(a / total)
        if along is not None:
            second = found[..., d + 1 :].unflatten(-1, (d, d)) - _outer(first, x) - _outer(x, a)
            rises.append((slopes[-1] * along).sum(-1, keepdim=True) / width)
            turn = (second @ along[..., None])[..., 0] / width**2 - rho * along
            turns.append(turn / total - rises[-1] * slopes[-1])
    changes = (None, None) if along is None else (torch.cat(rises, -1).to(dtype), torch.stack(turns, -2).to(dtype))
    return torch.cat(logs, -1).to(dtype), torch.stack(slopes, -2).to(dtype), *changes
