"""What a Dirac becomes under the interaction energy of a Riesz kernel: a closed form to compare learned flows with."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.registry import DATASETS, Settings


def profile_radius(d: int, r: float) -> float:
    """s, the radius of prox_F(delta_0) at tau = 1 for F = -E|x - x'|^r / 2 (arXiv 2301.11624, theorem 6).

    d + r < 4: s = [r Gamma(2 - r/2) Gamma((d + r)/2) / ((d/2) Gamma(d/2))]^(1/(2 - r)), the radius of a ball;
    else s = (r I / 2)^(1/(2 - r)), I = 2^(r + d - 2) Gamma(d/2) Gamma((d + r - 1)/2) / (sqrt(pi) Gamma(d - 1 + r/2)),
    the radius of a sphere.
    """
    if d + r < 4:
        log = math.lgamma(2 - r / 2) + math.lgamma((d + r) / 2) - math.lgamma(d / 2) + math.log(2 * r / d)
    else:
        log = (r + d - 2) * math.log(2) + math.lgamma(d / 2) + math.lgamma((d + r - 1) / 2)
        log += math.log(r / 2) - math.log(math.pi) / 2 - math.lgamma(d - 1 + r / 2)
    return math.exp(log / (2 - r))


def dilations(r: float, tau: float, steps: int) -> list[float]:
    """s_1 .. s_steps of the backward scheme, whose n-th measure is s_n prox_F(delta_0): s_n - s_(n-1) = tau s_n^(r-1).

    s + the step is increasing in s, so the root is found by bisection. At r = 1 it is s_n = n tau.
    """
    found, last = [], 0.0
    for _ in range(steps):
        low, high = last, last + 1 + tau + tau ** (1 / (2 - r))
        while high - low > 1e-14 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if middle - tau * middle ** (r - 1) < last else (low, middle)
        found.append(last := (low + high) / 2)
    return found


@DATASETS.register("riesz_profile")
class RieszProfile(Distribution):
    """What F = -E|x - x'|^r / 2 makes of the Dirac at 0: prox_F(delta_0) scaled by ((2 - r) time)^(1 / (2 - r)).

    d + r < 4: |x|^2 / radius^2 ~ Beta(d/2, 2 - (r + d)/2); else uniform on the sphere. ``dilation`` gives the factor
    instead of the time. ``radius`` is where the mass ends. Source: arXiv 2301.11624, theorem 6.
    """

    class Config(Settings):
        d: Annotated[int, Field(ge=1)] = 2
        r: float = Field(1.0, gt=0, lt=2)
        time: float = Field(1.0, gt=0)
        dilation: float | None = Field(None, gt=0)

    def prepare(self) -> None:
        c = self.config
        factor = c.dilation or ((2 - c.r) * c.time) ** (1 / (2 - c.r))
        self.event_shape = (c.d,)
        self.radius = factor * profile_radius(c.d, c.r)
        self.beta = (c.d / 2, 2 - (c.r + c.d) / 2) if c.d + c.r < 4 else None

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.config.d, generator=generator, dtype=torch.float64)
        radii = self.radial_quantile(torch.rand(n, generator=generator, dtype=torch.float64))
        return (radii[:, None] * z / z.norm(dim=1, keepdim=True)).float()

    def radial_quantile(self, levels: Tensor) -> Tensor:
        """The radius below which a share ``levels`` in [0, 1] of the mass lies, any shape; float64."""
        if self.beta is None:
            return torch.full_like(levels, self.radius, dtype=torch.float64)
        from scipy.special import betaincinv

        return self.radius * torch.from_numpy(np.sqrt(betaincinv(*self.beta, levels.double().numpy())))

    def mean_square(self) -> float:
        """E|x|^2."""
        a, b = self.beta or (1.0, 0.0)
        return self.radius**2 * a / (a + b)

    def radial_cdf(self, radius: Tensor) -> Tensor:
        """P(|x| <= radius), any shape; float64."""
        share = (radius.double() / self.radius).clamp(0, 1)
        if self.beta is None:
            return (share >= 1).double()
        from scipy.special import betainc

        return torch.from_numpy(np.asarray(betainc(*self.beta, (share**2).numpy())))
