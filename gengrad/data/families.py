"""Families of densities: many measures to start from, each with samples and a log density, drawn in batches.

The families themselves are in ``family_members.py``. Samples are made of points u of the unit cube, so that points
spread evenly there are spread evenly over the measure: means over such a cloud are far less noisy than over
independent draws.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from torch import Tensor

from gengrad.data.even_clouds import FLAT, lattice, ranks
from gengrad.registry import FAMILIES, Configured, Settings

# share of the clouds in the plane and in space that have not settled: what has seen settled ones alone takes the noise
# of others for the measure's own
UNEVEN = 0.5
EDGE = 1e-6  # u stays so far from the faces of the cube, where a Gaussian quantile is infinite


class Members(ABC):
    """``count`` measures of a family on R^d, all at once."""

    spare = 0  # coordinates of u beyond d, for ``push_wide``
    smooth = False  # positive with derivatives everywhere, so that integrals can be taken by parts

    @abstractmethod
    def push(self, u: Tensor) -> Tensor:
        """u (count, n, d + spare) in the cube -> points (count, n, d) of the measures, even from even ones."""

    def push_wide(self, u: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Points like ``push``'s, more of them in the tails, and weights (count, n): means of w f(x) over u are those

        of f over the measure. ``factor`` >= 1: how many times as far the tails are drawn; without tails weights are 1.
        """
        x = self.push(u)
        return x, torch.ones(x.shape[:2], dtype=x.dtype)

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """log rho at x (count, n, d) -> (count, n)."""

    def cloud(self, u: Tensor, within: Tensor | float = 0.5) -> Tensor:
        """``push`` of evenly spread u (count, n, d + spare), as near to the measure as so many points come.

        A cloud says of its measure what its points say, no more, and the covariance of a net of 1,024 points is off by
        a percent, which is some percent of a JKO step. So u is replaced by a ``lattice`` of so many points; where a
        subclass knows more, it takes the measure's own moments and lets the points settle. ``within``: a number, or
        (count, 1, 1), of [0, 1): by others than 1/2 two clouds of a measure on the line differ.
        """
        return self.push(lattice(u, u.shape[-1] - self.spare, within))

    def net(self, u: Tensor) -> Tensor:
        """``push`` of u (count, n, d + spare) at its ranks: a cloud that is not as even as ``cloud``."""
        return self.push(ranks(u))

    def made(self, how: str, u: Tensor, which: Tensor) -> Tensor:
        """What the method ``how`` makes of u (count, n, k), for the measures of a mask (count,) alone."""
        return getattr(self, how)(u)[which]

    def score(self, x: Tensor) -> Tensor:
        """grad log rho at x, like x; NaN where the density is not smooth."""
        if not self.smooth:
            return torch.full_like(x, math.nan)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.log_density(leaf).sum(), leaf)[0]


class Family(Configured, ABC):
    """Measures on R^d around centres drawn evenly from [-reach, reach]^d, of sizes drawn evenly in the logarithm."""

    class Config(Settings):
        reach: float = Field(1.5, ge=0)  # how far from the origin the centres lie, in each coordinate
        smallest: float = Field(0.3, gt=0)
        largest: float = Field(1.5, gt=0)

        @model_validator(mode="after")
        def _in_order(self):
            if self.smallest > self.largest:
                raise ValueError(f"smallest={self.smallest:g} is above largest={self.largest:g}")
            return self

    @abstractmethod
    def members(self, count: int, dimension: int, generator: torch.Generator) -> Members:
        """``count`` measures on R^dimension."""

    def _centres(self, *shape: int, generator: torch.Generator) -> Tensor:
        return self.config.reach * (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1)

    def _sizes(self, *shape: int, generator: torch.Generator) -> Tensor:
        low, high = math.log(self.config.smallest), math.log(self.config.largest)
        return (low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)).exp()

    def _oblong(self, count: int, each: int, dimension: int, generator: torch.Generator) -> Tensor:
        """Lower factors (count, each, d, d) of covariances with such sizes in directions drawn evenly."""
        stds = self._sizes(count, each, dimension, generator=generator)
        turn = rotations(count * each, dimension, generator).view(count, each, dimension, dimension)
        return torch.linalg.cholesky((turn * stds[..., None, :].square()) @ turn.mT)

    def _balls(self, count: int, dimension: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Centres (count, d) and radii (count, 1); raises ``ValueError`` above three dimensions."""
        if dimension > 3:
            raise ValueError(f"family {self.name!r} is for d <= 3; these points have d = {dimension}")
        return self._centres(count, dimension, generator=generator), self._sizes(count, 1, generator=generator)


def read_families(given: Any) -> list[dict]:
    """The families of a YAML value, a name, a mapping or a list of these, with every setting filled in."""
    entries = given if isinstance(given, list) else [given]
    if not entries:
        raise ValueError("at least one family of initial densities is needed")
    return [_read(entry) for entry in entries]


def _read(entry: Any) -> dict:
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or "name" not in entry:
        raise ValueError(f"expected a family's name, one of: {', '.join(FAMILIES)}")
    try:
        checked = FAMILIES.get(entry["name"]).Config(**{key: value for key, value in entry.items() if key != "name"})
    except ValidationError as error:
        lines = [
            ": ".join(filter(None, [".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")]))
            for e in error.errors()
        ]
        raise ValueError(f"{entry['name']}: {'; '.join(lines)}") from None
    return {"name": entry["name"], **checked.model_dump(mode="json")}


Families = Annotated[list[dict], BeforeValidator(read_families)]


def clouds(
    families: Sequence[dict], count: int, n: int, dimension: int, generator: torch.Generator,
    first: int | None = None, tails: float = 1.0, independent: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Clouds of ``count`` measures, the families equally often: x and score (count, n, d), log rho and weights (count,

    n), float32. The ``first`` of them (default: n) are ``Members.cloud``, half of the smooth ones in the plane and in
    space ``Members.net``, and in place of a share ``independent`` of the smooth ones as many independent points, their
    weights 1; the others go on in a Sobol net of the cube and reach ``tails`` times as far, by ``push_wide``.
    """
    family_of, first = torch.randint(len(families), (count,), generator=generator), n if first is None else first
    x, log_rho, score = torch.empty(count, n, dimension), torch.empty(count, n), torch.empty(count, n, dimension)
    weight = torch.ones(count, n)
    for number, settings in enumerate(families):
        rows = (family_of == number).nonzero()[:, 0]
        if not len(rows):
            continue
        members = FAMILIES.build(settings).members(len(rows), dimension, generator)
        u = points_of_the_cube(len(rows), n, dimension + members.spare, generator)
        points = _seen(members, u[:, :first], generator, independent)
        if first < n and tails == 1:
            within = torch.rand(len(rows), 1, 1, generator=generator, dtype=torch.float64)
            points = torch.cat([points, members.cloud(u[:, first:], within)], 1)
        elif first < n:
            far, weights = members.push_wide(u[:, first:], tails)
            points, weight[rows, first:] = torch.cat([points, far], 1), weights.float()
        # densities at the points as they are stored: on the edge of a support rounding decides
        x[rows], log_rho[rows] = points.float(), members.log_density(points).float()
        score[rows] = members.score(points).float()
    return x, log_rho, score, weight


def _seen(members: Members, u: Tensor, generator: torch.Generator, independent: float) -> Tensor:
    """Clouds (count, n, d) of the measures from evenly spread u, of the kinds that ``clouds`` names."""
    d = u.shape[-1] - members.spare
    if not members.smooth:
        return members.cloud(u)
    uneven = alone = torch.zeros(len(u), dtype=torch.bool)
    if 1 < d <= FLAT:
        uneven = torch.rand(len(u), generator=generator) < UNEVEN
    if independent:
        alone = torch.rand(len(u), generator=generator) < independent
    points = u.new_empty(*u.shape[:-1], d)
    for which, how in ((~uneven & ~alone, "cloud"), (uneven & ~alone, "net"), (alone, "push")):
        if which.any():
            from_where = points_of_the_cube(*u.shape, generator, even=False) if how == "push" else u
            points[which] = members.made(how, from_where, which)
    return points


def points_of_the_cube(count: int, n: int, k: int, generator: torch.Generator, even: bool = True) -> Tensor:
    """(count, n, k) in [0, 1), float64."""
    if not even:
        return torch.rand(count, n, k, generator=generator, dtype=torch.float64)
    net = torch.quasirandom.SobolEngine(k).draw(n, dtype=torch.float64)
    return (net + torch.rand(count, 1, k, generator=generator, dtype=torch.float64)) % 1.0


def rotations(count: int, d: int, generator: torch.Generator) -> Tensor:
    """(count, d, d) orthogonal, drawn evenly; the sign of R's diagonal taken out of QR makes them so."""
    q, r = torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=torch.float64))
    return q * torch.sign(r.diagonal(dim1=-2, dim2=-1))[:, None]


def direction(u: Tensor) -> Tensor:
    """Unit vectors of d - 1 coordinates of the cube, (..., 1) -> (..., 2) and (..., 2) -> (..., 3), area to area."""
    angle = 2 * math.pi * u[..., -1]
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    if u.shape[-1] == 1:
        return circle
    height = 2 * u[..., :1] - 1
    return torch.cat([(1 - height.square()).sqrt() * circle, height], -1)


def log_ball(d: int) -> float:
    """The logarithm of the volume of the unit ball."""
    return d / 2 * math.log(math.pi) - math.lgamma(1 + d / 2)
