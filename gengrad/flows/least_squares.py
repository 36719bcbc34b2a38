"""Polynomials of a cloud, and least squares without what its own scatter makes doubtful."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from gengrad.networks.local_fit import coefficients

# squared standard errors by which the square of a coordinate is taken to be less; the errors of neighbours are alike,
# so that there are fewer of them than residuals
DOUBT = 8.0


def shrunk(a: Tensor, b: Tensor) -> Tensor:
    """c of least |a c - b|^2 for a (n, m), b (n,), without what the scatter of the rest explains.

    Along the columns of Q, a = Q R, each coordinate is shrunk by 1 - ``DOUBT`` s^2 / square, or left out: the
    nonnegative garrote of an orthonormal design (Breiman 1995), s^2 the mean square of what is left of b. Columns of
    low degrees come first.
    """
    q, r = torch.linalg.qr(a)
    along = q.mT @ b
    noise = (b.square().sum() - along.square().sum()).clamp_min(0) / max(1, len(b) - len(along))
    along = along * (1 - DOUBT * noise / along.square().clamp_min(1e-300)).clamp_min(0)
    return torch.linalg.solve_triangular(r, along[:, None], upper=True)[:, 0]


def monomials(z: Tensor, degree: int, order: int = 2) -> list[Tensor]:
    """The terms of a polynomial of this degree at z (n, d), (n, terms), and their derivatives up to this order.

    Gradients (n, terms, d), and Hessians (n, terms, d, d).
    """
    d, chosen = z.shape[-1], [(), *coefficients(z.shape[-1], degree)]
    powers = torch.tensor([[Counter(term)[a] for a in range(d)] for term in chosen], device=z.device)
    k = torch.arange(degree + 1, device=z.device)
    factors = (torch.ones_like(k), k, k * (k - 1))[: order + 1]  # z^k and its derivatives
    tables = [factor * z[..., None] ** (k - order).clamp_min(0) for order, factor in enumerate(factors)]
    of = [[table[:, a, powers[:, a]] for a in range(d)] for table in tables]

    def term(*by: int) -> Tensor:
        return math.prod(of[by.count(a)][a] for a in range(d))

    found = [term()]
    if order > 0:
        found.append(torch.stack([term(a) for a in range(d)], -1))
    if order > 1:
        found.append(torch.stack([torch.stack([term(a, b) for b in range(d)], -1) for a in range(d)], -2))
    return found


def by_place(y: Tensor, most: int) -> Tensor:
    """Numbers of at most so many of the points (n, d), spread over the cloud: chosen by where they are, not by their

    order, but for those of one coordinate sum.
    """
    if len(y) <= most:
        return torch.arange(len(y), device=y.device)
    return y.sum(1).argsort(stable=True)[torch.arange(most, device=y.device) * len(y) // most]
