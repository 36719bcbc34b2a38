"""Gaussian kernel estimates of a cloud's density and its gradient, as features of a point, with derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from gengrad.kernel_moments import NARROW, KernelMoments, outer

RARE = 3e-4  # of the kernel's peak: a density below which the particles around a point say nothing of it


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
            second = found[..., d + 1 :].unflatten(-1, (d, d)) - outer(first, x) - outer(x, a)
            rises.append((slopes[-1] * along).sum(-1, keepdim=True) / width)
            turn = (second @ along[..., None])[..., 0] / width**2 - rho * along
            turns.append(turn / total - rises[-1] * slopes[-1])
    changes = (None, None) if along is None else (torch.cat(rises, -1).to(dtype), torch.stack(turns, -2).to(dtype))
    return torch.cat(logs, -1).to(dtype), torch.stack(slopes, -2).to(dtype), *changes
