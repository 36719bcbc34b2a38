"""Gaussian kernel estimates of a cloud's density and its gradient, as features of a point, with derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gengrad.kernel_moments import NARROW, KernelMoments, outer

RARE = 3e-4  # of the kernel's peak: a density below which the particles around a point say nothing of it


@dataclass(frozen=True)
class Marks:
    """What particles know of their measure's log density, as ``local_fit.fitted`` finds it.

    ``columns`` (..., N, d + d (d + 1) / 2): the score s_i and the Hessian H_i there as the line s_i + H_i (x - x_i) =
    b_i + H_i x, of which b_i and the upper triangle of H_i; ``unit`` (..., 1, 1): the length in which they are seen.
    """

    columns: Tensor
    unit: Tensor

    def rows(self, which: Tensor) -> Marks:
        """Those of some of the clouds."""
        return Marks(self.columns[which], self.unit[which])

    @torch.autocast("cpu", enabled=False)  # b + H x cancels
    @torch.autocast("cuda", enabled=False)
    def at(self, particles: Tensor) -> Tensor:
        """(unit * score, unit^2 * Hessian) at the particles (..., N, d) themselves, like ``columns``."""
        return torch.cat(_seen(self.columns, particles, self.unit), -1)


def whole(triangle: Tensor, d: int) -> Tensor:
    """Symmetric matrices (..., d, d) of their upper triangles (..., d (d + 1) / 2), row by row."""
    place = torch.empty(d, d, dtype=torch.long, device=triangle.device)
    rows, columns = torch.triu_indices(d, d, device=triangle.device)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows), device=triangle.device)
    return triangle[..., place]


def _seen(marks: Tensor, x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The line of ``Marks`` at x, unit * (b + H x), and unit^2 times the triangle of H."""
    d = x.shape[-1]
    line = marks[..., :d] + (whole(marks[..., d:], d) @ x[..., None])[..., 0]
    return unit * line, unit**2 * marks[..., d:]


@torch.autocast("cpu", enabled=False)  # squared distances of bfloat16 points would be noise
@torch.autocast("cuda", enabled=False)
def smoothed(
    x: Tensor, particles: Tensor, h: Tensor, levels: int, along: Tensor | None = None, marks: Marks | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Scalars and vectors at x (..., n, d): l = log(rho_h + RARE), h grad l, for widths h (..., 1, 1), h / 2, h / 4.

    rho_h(x) = E k_h(x_i - x) over the particles (..., N, d), a Gaussian kernel estimate without constant. RARE keeps
    l and its slope finite away from the particles, where an estimate is that of the nearest one alone. Returns l (...,
    n, levels), h grad l (..., n, levels, d) and, with directions ``along`` (k, ..., 1, d), the derivatives of both.
    With ``marks`` there come as many more vectors, E[k m] / (rho + RARE) for the lines m_i(x) = s_i + H_i (x - x_i) of
    the particles, and d (d + 1) / 2 times as many scalars, the same mean of the Hessians, in units of ``marks.unit``.
    Raises ``ValueError`` where a gradient of the particles is asked for.

    With s = x_i - x, a = E[k s], S = E[k s s']: grad l = a / (h^2 (rho + RARE)) and h^2 Da = S - h^2 rho.
    """
    if particles.requires_grad and torch.is_grad_enabled():
        raise ValueError("kernels have a gradient of the points alone, none of the particles: detach these")
    d, dtype, levels_of = x.shape[-1], x.dtype, ([], [], [], [])
    narrow = dtype == torch.float64 or float(h.min()) < NARROW * 2 ** (levels - 1)
    exact = torch.float64 if narrow else torch.float32
    x, particles, h = (z.to(exact) for z in (x, particles, h))
    along = None if along is None else along.to(x)
    sets = torch.broadcast_shapes(x.shape[:-2], particles.shape[:-2], h.shape[:-2])
    flat = [z.expand(*sets, *z.shape[-2:]).reshape(-1, *z.shape[-2:]) for z in (x, particles, h)]
    columns = unit = None
    if marks is not None:
        columns, unit = marks.columns.to(exact), marks.unit.to(exact)
        columns = columns.expand(*sets, *columns.shape[-2:]).reshape(-1, *columns.shape[-2:])
    moments = KernelMoments.apply(*flat, levels, 1 if along is None else 2, columns)
    for level, found in enumerate(moments.unflatten(1, sets) if sets else moments[:, 0]):
        width = h / 2**level
        rho, first = found[..., :1], found[..., 1 : d + 1]
        a, total = first - rho * x, width * (rho + RARE)
        rows = [[(rho + RARE).log()], [a / total], [], []]  # scalars, vectors, their changes
        if along is not None:
            second = found[..., d + 1 : d + 1 + d * d].unflatten(-1, (d, d)) - outer(first, x) - outer(x, a)
            rise = (rows[1][0] * along).sum(-1, keepdim=True) / width
            turn = (second @ along[..., None])[..., 0] / width**2 - rho * along
            rows[2:] = [rise], [turn / total - rise * rows[1][0]]
        if marks is not None:
            m = columns.shape[-1]
            sums = found[..., 1 + d + (0 if along is None else d * d) :]
            mean = sums[..., :m] / (rho + RARE)
            line, bend = _seen(mean, x, unit)
            rows[0].append(bend), rows[1].append(line)
            if along is not None:  # d E[k m] = (E[k m s'] - E[k m] x') v / h^2, d rho / (rho + RARE) = rise
                slope = sums[..., m:].unflatten(-1, (m, d)) - outer(sums[..., :m], x)
                change = (slope @ along[..., None])[..., 0] / (width * total) - rise * mean
                turn, rise = _seen(change, x, unit)
                turn = turn + unit * (whole(mean[..., d:], d) @ along[..., None])[..., 0]
                rows[2].append(rise), rows[3].append(turn)
        for kept, row in zip(levels_of, rows):
            kept.append(row)
    # by kind, and those by level: what marks add comes after
    scalars, vectors, rises, turns = ([part for kind in zip(*kept) for part in kind] for kept in levels_of)
    changes = (None, None)
    if along is not None:
        changes = torch.cat(rises, -1).to(dtype), torch.stack(turns, -2).to(dtype)
    return torch.cat(scalars, -1).to(dtype), torch.stack(vectors, -2).to(dtype), *changes
