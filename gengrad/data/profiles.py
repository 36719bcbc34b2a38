"""Radial profiles with compact support that some flows keep: Barenblatt, semicircle, uniform ball."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.data.even_clouds import FLAT
from gengrad.data.families import EDGE, direction, points_of_the_cube
from gengrad.data.family_members import BarenblattMembers
from gengrad.registry import DATASETS, Settings


class Radial(Distribution):
    """rho(x) proportional to (1 - |x|^2 / R^2)^p on the ball of radius R in R^d."""

    def power(self) -> float:
        raise NotImplementedError

    def prepare(self) -> None:
        self.radius, self.event_shape = self.config.radius, (self.config.dimension,)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """|x|^2 / R^2 is Beta(d/2, p + 1), by its quantiles, in a uniform direction.

        The n draws of one call come of a net shifted at random: each has the law, and together they are far more even
        than independent ones.
        """
        d = self.config.dimension
        u = points_of_the_cube(1, n, 2 if d == 2 else d + 1, generator)[0]
        radius = self.config.radius * _beta_quantile(u[:, 0], d / 2, self.power() + 1).sqrt()
        # other than on the plane, the direction of a Gaussian: of one sign or the other on the line
        ray = direction(u[:, 1:]) if d == 2 else torch.special.ndtri(u[:, 1:].clamp(EDGE, 1 - EDGE))
        return (radius[:, None] * ray / ray.norm(dim=1, keepdim=True).clamp_min(EDGE)).float()

    def even(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` points (n, d), float64, that stand for the profile together: ``BarenblattMembers.cloud``.

        In the plane a spiral of golden angles; draws above d = 3.
        """
        d, p = self.config.dimension, self.power()
        if d > FLAT:
            return self.sample(n, generator).double()
        radius = torch.full((1, 1), self.config.radius, dtype=torch.float64)
        members = BarenblattMembers(torch.zeros(1, d, dtype=torch.float64), radius, 1 + 1 / p if p else math.inf)
        return members.cloud(points_of_the_cube(1, n, d, generator))[0]

    def log_density(self, x: Tensor) -> Tensor:
        """log of the normalised profile, minus infinity outside of its support, (n, d) -> (n,)."""
        d, r, p = self.config.dimension, self.config.radius, self.power()
        log_volume = d / 2 * math.log(math.pi) + math.lgamma(p + 1) - math.lgamma(p + 1 + d / 2) + d * math.log(r)
        inside = 1 - x.flatten(1).square().sum(1) / r**2
        # a point on the edge may be rounded out of it, where the logarithm's derivative would be NaN
        safe = torch.where(inside > 0, inside, 1.0)
        value = p * safe.log() - log_volume
        return torch.where(inside > 0, value, -math.inf)


def _beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(a, b, u.numpy()))


@DATASETS.register("barenblatt")
class Barenblatt(Radial):
    """The profile of the porous medium equation d rho / dt = Laplacian rho^m: p = 1 / (m - 1)."""

    class Config(Settings):
        m: float = Field(2.0, gt=1)
        radius: float = Field(0.5, gt=0)
        dimension: int = Field(1, ge=1)

    def power(self) -> float:
        return 1 / (self.config.m - 1)


@DATASETS.register("semicircle")
class Semicircle(Radial):
    """Wigner's law on [-R, R], density 2 sqrt(R^2 - x^2) / (pi R^2): p = 1/2."""

    class Config(Settings):
        radius: float = Field(1.0, gt=0)
        dimension: int = Field(1, ge=1, le=1)

    def power(self) -> float:
        return 0.5


@DATASETS.register("ball")
class Ball(Radial):
    """The uniform law on the ball of radius R: p = 0."""

    class Config(Settings):
        radius: float = Field(1.0, gt=0)
        dimension: int = Field(2, ge=1)

    def power(self) -> float:
        return 0.0
