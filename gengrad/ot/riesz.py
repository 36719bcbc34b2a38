"""Sums of the Riesz kernel |x - y|^r over all pairs of two clouds, and their gradients: exact or sliced, never n x m.

Three routes give the same numbers: ``tiles`` (exact, any r and d, two matrix products a tile), ``sort`` (exact, d = 1
and r = 1, n log n) and ``slices`` (r = 1, d > 1: the mean of one-dimensional problems, n log n a direction).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .slices import slicing_directions

log = logging.getLogger(__name__)

Route = Literal["auto", "tiles", "sort", "slices"]
DIFFERENCES = 4  # up to this dimension |x - y|^2 is summed from differences, above it is one matrix product
TILE = (256, 1024), (4096, 16384)  # rows and columns of a tile on a CPU (its cache) and on an accelerator
MANY = 3e10  # pairs above which the plane is sliced by itself: minutes of a CPU core for the exact sums


@dataclass(frozen=True)
class RieszSums:
    """``potential`` (n,) mean_j |x_i - y_j|^r (None where not asked for), ``gradient`` (n, d) its gradient in x_i.

    ``route`` is what was computed with, ``reason`` why.
    """

    potential: Tensor | None
    gradient: Tensor
    route: str
    reason: str


def riesz_sums(
    x: Tensor,
    y: Tensor,
    r: float = 1.0,
    *,
    route: Route = "auto",
    directions: int = 256,
    potential: bool = True,
) -> RieszSums:
    """mean_j |x_i - y_j|^r and its gradient r mean_j |x_i - y_j|^(r-2) (x_i - y_j); coincident pairs give 0 to both.

    x (n, d), y (m, d); pass the same tensor twice for a cloud's sums with itself, which costs half. Memory: a tile
    beside the clouds. In more than 4 dimensions distances come from a product: pairs closer than 3e-3 (fp32) of the
    clouds' radius count as coincident. ``route="slices"`` is approximate: its relative error falls like
    1 / ``directions`` on the plane, but only like (directions / d)^(-1/2) above it. Raises ``ValueError`` for clouds
    or an r that do not fit, and for a route that cannot.
    """
    _check(x, y, r)
    if route == "auto":
        route, reason = choose_route(len(x), len(y), x.shape[1], r)
    else:
        reason = "as asked"
        if route in ("sort", "slices") and r != 1:
            raise ValueError(f"route {route!r} sorts, which needs r = 1; r={r}: take route=tiles")
        if route == "sort" and x.shape[1] != 1:
            raise ValueError(f"route 'sort' is for points on a line; these have d={x.shape[1]}: take tiles or slices")
    log.debug("riesz sums of %d x %d points, d=%d, r=%g: %s (%s)", len(x), len(y), x.shape[1], r, route, reason)
    if route == "sort":
        values, gradient = _sorted(x.T, y.T)
        return RieszSums(values[0], gradient.T, route, reason)
    if route == "slices":
        return RieszSums(*_sliced(x, y, directions), route, reason)
    values, gradient, _ = _tiled(x, y, r, values=potential)
    return RieszSums(values if potential else None, gradient, route, reason)


def choose_route(n: int, m: int, d: int, r: float) -> tuple[str, str]:
    """(route, reason) that ``route="auto"`` takes for n x m points in d dimensions."""
    if d == 1 and r == 1:
        return "sort", "on a line with r = 1 a sort is exact and n log n"
    if d == 2 and r == 1 and n * m > MANY:
        return "slices", f"{n} x {m} pairs on the plane are more than {MANY:.0e}"
    if d == 2 or r != 1:
        return "tiles", "exact" if r == 1 else "exact; sorting needs r = 1"
    return "tiles", f"exact; slices are mostly noise in {d} dimensions"


def _check(x: Tensor, y: Tensor, r: float) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.numel() or not y.numel():
        raise ValueError(
            f"riesz sums: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; allowed are (n, d) and (m, d), not "
            "empty; for numbers on a line use x[:, None]"
        )
    if not 0 < r < 2:
        raise ValueError(f"the Riesz kernel -|x - y|^r needs 0 < r < 2; got r={r}")


# ------------------------------------------------------------------ tiles


def _tiled(
    x: Tensor, y: Tensor, r: float, values: bool = True, both: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(potential (n,), its gradient in x (n, d), and where ``both`` the one of y: grad_y mean_i |x_i - y|^r, (m, d)).

    With K_ij = |x_i - y_j|^(r-2):  gradient_i = r / m (x_i sum_j K_ij - sum_j K_ij y_j).
    """
    alone, dtype = y is x, x.dtype
    if x.shape[1] == 1:  # on a line many pairs are so close that x - y has no digits left in fp32
        x, y = x.double(), y.double()
    centre = (x.mean(0) + y.mean(0)) / 2  # the products lose the digits that all points share
    x = x - centre
    y = x if alone else y - centre
    x1, y1 = (torch.cat([c, torch.ones_like(c[:, :1])], 1) for c in (x, y))
    near = _coincident(x, y)
    sums = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    # per point: sum_j K_ij y_j and, in the last column, sum_j K_ij
    ahead, back = torch.zeros_like(x1), torch.zeros_like(x1 if alone else y1)
    for i, j, squares in _tiles(x, y, alone):
        mirrored = alone and i != j  # the tile (j, i) is this one's transpose
        if values:
            powers = _power(squares.clamp_min(0), r / 2)
            sums[i] += powers.sum(1)
            if mirrored:
                sums[j] += powers.sum(0)
        kernel = _power(torch.nn.functional.threshold_(squares, near, math.inf), r / 2 - 1)
        ahead[i] += kernel @ y1[j]
        if mirrored or both:
            back[j] += kernel.T @ x1[i]
    if alone:
        ahead += back
    gradient = r / len(y) * (x * ahead[:, -1:] - ahead[:, :-1])
    other = (r / len(x) * (y * back[:, -1:] - back[:, :-1])).to(dtype) if both else None
    return (sums / len(y)).to(dtype), gradient.to(dtype), other


def _tiles(x: Tensor, y: Tensor, alone: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, |x_i - y_j|^2) of every tile, those on and above the diagonal where x is y; one buffer."""
    rows, columns = TILE[x.device.type != "cpu"]
    if alone:
        rows = columns = min(rows * 2, columns)  # square, so that the diagonal is made of tiles
    rows, columns = min(rows, len(x)), min(columns, len(y))
    buffer = torch.empty(2, rows * columns, dtype=x.dtype, device=x.device)
    if x.shape[1] <= DIFFERENCES:
        left, right = x.T[..., None].contiguous(), y.T[:, None].contiguous()
    else:  # |x|^2 + |y|^2 - 2 x.y in one product
        one_x, one_y = torch.ones_like(x[:, :1]), torch.ones_like(y[:, :1])
        left = torch.cat([-2 * x, x.square().sum(1, keepdim=True), one_x], 1)
        right = torch.cat([y, one_y, y.square().sum(1, keepdim=True)], 1).T
    for a in range(0, len(x), rows):
        for b in range(a if alone else 0, len(y), columns):
            i, j = slice(a, min(a + rows, len(x))), slice(b, min(b + columns, len(y)))
            shape = i.stop - i.start, j.stop - j.start
            squares, part = (one[: shape[0] * shape[1]].view(shape) for one in buffer)
            if x.shape[1] > DIFFERENCES:
                torch.mm(left[i], right[:, j], out=squares)
                if alone and i == j:
                    squares.fill_diagonal_(0)
            else:
                torch.sub(left[0, i], right[0, :, j], out=squares).square_()
                for u, v in zip(left[1:], right[1:]):
                    squares.addcmul_(torch.sub(u[i], v[:, j], out=part), part)
            yield i, j, squares


def _coincident(x: Tensor, y: Tensor) -> float:
    """The squared distance up to which rounding cannot tell two points apart."""
    if x.shape[1] <= DIFFERENCES:
        return 0.0
    largest = float(max(x.square().sum(1).max(), y.square().sum(1).max()))
    return 64 * torch.finfo(x.dtype).eps * largest


def _power(squares: Tensor, p: float) -> Tensor:
    """squares^p, in place for p = -1/2. exp(p log) is several times faster than pow; 0 and infinity come right."""
    if p == -0.5:
        return squares.rsqrt_()
    if p == 0.5:
        return squares.sqrt()
    return torch.exp(p * torch.log(squares))


# ------------------------------------------------------------------ sorting and slices


def _sorted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """On k lines at once, x (k, n), y (k, m): mean_j |x_i - y_j| and its derivative (#{y < x} - #{y > x}) / m."""
    m = y.shape[1]
    x, ordered = x.contiguous(), y.sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, x)
    not_above = torch.searchsorted(ordered, x, right=True)
    total = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))  # sums of the smallest 0 .. m
    lower, upper = total.gather(1, below), total[:, -1:] - total.gather(1, not_above)
    values = x.double() * (below + not_above - m) - lower + upper
    return (values / m).to(x.dtype), (below + not_above - m).to(x.dtype) / m


def _sliced(x: Tensor, y: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """|s| = c mean_u |u . s| over the sphere, c = sqrt(pi) Gamma((d + 1) / 2) / Gamma(d / 2), on finitely many u."""
    d = x.shape[1]
    c = math.sqrt(math.pi) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    u = slicing_directions(d, directions).to(x)
    potential, gradient = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for some in u.split(16, dim=1):  # bounds the memory to 16 projections
        values, slopes = _sorted((x @ some).T, (y @ some).T)
        potential += values.sum(0)
        gradient += slopes.T @ some.T
    return c / u.shape[1] * potential, c / u.shape[1] * gradient


# ------------------------------------------------------------------ differentiable means


class _KernelMean(torch.autograd.Function):
    """mean_ij |x_i - y_j|^r with the gradients that ``_tiled`` finds in the same pass."""

    @staticmethod
    def forward(context, x: Tensor, y: Tensor, r: float) -> Tensor:
        values, gradient, other = _tiled(x, y, r, both=True)
        context.save_for_backward(gradient / len(x), other / len(y))
        return values.mean()

    @staticmethod
    def backward(context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        of_x, of_y = context.saved_tensors
        return grad * of_x, grad * of_y, None


class _SelfMean(torch.autograd.Function):
    """mean_ik |x_i - x_k|^r; each pair counts in both orders, so the gradient is twice that of one side."""

    @staticmethod
    def forward(context, x: Tensor, r: float) -> Tensor:
        values, gradient, _ = _tiled(x, x, r)
        context.save_for_backward(2 * gradient / len(x))
        return values.mean()

    @staticmethod
    def backward(context, grad: Tensor) -> tuple[Tensor, None]:
        return grad * context.saved_tensors[0], None


def kernel_mean(x: Tensor, y: Tensor, r: float = 1.0) -> Tensor:
    """mean_ij |x_i - y_j|^r, differentiable in both clouds, without an n x m matrix in memory; x (n, d), y (m, d).

    Pass the same tensor twice for mean_ik |x_i - x_k|^r, the pairs i = k counted with 0. Coincident pairs have the
    derivative 0, which for r <= 1 is one choice among several. Raises ``ValueError`` as ``riesz_sums``.
    """
    _check(x, y, r)
    return _SelfMean.apply(x, r) if y is x else _KernelMean.apply(x, y, r)
