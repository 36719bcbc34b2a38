"""The score and the Hessian of a log density that is known at the points of a cloud, by local cubic regression."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from gengrad.networks.kernels import Marks, whole

DEGREE = 3
# what a squared coefficient weighs beside the mean squared error, in units of the distance to the farthest neighbour:
# the values have no noise, and so small a price counts only where neighbours are too few or in line
PRICE = 1e-6
TILE = 2**22  # distances held at once


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # differences of log densities that are nearly the same
@torch.autocast("cuda", enabled=False)
def fitted(particles: Tensor, log_density: Tensor, unit: Tensor) -> Marks:
    """The marks of particles (..., N, d) of which log rho (..., N) is known; NaN and infinite where it is not.

    At each particle x_i the cubic p(z) of z = x_j - x_i with p(0) = log rho(x_i) that minimises
    E[w_ij (p(z) - log rho(x_j))^2] + ``PRICE`` |coefficients|^2 over its nearest neighbours, twice as many as a cubic
    has coefficients: local polynomial regression (Fan and Gijbels, *Local Polynomial Modelling and Its Applications*,
    1996, section 3.1) with the nearest neighbours' weights of Cleveland (1979), here w = exp(-2 |z|^2 / r_i^2) where
    r_i is the distance to the farthest of them. The values have no noise, so it matters little how the points lie, and
    nothing is smoothed over more than a few of them. Points that come several times count once; particles whose log
    density is not known have the marks of the nearest one that knows it, and where nobody does, they are zero.
    ``unit`` (..., 1, 1): in which marks are seen.
    """
    (n, d), sets = particles.shape[-2:], particles.shape[:-2]
    rows = zip(particles.reshape(-1, n, d).double(), log_density.reshape(-1, n).double())
    columns = torch.stack([_columns(*row) for row in rows]).view(*sets, n, -1)
    return Marks(columns.to(particles), unit.expand(*sets, 1, 1))


def _columns(x: Tensor, log_rho: Tensor) -> Tensor:
    """``Marks.columns`` (N, d + d (d + 1) / 2) of one cloud."""
    d, known = x.shape[-1], log_rho.isfinite()
    points, which = torch.unique(x[known], dim=0, return_inverse=True)
    if len(points) < 2:
        return x.new_zeros(len(x), d * (d + 3) // 2)
    values = x.new_empty(len(points)).index_put((which,), log_rho[known])
    exponents = [c for k in range(1, DEGREE + 1) for c in combinations_with_replacement(range(d), k)]
    count = min(2 * (len(exponents) + 1), len(points))
    tile = max(1, TILE // len(points))
    found = torch.cat([_fit(block, points, values, count, exponents) for block in points.split(tile)])
    columns = found.new_empty(len(x), found.shape[-1])
    columns[known] = found[which]
    if not known.all():
        near = [torch.cdist(block, points).argmin(-1) for block in x[~known].split(tile)]
        columns[~known] = found[torch.cat(near)]
    return columns


def _fit(x: Tensor, points: Tensor, values: Tensor, count: int, exponents: list[tuple[int, ...]]) -> Tensor:
    """The columns of some of the ``points``, (n, d + d (d + 1) / 2), by ``count`` of these around each, itself one."""
    d = x.shape[-1]
    exact = "donot_use_mm_for_euclid_dist"  # of a difference of squares little is left between near points
    distance, near = torch.cdist(x, points, compute_mode=exact).topk(count, largest=False)
    reach = distance[:, -1:]
    z = (points[near] - x[:, None]) / reach[..., None]
    rise = values[near] - values[near[:, :1]]
    weight = (-2 * z.square().sum(-1)).exp()
    weight = weight / weight.sum(-1, keepdim=True)
    terms = torch.stack([math.prod(z[..., a] for a in chosen) for chosen in exponents], -1)
    weighed = (weight[..., None] * terms).mT
    price = PRICE * torch.eye(len(exponents), dtype=x.dtype, device=x.device)
    found = torch.linalg.solve_ex(weighed @ terms + price, weighed @ rise[..., None])[0][..., 0]
    rows, columns = torch.triu_indices(d, d, device=x.device)
    bends = found[:, d : d + len(rows)] * (1 + (rows == columns).to(found)) / reach**2  # z_a^2 has H_aa / 2
    start = found[:, :d] / reach - (whole(bends, d) @ x[..., None])[..., 0]
    return torch.cat([start, bends], -1).nan_to_num(0.0, 0.0, 0.0)
