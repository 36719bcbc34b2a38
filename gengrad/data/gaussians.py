"""Gaussians, their mixtures, and the plain noise that most flows start from: all with exact log densities."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from gengrad.data.base import LARGEST, Distribution
from gengrad.data.families import points_of_the_cube
from gengrad.data.family_members import GaussianMembers
from gengrad.registry import DATASETS, Settings

Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Vector = Annotated[list[Annotated[float, Field(ge=-LARGEST, le=LARGEST)]], Field(min_length=1)]
Matrix = list[list[float]]

# radius of a mode in its standard deviations: it holds 1 - exp(-9/2) = 98.9 % of its mass in two dimensions
MODE_STDS = 3.0


class Mixture:
    """The mixture sum_k w_k N(m_k, S_k), held as weights (k,), means (k, d) and covariances (k, d, d).

    Everything is computed in float64 and handed out as float32. Raises ``ValueError`` for a covariance that
    is not symmetric positive definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor):
        self.weights = weights.double() / weights.double().sum()
        self.means, self.covariances = means.double(), covariances.double()
        self.factors = torch.stack([cholesky(covariance) for covariance in self.covariances])
        self.whitenings = torch.linalg.inv(self.factors)

    @property
    def widest(self) -> float:
        """The largest standard deviation of any component in any direction."""
        return float(torch.linalg.eigvalsh(self.covariances).max().sqrt())

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` draws (n, d): a component by its weight, then m_k + L_k z with S_k = L_k L_k^T."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[component] + torch.einsum("nij,nj->ni", self.factors[component], z)).float()

    def even(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` points (n, d), float64, that stand for the mixture together: ``GaussianMembers.cloud``."""
        u = points_of_the_cube(1, n, self.means.shape[1] + GaussianMembers.spare, generator)
        return GaussianMembers(self.means[None], self.factors[None], self.weights[None]).cloud(u)[0]

    def log_density(self, x: Tensor) -> Tensor:
        """log sum_k w_k N(x; m_k, S_k), (n, d) -> (n,), differentiable in x."""
        means, whitenings, weights = (part.to(x) for part in (self.means, self.whitenings, self.weights))
        white = torch.einsum("kij,nkj->nki", whitenings, x[:, None, :] - means)  # L_k^{-1} (x - m_k)
        log_volume = -whitenings.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # log sqrt(det S_k)
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi)
        return torch.logsumexp(weights.log() - 0.5 * white.square().sum(-1) - log_volume - constant, dim=1)


def cholesky(covariance: Tensor) -> Tensor:
    """L with L L^T = ``covariance`` (d, d); ``ValueError`` unless symmetric and positive definite."""
    if not torch.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-12):
        worst = (covariance - covariance.T).abs().max().item()
        raise ValueError(f"the covariance is not symmetric: mirrored entries differ by {worst:.3g}")
    low, high = torch.linalg.eigvalsh(covariance)[[0, -1]].tolist()
    if not low > 1e-12 * high:  # below this the factor and the density are rounding errors
        raise ValueError(
            f"the covariance is not positive definite: its eigenvalues go from {low:.3g} to {high:.3g}; "
            "a density needs all of them above 0 (remove the direction without variance, or give it a little)"
        )
    return torch.linalg.cholesky(covariance)


def _square(rows: Matrix, dimension: int, what: str) -> Tensor:
    """``rows`` as a (d, d) float64 tensor, or ``ValueError``."""
    if len(rows) != dimension or any(len(row) != dimension for row in rows):
        lengths = sorted({len(row) for row in rows})
        raise ValueError(f"{what} must be {dimension} x {dimension}, not {len(rows)} rows of length {lengths}")
    return torch.tensor(rows, dtype=torch.float64)


@DATASETS.register("gaussian")
class Gaussian(Distribution):
    """The Gaussian N(m, S) on R^d."""

    class Config(Settings):
        mean: Vector = [0.0, 0.0]
        # rows of S; None: the identity
        covariance: Matrix | None = None

        @field_validator("covariance")
        @classmethod
        def _is_a_covariance(cls, covariance: Matrix | None, info: ValidationInfo) -> Matrix | None:
            if covariance is not None and "mean" in info.data:
                cholesky(_square(covariance, len(info.data["mean"]), "the covariance"))
            return covariance

    def prepare(self) -> None:
        d = len(self.config.mean)
        self.mean = torch.tensor(self.config.mean, dtype=torch.float64)
        self.covariance = torch.eye(d, dtype=torch.float64)
        if self.config.covariance is not None:
            self.covariance = _square(self.config.covariance, d, "covariance")
        self.event_shape = (d,)
        self._mixture = Mixture(torch.ones(1), self.mean[None], self.covariance[None])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self._mixture.sample(n, generator)

    def even(self, n: int, generator: torch.Generator) -> Tensor:
        return self._mixture.even(n, generator)

    def log_density(self, x: Tensor) -> Tensor:
        """-|L^{-1}(x - m)|^2 / 2 - log sqrt(det 2 pi S), (n, d) -> (n,)."""
        return self._mixture.log_density(x)

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.covariance


@DATASETS.register("gaussian_mixture")
class GaussianMixture(Distribution):
    """The mixture sum_k w_k N(m_k, S_k) on R^d, with S_k = s_k^2 I (``scales``) or any ``covariances``."""

    class Config(Settings):
        means: Annotated[list[Vector], Field(min_length=1)] = [[-2.0, 0.0], [2.0, 0.0]]
        # relative weights of the components, scaled to sum to one; None: equal
        weights: list[Positive] | None = None
        # standard deviation of each component; None, and no covariances: 0.5 each
        scales: list[Positive] | None = None
        covariances: list[Matrix] | None = None

        @field_validator("means")
        @classmethod
        def _one_dimension(cls, means: list[Vector]) -> list[Vector]:
            dimensions = sorted({len(mean) for mean in means})
            if len(dimensions) > 1:
                raise ValueError(f"all means need the same dimension; these have {dimensions}")
            return means

        @field_validator("weights", "scales", "covariances")
        @classmethod
        def _one_per_mean(cls, values: list | None, info: ValidationInfo) -> list | None:
            means = info.data.get("means")
            if values is not None and means is not None and len(values) != len(means):
                raise ValueError(f"{info.field_name} has {len(values)} entries for {len(means)} means")
            return values

        @field_validator("covariances")
        @classmethod
        def _are_covariances(cls, covariances: list[Matrix] | None, info: ValidationInfo) -> list[Matrix] | None:
            if covariances is None or "means" not in info.data:
                return covariances
            if info.data.get("scales") is not None:
                raise ValueError("give scales or covariances, not both")
            for k, rows in enumerate(covariances):
                cholesky(_square(rows, len(info.data["means"][0]), f"the covariance of component {k}"))
            return covariances

    def prepare(self) -> None:
        c = self.config
        k, d = len(c.means), len(c.means[0])
        scales = torch.tensor(c.scales or [0.5] * k, dtype=torch.float64)
        covariances = scales[:, None, None] ** 2 * torch.eye(d, dtype=torch.float64)
        if c.covariances is not None:
            covariances = torch.tensor(c.covariances, dtype=torch.float64)
        self.mixture = Mixture(torch.tensor(c.weights or [1.0] * k), torch.tensor(c.means), covariances)
        self.event_shape = (d,)
        self.modes, self.mode_weights = self.mixture.means.float(), self.mixture.weights.float()
        self.mode_radius = MODE_STDS * self.mixture.widest

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.mixture.sample(n, generator)

    def even(self, n: int, generator: torch.Generator) -> Tensor:
        return self.mixture.even(n, generator)

    def log_density(self, x: Tensor) -> Tensor:
        """log sum_k w_k N(x; m_k, S_k), (n, d) -> (n,)."""
        return self.mixture.log_density(x)


@DATASETS.register("normal")
class StandardNormal(Distribution):
    """Standard normal noise N(0, I) in the shape of the other end: points (d,) or images (c, h, w)."""

    takes_event_shape = True
    event_shape = (2,)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, *self.event_shape, generator=generator)

    def even(self, n: int, generator: torch.Generator) -> Tensor:
        mean, covariance = self.moments()
        return Mixture(torch.ones(1), mean[None], covariance[None]).even(n, generator)

    def log_density(self, x: Tensor) -> Tensor:
        """-|x|^2 / 2 - (d/2) log 2 pi, (n, *event) -> (n,)."""
        x = x.flatten(1)
        return -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    def moments(self) -> tuple[Tensor, Tensor]:
        d = math.prod(self.event_shape)
        return torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)


@DATASETS.register("uniform")
class Uniform(Distribution):
    """Uniform noise on the cube [-half_width, half_width]^d in the shape of the other end."""

    takes_event_shape = True
    event_shape = (2,)

    class Config(Settings):
        half_width: Positive = 1.0

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.config.half_width * (2 * torch.rand(n, *self.event_shape, generator=generator) - 1)

    def log_density(self, x: Tensor) -> Tensor:
        """-d log(2 half_width) inside the cube, minus infinity outside, (n, *event) -> (n,)."""
        x = x.flatten(1)
        inside = x.abs().amax(1) <= self.config.half_width
        value = -x.shape[1] * math.log(2 * self.config.half_width)
        return torch.where(inside, x.new_tensor(value), x.new_tensor(-math.inf))
