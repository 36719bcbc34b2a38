"""Internal energies F = int f(rho(x)) dx, which need a density: the entropy and the porous-medium energy; and KL."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from gengrad.functionals.base import Density, Functional, Sum
from gengrad.functionals.potential import PotentialEnergy
from gengrad.registry import FUNCTIONALS, Settings


class InternalEnergy(Functional):
    """F(rho) = int f(rho(x)) dx = E f(r) / r with r = rho(x) (JKO-ICNN, arXiv 2106.00774, section 3).

    ``density`` holds log r (n,) at the particles and, for velocities, the score grad log rho (n, *event).
    """

    needs_density = True
    takes: ClassVar = "nothing"
    only_log_det_gradient = False  # whether a log density that is right up to a constant gives right gradients

    @abstractmethod
    def per_particle(self, log_density: Tensor) -> Tensor:
        """f(r) / r, (n,) -> (n,)."""

    @abstractmethod
    def slope(self, log_density: Tensor) -> Tensor:
        """r f''(r), the factor between the score and grad f'(rho), (n,) -> (n,)."""

    def pressure(self, log_density: Tensor) -> Tensor:
        """p(r) / r = f'(r) - f(r) / r, the pressure for a unit of mass, (n,) -> (n,): the slope of f(r) / r in log r.

        The multiplier of -d log det in the derivative of F, and part of its second one, along y + t q:
        E[(p' - p / r) (div q)^2 + p / r tr (Dq)^2], where p'(r) is ``slope``.
        """
        leaf = log_density.detach().requires_grad_(True)
        with torch.enable_grad():
            value = self.per_particle(leaf).sum()
        return torch.autograd.grad(value, leaf)[0]

    def value(self, x: Tensor, density: Density | None = None) -> Tensor:
        return self.per_particle(self._given(density).log).mean()

    def velocity(self, x: Tensor, memory: dict | None = None, density: Density | None = None) -> Tensor:
        """-grad f'(rho) = -r f''(r) grad log rho, like x."""
        density = self._given(density)
        if density.score is None:
            raise ValueError(f"the velocity of {type(self).__name__} needs the score, the gradient of log rho")
        return -self.slope(density.log).view(-1, *[1] * (x.dim() - 1)) * density.score

    def _given(self, density: Density | None) -> Density:
        if density is None:
            raise ValueError(
                f"{type(self).__name__} needs a density, which a cloud of particles does not have: give "
                "density=Density(log_rho), or descend it with a method that carries densities, such as jko_icnn"
            )
        return density


@FUNCTIONALS.register("entropy")
class Entropy(InternalEnergy):
    """Ent(rho) = int rho log rho = E log rho; its flow is the heat equation d rho / dt = Laplacian rho.

    After a map T it is Ent(rho) - E log det DT: the multiplier of the derivative is 1.
    """

    only_log_det_gradient = True

    def per_particle(self, log_density: Tensor) -> Tensor:
        return log_density

    def slope(self, log_density: Tensor) -> Tensor:
        return torch.ones_like(log_density)


@FUNCTIONALS.register("power_entropy")
class PowerEntropy(InternalEnergy):
    """F(rho) = int rho^m / (m - 1), m > 1; its flow is the porous medium equation d rho / dt = Laplacian rho^m.

    The multiplier of d log det is f'(r) - f(r) / r = r^{m-1}.
    """

    class Config(Settings):
        m: float = Field(2.0, gt=1)

    def per_particle(self, log_density: Tensor) -> Tensor:
        m = self.config.m
        return ((m - 1) * log_density).exp() / (m - 1)

    def slope(self, log_density: Tensor) -> Tensor:
        m = self.config.m
        return m * ((m - 1) * log_density).exp()


@FUNCTIONALS.register("kl")
class KL(Sum):
    """KL(rho | pi) = Ent(rho) - E log pi, a sum of an entropy and a potential energy; zero exactly at pi.

    target: whatever has ``log_density(x)``, (n, *event) -> (n,). Where that is not normalised, KL is off by a constant.
    Its flow is the Fokker-Planck equation with the stationary law pi.
    """

    takes: ClassVar = "density"

    def __init__(self, target: Any, config: Settings | None = None):
        if not callable(getattr(target, "log_density", None)):
            raise ValueError(
                f"KL takes a target with log_density(x), (n, *event) -> (n,); found a {type(target).__name__}. Of a "
                "potential V write PotentialEnergy(V) + Entropy(), for samples alone take SinkhornDivergence or MMD"
            )
        super().__init__([(1.0, Entropy()), (1.0, PotentialEnergy(lambda x: -target.log_density(x)))])
        self.config = config or self.Config()
        self.target = target
