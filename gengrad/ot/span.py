"""Few points in many dimensions: exact coordinates in the space that they span."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_to_span(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of both clouds in an orthonormal basis of their span: (x Q, y Q, Q), Q of shape (d, r), r <= n + m.

    Exact for everything that depends on distances: v(x, y) = v(x Q, y Q) Q'. The velocity of x lies in the span, so a
    whole flow stays there: rotate once before it, step in r dimensions instead of d, return with `points @ Q.T` once.
    One rotation costs about as much as two velocity evaluations, so it pays for flows, not for a single evaluation;
    where d <= n + m it saves nothing, and the clouds come back as they are, with Q the identity.

    Shapes (n, d), (m, d). ValueError unless both are such matrices with equal d.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"rotate_to_span: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; allowed are (n, d) and (m, d)."
        )
    if x.shape[1] <= len(x) + len(y):
        return x, y, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    basis = torch.linalg.qr(torch.cat([x, y]).T).Q
    return x @ basis, y @ basis, basis
