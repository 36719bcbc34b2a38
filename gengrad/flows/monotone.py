"""Increasing maps of the line given by a table: the optimal map between two densities that are known on a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gengrad.flows.transports import KINDS, Transport


class MonotoneTransport(Transport):
    """Piecewise linear and increasing on the line, T(knots) = images, straight on beyond them; no network evaluation.

    ``record``: plain data of the step that it makes. ``scores``: where known, the derivative of the logarithm of the
    density that it leaves, at the images; a table's own second derivative would be worth nothing.
    """

    kind = "monotone"
    has_density = True

    def __init__(self, knots: Tensor, images: Tensor, record: dict | None = None, scores: Tensor | None = None):
        super().__init__()
        if knots.shape != images.shape or knots.ndim != 1 or len(knots) < 2:
            raise ValueError(f"a monotone map has as many images as knots, at least 2; got {len(knots)}, {len(images)}")
        self.record = dict(record or {})
        self.register_buffer("knots", knots.double())
        self.register_buffer("images", images.double())
        self.register_buffer("scores", None if scores is None else scores.double())

    def path(self, x: Tensor, generator: torch.Generator | None = None, nfe: int | None = None) -> Iterator[Tensor]:
        yield _interpolate(x, self.knots, self.images)

    def cost(self, nfe: int | None = None) -> int:
        return 0

    def log_det(self, x: Tensor) -> Tensor:
        """log T'(x), constant between two knots; (n, 1) -> (n,)."""
        k = _segment(x, self.knots)
        slopes = self.images.diff() / self.knots.diff()
        return slopes.log()[k].view(len(x)).to(x)

    def inverse(self, y: Tensor) -> Tensor:
        return _interpolate(y, self.images, self.knots)

    def score_after(self, x: Tensor) -> Tensor | None:
        """d log rho / dy of the density left, at y = T(x); (n, 1) like x."""
        return None if self.scores is None else _interpolate(x, self.knots, self.scores)

    def describe(self) -> dict:
        known = self.scores is not None
        return {"kind": self.kind, "knots": len(self.knots), "record": self.record, "scores": known}

    @classmethod
    def rebuild(cls, description: dict) -> MonotoneTransport:
        line = torch.linspace(0, 1, description["knots"])
        return cls(line, line, description["record"], line if description.get("scores") else None)


KINDS[MonotoneTransport.kind] = MonotoneTransport


def _segment(x: Tensor, knots: Tensor) -> Tensor:
    return (torch.searchsorted(knots, x.double().contiguous()) - 1).clamp(0, len(knots) - 2)


def _interpolate(x: Tensor, knots: Tensor, images: Tensor) -> Tensor:
    k = _segment(x, knots)
    slope = (images[k + 1] - images[k]) / (knots[k + 1] - knots[k])
    return (images[k] + slope * (x.double() - knots[k])).to(x)


def reweighting(
    log_density: Callable[[Tensor], Tensor],
    log_weight: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    knots: int = 4001,
    record: dict | None = None,
) -> tuple[MonotoneTransport, float]:
    """(T, log Z): the optimal map from rho to rho w / Z on the line, by their distribution functions on a grid.

    T = G^{-1} o F with F, G the distribution functions of rho and rho w / Z; Z = int rho w. log_density and
    log_weight: (n, 1) -> (n,); the grid spans [low, high], which must hold nearly all of both masses.
    """
    grid = torch.linspace(low, high, knots, dtype=torch.float64)
    log_rho = log_density(grid[:, None])
    log_new = log_rho + log_weight(grid[:, None])
    step = float(grid[1] - grid[0])
    log_z = float(torch.logsumexp(log_new, 0)) + torch.log(torch.tensor(step)).item()
    (f, from_below), (g, to_below) = _distribution(log_rho), _distribution(log_new)
    # in the lower half by mass from below, in the upper from above: both tails keep their digits
    middle = f <= 0.5
    images = torch.where(middle, _invert(f, g, grid), _invert(from_below, to_below, -grid.flip(0), flip=True))
    keep = (images.diff(prepend=images[:1] - 1) > 1e-12) & (images >= low) & (images <= high)
    keep &= torch.minimum(f, from_below) > 1e-13
    slope = torch.gradient(log_new, spacing=step)[0]
    scores = _interpolate(images[keep], grid, slope)
    return MonotoneTransport(grid[keep], images[keep], record, scores), log_z


def _distribution(log_density: Tensor) -> tuple[Tensor, Tensor]:
    """Mass below and mass above each grid point (trapezoidal rule), both normalised."""
    density = (log_density - log_density.max()).exp()
    cells = (density[1:] + density[:-1]) / 2
    below = torch.cat([cells.new_zeros(1), cells.cumsum(0)])
    above = torch.cat([cells.flip(0).cumsum(0).flip(0), cells.new_zeros(1)])
    return below / below[-1], above / above[0]


def _invert(value: Tensor, table: Tensor, grid: Tensor, flip: bool = False) -> Tensor:
    """Where ``table`` over ``grid`` takes ``value``; ``flip``: both fall with the grid's points, given as -grid."""
    if flip:
        return -_interpolate_table(value, table.flip(0), grid)
    return _interpolate_table(value, table, grid)


def _interpolate_table(value: Tensor, table: Tensor, grid: Tensor) -> Tensor:
    k = (torch.searchsorted(table.contiguous(), value.contiguous()) - 1).clamp(0, len(table) - 2)
    width = (table[k + 1] - table[k]).clamp_min(1e-300)
    return grid[k] + (grid[k + 1] - grid[k]) * ((value - table[k]) / width).clamp(0, 1)
