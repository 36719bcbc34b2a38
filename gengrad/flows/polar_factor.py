"""What a map moves within a measure, taken out of it: Brenier's polar factorisation of a learned step."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from gengrad.flows.least_squares import by_place, monomials, shrunk
from gengrad.networks.local_fit import SmoothMaps

CENTRES, DEGREE = 100, 3  # of the bumps, and the degree of the polynomials, of which stream functions are made
WIDE = 1.4  # width of a bump, of the distance within which every particle has a centre
FEW = 10  # particles for each bump, at least
MOST = 4096  # particles whose derivatives are made symmetric
FURTHEST = 1.1  # at most the way of v, of that of the step: all of a step can be circulation, and no more
TILE = 2**22  # numbers held at once


def circulation(maps: SmoothMaps, x: Tensor, y: Tensor, score: Tensor, hessian: Tensor) -> Tensor | None:
    """v (n, d) at y = T x (n, d), to be added to y: what makes T the optimal map, and leaves its measure as it is.

    T = grad phi o sigma, sigma a map of the measure to itself (Brenier 1991, the polar factorisation). The map of an
    exact JKO step is grad phi alone, so that DT is symmetric; that of a network need not be: its particles circulate,
    which no energy tells and no later step mends. Fields

        v = div (rho' A) / rho' = div A + A grad log rho',   A antisymmetric: for a < b of entries psi_ab, -psi_ab,

    have div (rho' v) = 0: they move rho' within itself, to the first order of v. Of them, with stream functions psi
    made of polynomials and of bumps that are spread over the cloud, the one of which (I + Dv) DT comes nearest to
    symmetric matrices at the particles, in least squares, without what is doubtful (``shrunk``); DT is found of where
    the particles go alone (``maps``, those of x). ``score`` (n, d), ``hessian`` (n, d, d): of log rho' at y.

    None on the line, where every increasing map is a gradient, for few particles, and where v would go far.
    """
    n, d = y.shape
    if d == 1 or n < FEW * FEW:
        return None
    x, y, score, hessian = (v.double() for v in (x, y, score, hessian))
    centre = y.mean(0)
    scale = (y - centre).square().mean().sqrt()
    z = (y - centre) / scale
    bumps, width = _spread(z, min(CENTRES, n // FEW))
    rows = by_place(y, MOST)
    jacobian, pairs = maps.jacobians(x, y)[rows], list(combinations(range(d), 2))
    fields, derivatives = _fields(z[rows], scale, bumps, width, score[rows], hessian[rows])
    turned = derivatives @ jacobian[:, None]
    twist = torch.cat([turned[..., b, a] - turned[..., a, b] for a, b in pairs])  # (pairs k, fields)
    own = torch.cat([jacobian[:, b, a] - jacobian[:, a, b] for a, b in pairs])
    sizes = twist.norm(dim=0).clamp_min(1e-30)
    if not bool(twist.isfinite().all() & own.isfinite().all()):
        return None
    coefficients = -shrunk(twist / sizes, own) / sizes
    tile = max(1, TILE // fields[0].numel())
    parts = zip(z.split(tile), score.split(tile))
    found = torch.cat([coefficients @ _fields(some, scale, bumps, width, s)[0] for some, s in parts])
    return found if bool(found.square().mean().sqrt() <= FURTHEST * (y - x).square().mean().sqrt()) else None


def _fields(
    z: Tensor, scale: Tensor, centres: Tensor, width: float, score: Tensor, hessian: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Fields that move the measure within itself, (n, fields, d), and with the ``hessian`` of log rho' (n, d, d) their

    derivatives (n, fields, d, d).
    """
    d = z.shape[-1]
    away = (z[:, None] - centres) / width
    bump = (-away.square().sum(-1) / 2).exp()[..., None]
    values, slopes, *bends = monomials(z, DEGREE, 1 if hessian is None else 2)
    psi = torch.cat([values, bump[..., 0]], 1)
    slope = torch.cat([slopes, -bump * away / width], 1) / scale
    fields = _turned(slope + psi[..., None] * score[:, None])
    if hessian is None:
        return fields, None
    bend = bump[..., None] * (away[..., :, None] * away[..., None, :] - torch.eye(d).to(z))
    bend = torch.cat([*bends, bend / width**2], 1) / scale**2
    turn = bend + score[:, None, :, None] * slope[:, :, None, :] + psi[..., None, None] * hessian[:, None]
    return fields, _turned(turn)


def _turned(flow: Tensor) -> Tensor:
    """For each plane a < b: what is along b goes to a, and less what is along a to b; (n, psi, d, ...) to (n, psi of

    all planes, d, ...).
    """
    found = []
    for a, b in combinations(range(flow.shape[2]), 2):
        found.append(torch.zeros_like(flow))
        found[-1][:, :, a], found[-1][:, :, b] = flow[:, :, b], -flow[:, :, a]
    return torch.cat(found, 1)


def _spread(z: Tensor, count: int) -> tuple[Tensor, float]:
    """So many of the points (n, d), each as far as can be from those before it, and the width of a bump at each."""
    chosen = [int((z - z.mean(0)).square().sum(1).argmin())]
    distance = (z - z[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (z - z[chosen[-1]]).square().sum(1))
    return z[chosen], WIDE * float(distance.max().sqrt().clamp_min(1e-6))
