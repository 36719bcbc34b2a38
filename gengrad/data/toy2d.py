"""Densities on the plane that transports are compared on; a draw is a formula of the generator's numbers.

The shapes and scales of ``8gaussians``, ``moons``, ``checkerboard``, ``swissroll``, ``two_spirals`` and
``pinwheel`` are those of the usual benchmarks (torchcfm's and FFJORD's), so that published figures can be
compared. U is uniform on [0, 1], Z standard normal, B a fair sign or coin; a new letter or index is an
independent draw.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.base import LARGEST, Distribution
from gengrad.data.gaussians import MODE_STDS, Mixture, Positive
from gengrad.registry import DATASETS, Settings

NonNegative = Annotated[float, Field(ge=0, le=LARGEST)]


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator)


def _noise(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator)


def _coin(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (n,), generator=generator)


class _EqualModes(Distribution):
    """Equal Gaussians N(m_k, std^2 I): p(x) = mean_k exp(-|x - m_k|^2 / (2 std^2)) / (2 pi std^2)."""

    event_shape = (2,)

    def centres(self) -> Tensor:
        """The m_k, shape (k, 2)."""
        raise NotImplementedError

    def prepare(self) -> None:
        means = self.centres()
        covariance = self.config.std**2 * torch.eye(2)
        self.mixture = Mixture(torch.ones(len(means)), means, covariance.expand(len(means), 2, 2))
        self.modes, self.mode_weights = means.float(), self.mixture.weights.float()
        self.mode_radius = MODE_STDS * self.config.std

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.mixture.sample(n, generator)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x), (n, 2) -> (n,)."""
        return self.mixture.log_density(x)


@DATASETS.register("8gaussians")
class EightGaussians(_EqualModes):
    """Eight equal Gaussians on a circle: m_k = radius (cos(k pi/4), sin(k pi/4)).

    torchcfm calls its variance 0.1 but takes the *square root* as the covariance's diagonal: sqrt(0.1) =
    0.316 is the variance of a coordinate and 0.1^(1/4) = 0.562 its standard deviation, which is the default
    here.
    """

    class Config(Settings):
        radius: Positive = 5.0
        std: Positive = 0.1**0.25

    def centres(self) -> Tensor:
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        return self.config.radius * torch.stack([angle.cos(), angle.sin()], dim=1)


@DATASETS.register("25gaussians")
class TwentyFiveGaussians(_EqualModes):
    """Twenty-five equal, narrow Gaussians on the grid spacing {-2, -1, 0, 1, 2}^2, to test mode coverage."""

    class Config(Settings):
        spacing: Positive = 2.0
        std: Positive = 0.1

    def centres(self) -> Tensor:
        line = self.config.spacing * torch.arange(-2, 3, dtype=torch.float64)
        return torch.cartesian_prod(line, line)


@DATASETS.register("moons")
class Moons(Distribution):
    """Two interleaved half circles: x = 3 (c + noise Z) - 1, with angle a = pi U.

    c = (cos a, sin a) or (1 - cos a, 1/2 - sin a) with equal odds; scale and shift are torchcfm's
    ``sample_moons``. Without the noise within [-4, 5] x [-2.5, 2].
    """

    event_shape = (2,)

    class Config(Settings):
        noise: NonNegative = 0.2

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        angle = math.pi * _uniform(n, generator)
        upper = torch.stack([angle.cos(), angle.sin()], dim=1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
        arc = torch.where(_coin(n, generator)[:, None] == 1, upper, lower)
        return 3 * (arc + self.config.noise * _noise(n, generator)) - 1


@DATASETS.register("checkerboard")
class Checkerboard(Distribution):
    """Uniform on the 8 dark fields of a 4 x 4 board on [-4, 4]^2, fields of side 2: p(x) = 1/32 on them.

    With u = 4 U_1 - 2: x = 2 (u, U_2 - 2 B + floor(u) mod 2), B in {0, 1}.
    """

    event_shape = (2,)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        u = 4 * _uniform(n, generator) - 2
        v = _uniform(n, generator) - 2 * _coin(n, generator) + u.floor() % 2
        return 2 * torch.stack([u, v], dim=1)

    def log_density(self, x: Tensor) -> Tensor:
        """-log 32 on the dark fields, where floor(x_1/2) + floor(x_2/2) is even; minus infinity elsewhere."""
        field = (x / 2).floor()
        dark = (field.sum(1) % 2 == 0) & (field >= -2).all(1) & (field < 2).all(1)
        return torch.where(dark, x.new_tensor(-math.log(32)), x.new_tensor(-math.inf))


@DATASETS.register("swissroll")
class SwissRoll(Distribution):
    """A spiral with noise: x = (t (cos t, sin t) + noise Z) / 5, with t = (3 pi / 2) (1 + 2 U).

    Without the noise at 0.94 to 2.83 from the origin.
    """

    event_shape = (2,)

    class Config(Settings):
        noise: NonNegative = 1.0

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        t = 1.5 * math.pi * (1 + 2 * _uniform(n, generator))
        return (torch.stack([t * t.cos(), t * t.sin()], dim=1) + self.config.noise * _noise(n, generator)) / 5


@DATASETS.register("pinwheel")
class Pinwheel(Distribution):
    """Bent arms: x = 2 R(theta) f, f = (1 + radial Z_1, tangential Z_2).

    R(theta) turns by theta = 2 pi k / arms + bend e^{f_1}, k is a uniform arm. Almost all of it lies within 4 of the
    origin.
    """

    event_shape = (2,)

    class Config(Settings):
        arms: Annotated[int, Field(ge=1)] = 5
        radial: NonNegative = 0.3
        tangential: NonNegative = 0.1
        bend: float = 0.25

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        c = self.config
        arm = torch.randint(c.arms, (n,), generator=generator)
        z = _noise(n, generator)
        along, across = 1 + c.radial * z[:, 0], c.tangential * z[:, 1]
        theta = 2 * math.pi * arm / c.arms + c.bend * along.exp()
        cos, sin = theta.cos(), theta.sin()
        return 2 * torch.stack([cos * along - sin * across, sin * along + cos * across], dim=1)


@DATASETS.register("two_spirals")
class TwoSpirals(Distribution):
    """Two spirals, one the other's mirror image in the origin, through 540 degrees.

    x = B (s (-cos s, sin s) + (U_1, U_2) / 2) / 3 + noise Z, with s = 3 pi sqrt(U_0) and B a fair sign. Without the
    noise within 3.4 of the origin.
    """

    event_shape = (2,)

    class Config(Settings):
        noise: NonNegative = 0.1

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        s = 3 * math.pi * _uniform(n, generator).sqrt()
        width = torch.rand(n, 2, generator=generator) / 2
        arm = s[:, None] * torch.stack([-s.cos(), s.sin()], dim=1) + width
        sign = 2 * _coin(n, generator)[:, None] - 1
        return sign * arm / 3 + self.config.noise * _noise(n, generator)
