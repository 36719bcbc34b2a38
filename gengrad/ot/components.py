"""Principal components: the few directions in which a cloud of many dimensions is wide."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_components(points: Tensor, k: int, generator: torch.Generator, passes: int = 4) -> Tensor:
    """Orthonormal (d, k): the k widest directions of points (n, d), widest first.

    Subspace iteration on the centred points with ten directions to spare (Halko, Martinsson and Tropp 2011, algorithm
    4.4): no d x d matrix. ``ValueError`` where the points do not span k directions.
    """
    n, d = points.shape
    if not 1 <= k <= min(n - 1, d):
        raise ValueError(f"{k} principal components of {n:,} points in {d} dimensions; at most {min(n - 1, d)} exist")
    centred = points - points.mean(0)
    guess = torch.randn(d, min(k + 10, n - 1, d), generator=generator).to(points)
    basis = torch.linalg.qr(guess).Q
    for _ in range(passes):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    widest = torch.linalg.svd(centred @ basis, full_matrices=False).Vh[:k]  # within the subspace found
    return basis @ widest.T
