"""The Fokker-Planck equation on the line, solved on a grid: the truth where there is no closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

CELLS = 1200


class GridLaw:
    """A density on the line by its values at the centres of equal cells."""

    def __init__(self, centres: Tensor, density: Tensor):
        self.centres, self.density = centres, density / (density.sum() * (centres[1] - centres[0]))

    def log_density(self, x: Tensor) -> Tensor:
        """Linear in the logarithm between centres, (n, 1) -> (n,)."""
        logs = self.density.clamp_min(1e-300).log()
        width = self.centres[1] - self.centres[0]
        position = ((x[:, 0].double() - self.centres[0]) / width).clamp(0, CELLS - 1.000001)
        k = position.long()
        return logs[k] + (position - k) * (logs[k + 1] - logs[k])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws (n, 1): a cell by its mass, and a uniform place in it."""
        k = torch.multinomial(self.density, n, replacement=True, generator=generator)
        width = self.centres[1] - self.centres[0]
        return (self.centres[k] + (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5) * width)[:, None]


@dataclass
class GridTruth:
    """rho_t = (rho V')' + temperature rho'' between observations, each of which multiplies rho by its likelihood.

    Finite volumes with the fluxes of Scharfetter and Gummel (Chang and Cooper 1970): mass is conserved and
    exp(-V / temperature) stays where it is, on any grid. The generator is symmetric after scaling by the square root
    of that law, so that its exponential is exact in time.
    """

    potential: Callable[[Tensor], Tensor]
    temperature: float
    log_source: Callable[[Tensor], Tensor]
    low: float
    high: float
    tau: float
    observations: tuple = ()  # (step before which it comes, value)
    noise: float = 1.0
    _densities: list = field(default_factory=list)

    def __post_init__(self):
        width = (self.high - self.low) / CELLS
        self.centres = self.low + width * (torch.arange(CELLS, dtype=torch.float64) + 0.5)
        v = self.potential(self.centres[:, None]).double() / self.temperature
        root = (-(v - v.min()) / 2).exp().clamp_min(1e-150)  # of the stationary law
        # rate from cell i to i + 1 is temperature / h^2 exp(-(v_{i+1} - v_i) / 2): balanced by the stationary law
        rate = self.temperature / width**2
        up = rate * (-(v[1:] - v[:-1]) / 2).exp()
        down = rate * ((v[1:] - v[:-1]) / 2).exp()
        out = torch.cat([up, up.new_zeros(1)]) + torch.cat([down.new_zeros(1), down])
        # after the scaling both off-diagonals are the rate itself
        values, vectors = eigh_tridiagonal(-out.numpy(), np.full(CELLS - 1, rate))
        self._vectors, self._root = torch.from_numpy(vectors), root
        self._decay = (torch.from_numpy(values).clamp_max(0.0) * self.tau).exp()

    def law(self, k: int, kind: str = "exact") -> GridLaw:
        """The law at time k tau, before an observation of that time."""
        if not self._densities:
            self._densities = [self.log_source(self.centres[:, None]).exp()]
        while len(self._densities) <= k:
            density = self._observed(self._densities[-1], len(self._densities) - 1)
            density = self._root * (self._vectors @ (self._decay * (self._vectors.mT @ (density / self._root))))
            self._densities.append(density.clamp_min(0.0))
        return GridLaw(self.centres, self._densities[k])

    def _observed(self, density: Tensor, k: int) -> Tensor:
        for step, value in self.observations:
            if step == k:
                density = density * (-(self.centres - value).square() / (2 * self.noise**2)).exp()
        return density / density.sum()

    def symmetric_kl(self, k: int, log_density: Callable[[Tensor], Tensor]) -> float:
        """int (rho - rho_k) (log rho - log rho_k) on the grid, where either has mass."""
        law = self.law(k)
        truth = law.density
        seen = truth > 1e-12 * truth.max()
        mine = log_density(self.centres[seen][:, None])
        width = float(self.centres[1] - self.centres[0])
        return float(((mine.exp() - truth[seen]) * (mine - truth[seen].log())).sum() * width)

    def energy(self, k: int) -> float:
        """E V + temperature E log rho."""
        law = self.law(k)
        width = float(self.centres[1] - self.centres[0])
        v = self.potential(self.centres[:, None]).double()
        logs = law.density.clamp_min(1e-300).log()
        return float((law.density * (v + self.temperature * logs)).sum() * width)


def window(
    log_source: Callable[[Tensor], Tensor], potential: Callable[[Tensor], Tensor], temperature: float
) -> tuple[float, float]:
    """(low, high) beyond which neither the source nor exp(-V / temperature) has mass, within [-1000, 1000]."""
    grid = torch.linspace(-1000, 1000, 400_001, dtype=torch.float64)[:, None]
    seen = torch.zeros(len(grid), dtype=torch.bool)
    for log_density in (log_source(grid), -potential(grid) / temperature):
        log_density = torch.nan_to_num(log_density.double(), neginf=-math.inf)
        seen |= log_density > log_density.max() - 40
    return float(grid[seen].min()), float(grid[seen].max())
