"""Gaussian kernel estimates of a cloud's density and its gradient, as features of a point, with derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RARE = 3e-4  # of the kernel's peak: a density below which the particles around a point say nothing of it
NARROW = 0.02  # widths below which moments are taken in float64: they are divided by h^2 after their means cancel


class KernelMoments(torch.autograd.Function):
    """E[k_h(s - x) f_j(s)] (..., n, columns) over the particles s (..., N, d), k_h(z) = exp(-|z|^2 / (2 h^2)), at x.

    The columns f_j are the products of coordinates of s up to ``degree``: 1, s, s s', ... Those of one degree more are
    the derivative, d/dx E[k f] = (E[k f s'] - E[k f] x') / h^2, so no kernel matrix is kept; x has a gradient, once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, particles: Tensor, h: Tensor, degree: int) -> Tensor:
        columns = [torch.ones_like(particles[..., :1])]
        for _ in range(degree + ctx.needs_input_grad[0]):
            columns.append(_outer(columns[-1], particles).flatten(-2))
        found = _kernel(x, particles, h) @ (torch.cat(columns, -1) / particles.shape[-2])
        count = sum(x.shape[-1] ** power for power in range(degree + 1))
        ctx.save_for_backward(x, found[..., 1:], found[..., :count], h)
        return found[..., :count].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple:
        x, higher, found, h = ctx.saved_tensors
        slope = higher.unflatten(-1, (-1, x.shape[-1])) - _outer(found, x)
        return (given[..., None, :] @ slope)[..., 0, :] / h**2, None, None, None


def _kernel(x: Tensor, particles: Tensor, h: Tensor) -> Tensor:
    """exp(-|x - s|^2 / (2 h^2)): the exponent is one product, of (x, -|x|^2/2, 1)/h^2 and (s, 1, -|s|^2/2)."""
    left = torch.cat([x, -0.5 * x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1) / h**2
    ones, squared = torch.ones_like(particles[..., :1]), particles.square().sum(-1, keepdim=True)
    exponent = left @ torch.cat([particles, ones, -0.5 * squared], -1).mT
    return exponent.clamp_(-60, 0).exp_()  # above the floats that a CPU is slow with


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


@torch.autocast("cpu", enabled=False)  # squared distances of bfloat16 points would be noise
@torch.autocast("cuda", enabled=False)
def smoothed(
    x: Tensor, particles: Tensor, widths: list[Tensor], along: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """l = log(rho_h + RARE) and h grad l at x (..., n, d) for each width h (..., 1, 1): the density around each point.

    rho_h(x) = E k_h(x_i - x) over the particles (..., N, d), a Gaussian kernel estimate without constant. RARE keeps
    l and its slope finite away from the particles, where an estimate is that of the nearest one alone. Returns l (...,
    n, widths), h grad l (..., n, widths, d) and, with directions ``along`` (k, ..., 1, d), the derivatives of both.
    Raises ``ValueError`` where a gradient of the particles is asked for.

    With s = x_i - x, a = E[k s], S = E[k s s']: grad l = a / (h^2 (rho + RARE)) and h^2 Da = S - h^2 rho.
    """
    if particles.requires_grad and torch.is_grad_enabled():
        raise ValueError("kernels have a gradient of the points alone, none of the particles: detach these")
    d, dtype, logs, slopes, rises, turns = x.shape[-1], x.dtype, [], [], [], []
    if widths and dtype != torch.float64 and float(min(h.min() for h in widths)) < NARROW:
        x, particles, widths = x.double(), particles.double(), [h.double() for h in widths]
        along = None if along is None else along.double()
    for h in widths:
        found = KernelMoments.apply(x, particles, h, 1 if along is None else 2)
        rho, first = found[..., :1], found[..., 1 : d + 1]
        a, total = first - rho * x, h * (rho + RARE)
        logs.append((rho + RARE).log())
        slopes.append(a / total)
        if along is not None:
            second = found[..., d + 1 :].unflatten(-1, (d, d)) - _outer(first, x) - _outer(x, a)
            rises.append((slopes[-1] * along).sum(-1, keepdim=True) / h)
            turn = (second @ along[..., None])[..., 0] / h**2 - rho * along
            turns.append(turn / total - rises[-1] * slopes[-1])
    changes = (None, None) if along is None else (torch.cat(rises, -1).to(dtype), torch.stack(turns, -2).to(dtype))
    return torch.cat(logs, -1).to(dtype), torch.stack(slopes, -2).to(dtype), *changes
