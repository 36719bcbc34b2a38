"""What the law of a flow should be after every step, where a closed form knows: continuous and exact implicit steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.data.gaussians import Mixture
from gengrad.data.profiles import Ball, Barenblatt, Radial, Semicircle
from gengrad.evaluation.grid import GridTruth, window
from gengrad.ot import gaussian_jko_step, gaussian_kl, ornstein_uhlenbeck
from gengrad.ot import spreading as closed
from gengrad.registry import POTENTIALS


@dataclass
class GaussianTruth:
    """A Gaussian under a quadratic potential and an entropy (the heat equation without a potential)."""

    mean: Tensor
    cov: Tensor
    a: Tensor
    b: Tensor
    temperature: float
    tau: float
    _steps: list = field(default_factory=list)

    def exact(self, k: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the continuous flow at time k tau."""
        return ornstein_uhlenbeck(self.mean, self.cov, self.a, self.b, self.temperature, k * self.tau)

    def implicit(self, k: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance after k exact implicit steps."""
        self._steps = self._steps or [(self.mean, self.cov)]
        while len(self._steps) <= k:
            self._steps.append(gaussian_jko_step(*self._steps[-1], self.a, self.b, self.temperature, self.tau))
        return self._steps[k]

    def law(self, k: int, kind: str = "exact") -> Mixture:
        mean, cov = getattr(self, kind)(k)
        return Mixture(torch.ones(1), mean[None], cov[None])

    def energy(self, k: int, kind: str = "exact") -> float:
        """E (x-b)'A(x-b)/2 + temperature Ent."""
        mean, cov = getattr(self, kind)(k)
        away = mean - self.b
        entropy = -0.5 * (torch.linalg.slogdet(cov).logabsdet + len(mean) * (1 + math.log(2 * math.pi)))
        return float(((self.a @ cov).trace() + away @ self.a @ away) / 2 + self.temperature * entropy)

    def floor(self, k: int) -> float:
        """Symmetric KL between the exact implicit steps and the continuous flow: what no JKO scheme can be below."""
        return symmetric_gaussian_kl(*self.implicit(k), *self.exact(k))


@dataclass
class RadialTruth:
    """A radial profile that keeps its shape: porous medium with a quadratic bowl, or aggregation."""

    source: Radial
    tau: float
    equation: str  # "porous_medium" or "aggregation"
    m: float = 2.0
    stiffness: float = 0.0

    def exact(self, k: int) -> float:
        """Radius of the continuous flow at time k tau."""
        r, d, t = self.source.radius, self.source.config.dimension, k * self.tau
        if self.equation == "aggregation":
            return closed.aggregation_radius(r, t, d)
        return closed.barenblatt_continuous_radius(r, t, self.m, d, self.stiffness)

    def implicit(self, k: int) -> float:
        """Radius after k exact implicit steps."""
        r, d = self.source.radius, self.source.config.dimension
        for _ in range(k):
            if self.equation == "aggregation":
                r = closed.aggregation_jko_radius(r, self.tau, d)
            else:
                r = closed.barenblatt_jko_radius(r, self.tau, self.m, d, self.stiffness)
        return r

    def law(self, k: int, kind: str = "exact") -> Radial:
        return type(self.source)(config=self.source.config.model_copy(update={"radius": getattr(self, kind)(k)}))

    def energy(self, k: int, kind: str = "exact") -> float:
        r, d = getattr(self, kind)(k), self.source.config.dimension
        if self.equation == "aggregation":
            return closed.aggregation_energy(r, d)
        return closed.barenblatt_energy(r, self.m, d, self.stiffness)

    def radius_of(self, x: Tensor) -> float:
        """The radius whose profile has the second moment of x (n, d)."""
        p, d = self.source.power(), self.source.config.dimension
        return float((x.double().square().sum(1).mean() * (p + 1 + d / 2) / (d / 2)).sqrt())


@dataclass
class RingTruth:
    """Aggregation under W = |z|^4/4 - |z|^2/2, known where it comes to rest alone: on a sphere, without a density.

    E|z|^4 = 2 E|x|^4 + 2 (E|x|^2)^2 + 4 |Cov|^2 for mean zero: at a given E|x|^2 it is least on a sphere with a
    covariance that is a multiple of I, whatever the law on it.
    """

    dimension: int

    @property
    def law(self) -> Callable | None:
        """In the plane the ring itself, to be drawn; it has no density."""
        return (lambda k: self) if self.dimension == 2 else None

    @property
    def radius(self) -> float:
        return closed.ring_radius(self.dimension)

    @property
    def energy(self) -> float:
        """1/2 E W at rest: E|z|^2 = 2 R^2 and E|z|^4 = 4 R^4 (1 + 1/d)."""
        return (self.radius**4 * (1 + 1 / self.dimension) - self.radius**2) / 2

    def radius_of(self, x: Tensor) -> float:
        """The mean distance of x (n, d) from its centre."""
        return float((x - x.mean(0)).double().norm(dim=1).mean())


def symmetric_gaussian_kl(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """KL(x | y) + KL(y | x)."""
    there, back = gaussian_kl(mean_x, cov_x, mean_y, cov_y), gaussian_kl(mean_y, cov_y, mean_x, cov_x)
    return float(there + back)


def truth_of_flow(method: dict, source: Distribution) -> GaussianTruth | RadialTruth | RingTruth | GridTruth | None:
    """The truth about the flow of a method's ``functional`` from ``source``; None where none is known here."""
    terms, tau = method["functional"], method["tau"]
    by_name = {term["name"]: term for term in terms}
    if len(by_name) < len(terms):
        return None
    names, potential = set(by_name), by_name.get("potential", {"potential": None, "weight": 1.0})
    quadratic = potential["potential"] is None or potential["potential"]["name"] == "quadratic"
    if method.get("observations") or not quadratic:
        return _on_the_line(method, by_name, source)
    if names <= {"potential", "entropy"} and "entropy" in names and source.moments() is not None:
        mean, cov = source.moments()
        a, b = _quadratic(potential, len(mean))
        return GaussianTruth(mean, cov, a, b, by_name["entropy"]["weight"], tau)
    if names <= {"potential", "power_entropy"} and "power_entropy" in names and isinstance(source, Barenblatt):
        power, m = by_name["power_entropy"], source.config.m
        a, b = _quadratic(potential, source.config.dimension)
        isotropic = torch.allclose(a, a[0, 0] * torch.eye(len(a), dtype=a.dtype)) and not b.any()
        if power["m"] == m and power["weight"] == 1.0 and isotropic:
            return RadialTruth(source, tau, "porous_medium", m, float(a[0, 0]))
    if names == {"interaction"}:
        term, d = by_name["interaction"], math.prod(source.event_shape)
        law = (term["attraction"], term["repulsion"], term["weight"])
        if law == (2.0, 0.0, 1.0) and isinstance(source, Semicircle | Ball) and d == 1 + isinstance(source, Ball):
            return RadialTruth(source, tau, "aggregation")
        if law == (4.0, 2.0, 1.0):
            return RingTruth(d)
    return None


def _on_the_line(method: dict, by_name: dict, source: Distribution) -> GridTruth | None:
    """A potential and an entropy on the line, with or without observations."""
    if tuple(source.event_shape) != (1,) or set(by_name) != {"potential", "entropy"}:
        return None
    weight, temperature = by_name["potential"]["weight"], by_name["entropy"]["weight"]
    named = POTENTIALS.build(by_name["potential"]["potential"])
    low, high = window(source.log_density, lambda x: weight * named(x), temperature)
    seen = [(round(time / method["tau"]), value) for time, value in method.get("observations", ())]
    return GridTruth(
        lambda x: weight * named(x), temperature, source.log_density, low, high, method["tau"], tuple(seen),
        method.get("noise", 1.0),
    )  # fmt: skip


def _quadratic(term: dict, d: int) -> tuple[Tensor, Tensor]:
    """(A, b) of the term E (x-b)'A(x-b)/2, weight included; zero without one."""
    if term["potential"] is None:
        return torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    a, b = POTENTIALS.build(term["potential"]).full(d)
    return term["weight"] * a, b
