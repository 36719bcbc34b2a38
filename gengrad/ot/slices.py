"""Directions to project clouds on: the same at every call, as even as the dimension allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slicing_directions(d: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Unit vectors (d, count) in float64.

    On the plane the equispaced angles k pi / count; above, orthonormal bases one after the other (QR of Gaussian
    matrices from ``generator``, by default of a fixed seed), so that the mean of (u . s)^2 is exactly |s|^2 / d where
    d divides ``count``.
    """
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if d == 2:
        angle = torch.arange(count, dtype=torch.float64) * math.pi / count
        return torch.stack([angle.cos(), angle.sin()])
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    bases = []
    for width in [d] * (count // d) + [count % d] * (count % d > 0):
        bases.append(torch.linalg.qr(torch.randn(d, width, generator=generator, dtype=torch.float64)).Q)
    return torch.cat(bases, dim=1)
