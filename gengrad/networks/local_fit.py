"""What is known at the points of a cloud alone, a log density or where a map brings them, and its derivatives there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations_with_replacement

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from gengrad.networks.kernels import Marks, whole

# what a squared coefficient of degree 1, 2, 3 and 4 weighs beside the mean squared error, in units of the distance to
# the farthest neighbour. The first two count where neighbours are too few or in line, and Gaussians are exact; the
# others where all neighbours lie on one side, as those of the outermost points do
PRICES = 1e-10, 1e-10, 1e-4, 1e-4
CUBIC, QUARTIC = 3, 4  # degrees of what is fitted to log densities and to maps
# neighbours of a particle, itself among them, by d: of the outermost all lie on one side, on the line fewer than these
# would have a cubic follow every error of their log densities, and be led away by it
NEIGHBOURS = {1: 24, 2: 20, 3: 40}
SPREAD = 5  # times the points that a quartic is fitted to, from which on a cloud says what a map does
# slopes, bends and so on of log rho over the unit of the particles, expected where rounding leaves nothing to see
STEEP = 10.0
DENSE = 1024  # points on the line from which on neighbours are not the nearest: there rounding is all that is seen
TILE = 2**22  # numbers held at once


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # differences of log densities that are nearly the same
@torch.autocast("cuda", enabled=False)
def fitted(particles: Tensor, log_density: Tensor, unit: Tensor) -> Marks:
    """The marks of particles (..., N, d), of about unit scale, and log rho (..., N) there, not finite where unknown.

    At each particle x_i the cubic p(z) of z = x_j - x_i with p(0) = log rho(x_i) that minimises
    E[w_ij (p(z) - log rho(x_j))^2] + a small price of its coefficients over its ``NEIGHBOURS``, twice as many nearest
    ones as a cubic has coefficients and on the line six times as many: local polynomial regression (Fan and Gijbels,
    *Local Polynomial Modelling and Its Applications*, 1996, section 3.1) with the nearest neighbours' weights of
    Cleveland (1979), here w = exp(-2 |z|^2 / r_i^2) where r_i is the distance to the farthest of them. The values have
    no noise but rounding, so it matters little how the points lie, and nothing is smoothed over more than a few of them
    (on the line, where many are too near for a second difference in single precision, each so-manyth is a neighbour).
    A coefficient c of degree k costs (``PRICES``[k] + (s / (``STEEP`` r_i)^k)^2) (c r_i^k)^2, s being the rounding of
    the values: among points that nearly coincide, bends that rounding makes up are left out.

    Points that come several times count once; particles whose log density is not known have the marks of the nearest
    one that is known, and where there are none, they are zero. ``unit`` (..., 1, 1): in which marks are seen.
    Raises ``ValueError`` for log densities of another shape.
    """
    (n, d), sets = particles.shape[-2:], particles.shape[:-2]
    if log_density.shape != particles.shape[:-1]:
        raise ValueError(f"log densities {tuple(log_density.shape)} of particles {tuple(particles.shape)}")
    rounding = torch.finfo(particles.dtype).eps, torch.finfo(log_density.dtype).eps
    columns = particles.new_empty(math.prod(sets), n, d * (d + 3) // 2)
    for row, (x, log_rho) in enumerate(zip(particles.reshape(-1, n, d), log_density.reshape(-1, n))):
        columns[row] = _columns(x.double(), log_rho.double(), *rounding)
    return Marks(columns.view(*sets, *columns.shape[1:]), unit.expand(*sets, 1, 1))


def coefficients(d: int, degree: int = CUBIC) -> list[tuple[int, ...]]:
    """The coordinates whose products are the terms of a polynomial, but for its constant: (0,), (1,), (0, 0), (0, 1),

    and so on; of a cubic, where no ``degree`` is given.
    """
    return [chosen for k in range(1, degree + 1) for chosen in combinations_with_replacement(range(d), k)]


def moments(particles: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (..., 1, d) and scale (..., 1, 1) of clouds (..., N, d): the root of the mean variance of a coordinate."""
    mean = particles.mean(-2, keepdim=True)
    return mean, (particles - mean).square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-6)


def slopes(particles: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
    """grad log rho (..., N, d) and its Hessian (..., N, d, d) at particles (..., N, d) of log rho (..., N), as it is

    ``fitted``.
    """
    (mean, scale), d = moments(particles), particles.shape[-1]
    away = (particles - mean) / scale
    found = fitted(away, log_density, torch.ones_like(scale)).at(away)
    return found[..., :d] / scale, whole(found[..., d:], d) / scale[..., None] ** 2


class SmoothMaps:
    """DT at the points x (n, d) of the smooth map T that brings them where they go, for any number of such maps.

    I + Dp(x_i) for the quartics p with p(x_i) = T x_i - x_i that come nearest to T x_j - x_j of four times as many
    nearest neighbours as they have coefficients, fitted as log densities are (``fitted``). So T is seen at the scale of
    the points' distances, not below it.
    """

    @torch.no_grad()
    def __init__(self, x: Tensor):
        scale = moments(x.double())[1]
        terms = coefficients(x.shape[-1], QUARTIC)
        points, self.which, (rounded,) = _distinct(x.double() / scale, torch.finfo(x.dtype).eps * (1 + x[:, :1].abs()))
        found = []
        for block, noise, near in _neighbourhoods(points, rounded[:, 0].double(), len(terms), 4 * (len(terms) + 1)):
            found.append((near, _solver(block, noise, points, near, terms)[:, : x.shape[-1]] / scale))
        self.near, self.weights = (torch.cat(parts) for parts in zip(*found))

    @classmethod
    def where_enough(cls, x: Tensor) -> SmoothMaps | None:
        """None for fewer than ``SPREAD`` times as many distinct points as a fit takes, and above d = 3.

        There neighbours reach across the cloud: of 60 points in the plane and a map of one wave, log det is off by half
        of how much it varies.
        """
        least = SPREAD * 4 * math.comb(x.shape[-1] + QUARTIC, QUARTIC)
        return cls(x) if x.shape[-1] <= 3 and len(x) >= least and len(torch.unique(x, dim=0)) >= least else None

    @torch.no_grad()
    def jacobians(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, d, d), in float64, where the map brings x to y."""
        displacement = torch.zeros(len(self.near), x.shape[-1], dtype=torch.float64, device=x.device)
        displacement[self.which] = y.double() - x
        rise = displacement[self.near] - displacement[:, None]
        return torch.eye(x.shape[-1]).to(rise) + (self.weights @ rise).mT[self.which]


def _columns(x: Tensor, log_rho: Tensor, eps: float, own: float) -> Tensor:
    """``Marks.columns`` (N, d + d (d + 1) / 2) of one cloud, rounded by ``eps``, and by ``own`` its log densities."""
    d, known = x.shape[-1], log_rho.isfinite() & x.isfinite().all(-1)
    points, which, (values,) = _distinct(x[known], log_rho[known, None])
    if len(points) < 2:
        return x.new_zeros(len(x), d * (d + 3) // 2)
    values = values[:, 0]
    mean = values.mean()
    rounded = eps * (1 + (values - mean).abs()) + own * values.abs()
    terms = coefficients(d)
    found = _fitted(points, values - mean, rounded, terms, NEIGHBOURS.get(d, 2 * (len(terms) + 1)))
    rows, columns = torch.triu_indices(d, d, device=x.device)
    bends = found[:, d : d + len(rows)] * (1 + (rows == columns).to(found))  # z_a^2 has H_aa / 2
    start = found[:, :d] - (whole(bends, d) @ points[..., None])[..., 0]
    found = torch.cat([start, bends], -1).nan_to_num(0.0, 0.0, 0.0)
    columns = found.new_empty(len(x), found.shape[-1])
    columns[known] = found[which]
    if not known.all():
        lost = x[~known].nan_to_num(0.0, 0.0, 0.0).cpu().numpy()
        near = torch.from_numpy(cKDTree(points.cpu().numpy()).query(lost)[1])
        columns[~known] = found[near.clamp_max(len(found) - 1).to(found.device)]  # what is too far has no nearest one
    return columns


def _distinct(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The points of x (n, d) that differ, the number of each x among them, and there the means of values (n, c)."""
    points, which, copies = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
    sums = (v.new_zeros(len(points), v.shape[-1]).index_add(0, which, v) for v in values)
    return points, which, [total / copies[:, None] for total in sums]


def _fitted(points: Tensor, values: Tensor, rounded: Tensor, terms: list[tuple[int, ...]], count: int) -> Tensor:
    """Coefficients (n, terms) around each of the points (n, d) of values (n,) there, ``rounded`` (n,) by so much, by

    those of the ``count`` points that are nearest, itself among them.
    """
    found = []
    for block, noise, near in _neighbourhoods(points, rounded, len(terms), count):
        rise = values[near] - values[near[:, :1]]
        found.append((_solver(block, noise, points, near, terms) @ rise[..., None])[..., 0])
    return torch.cat(found)


def _neighbourhoods(
    points: Tensor, rounded: Tensor, terms: int, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Tiles of the points (n, d), of what they are rounded by (n,), and the numbers (tile, count) of the nearest."""
    count = min(count, len(points))
    stride = max(1, len(points) // DENSE) if points.shape[-1] == 1 else 1
    tile, tree = max(1, TILE // (count * max(stride, terms))), cKDTree(points.cpu().numpy())
    for block, noise in zip(points.split(tile), rounded.split(tile)):
        near = tree.query(block.cpu().numpy(), (count - 1) * stride + 1)[1].reshape(len(block), -1)[:, ::stride]
        yield block, noise, torch.from_numpy(near).to(points.device)


def _solver(x: Tensor, rounded: Tensor, points: Tensor, near: Tensor, terms: list[tuple[int, ...]]) -> Tensor:
    """(n, terms, count): what makes the coefficients around some of the ``points`` of the rises to numbers ``near``

    (n, count) around each, itself the first and the farthest the last.
    """
    z = points[near] - x[:, None]
    reach = z[:, -1].norm(dim=-1, keepdim=True)
    z = z / reach[..., None]
    weight = (-2 * z.square().sum(-1)).exp()
    weight = weight / weight.sum(-1, keepdim=True)
    basis = torch.stack([math.prod(z[..., a] for a in chosen) for chosen in terms], -1)
    weighed = (weight[..., None] * basis).mT
    degrees = torch.tensor([len(chosen) for chosen in terms], device=x.device)
    price = (
        torch.tensor(PRICES, dtype=x.dtype, device=x.device)[degrees - 1]
        + (rounded[:, None] / (STEEP * reach) ** degrees).square()
    )
    found = torch.linalg.solve_ex(weighed @ basis + torch.diag_embed(price), weighed)[0]
    return found / reach[..., None] ** degrees[:, None]
