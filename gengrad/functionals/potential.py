"""Potential energies E V(x), of any callable V or of a potential with a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from gengrad.functionals.base import Functional, VelocityField
from gengrad.registry import FUNCTIONALS, POTENTIALS, Configured, Settings

Positive = Annotated[float, Field(gt=0)]


@FUNCTIONALS.register("potential")
class PotentialEnergy(Functional):
    """F(mu) = E V(x) for a potential V, (n, *event) -> (n,); its velocity is -grad V.

    ``PotentialEnergy(V)`` takes any differentiable callable; ``PotentialEnergy(potential={"name": "double_well"})``,
    the form of the YAML, one from the table of potentials. Raises ``ValueError`` where V gives another shape, or values
    that are not finite.
    """

    takes: ClassVar = "nothing"

    class Config(Settings):
        potential: dict | None = None

        @field_validator("potential", mode="before")
        @classmethod
        def _known(cls, given: object) -> dict | None:
            if given is None:
                return None
            given = {"name": given} if isinstance(given, str) else given
            if not isinstance(given, dict) or "name" not in given:
                raise ValueError(f"expected a potential's name, one of: {', '.join(POTENTIALS)}")
            rest = {key: value for key, value in given.items() if key != "name"}
            checked = POTENTIALS.get(given["name"]).Config(**rest)
            return {"name": given["name"], **checked.model_dump(mode="json")}

    def __init__(self, V: Callable[[Tensor], Tensor] | None = None, config: Settings | None = None, **settings):
        super().__init__(config, **settings)
        if (V is None) == (self.config.potential is None):
            raise ValueError(
                "a potential energy takes either a callable V or the name of a potential, "
                f"one of: {', '.join(POTENTIALS)}"
            )
        self.V = V or POTENTIALS.build(self.config.potential)

    def value(self, x: Tensor) -> Tensor:
        v = self.V(x)
        if not isinstance(v, Tensor) or v.shape != x.shape[:1]:
            found = f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"a {type(v).__name__}"
            raise ValueError(
                f"the potential gave {found} for points of shape {tuple(x.shape)}; it must give one number a point, "
                f"shape ({len(x)},): sum over the coordinates, e.g. x.square().sum(1)"
            )
        if not bool(v.isfinite().all()):
            row = int((~v.isfinite()).nonzero()[0])
            raise ValueError(
                f"the potential is {float(v[row].detach())} at the point {x[row].detach().flatten()[:8].tolist()} "
                f"({int((~v.isfinite()).sum())} of {len(x)} points); it must be finite wherever mass can go"
            )
        return v.mean()

    def field(self, x: Tensor) -> VelocityField:
        return self.velocity  # -grad V, whatever the other particles do


@POTENTIALS.register("quadratic")
class Quadratic(Configured):
    """V(x) = (x - b)'A(x - b) / 2, A symmetric positive definite.

    A: ``matrix`` (rows), or ``stiffness`` x I, or drawn from ``seed`` in ``dimension`` with eigenvalues spread evenly
    in the logarithm from 1 to ``condition`` in random directions; then b is drawn from N(0, I) as well.
    """

    class Config(Settings):
        stiffness: float = Field(1.0, gt=0)
        matrix: list[list[float]] | None = None
        centre: list[float] | None = None
        seed: int | None = Field(None, ge=0)
        dimension: int = Field(2, ge=1)
        condition: float = Field(2.0, ge=1)

    def __init__(self, config: Settings | None = None, **settings):
        super().__init__(config, **settings)
        c = self.config
        self.a, self.b = torch.tensor(c.stiffness, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        if c.seed is not None:
            self.a, self.b = random_spd(c.dimension, c.condition, c.seed)
        if c.matrix is not None:
            self.a = torch.tensor(c.matrix, dtype=torch.float64)
            if self.a.ndim != 2 or not torch.allclose(self.a, self.a.mT) or torch.linalg.eigvalsh(self.a)[0] <= 0:
                raise ValueError("potential 'quadratic': matrix must be symmetric and positive definite")
        if c.centre is not None:
            self.b = torch.tensor(c.centre, dtype=torch.float64)

        if len({len(self.b), *self.a.shape} - {1}) > 1:
            raise ValueError(f"potential 'quadratic': centre has {len(self.b)} entries, the matrix {len(self.a)} rows")

    def full(self, d: int) -> tuple[Tensor, Tensor]:
        """(A, b) as a (d, d) matrix and a (d,) vector in float64."""
        a = self.a if self.a.ndim == 2 else self.a * torch.eye(d, dtype=torch.float64)
        return a, self.b.expand(d).clone() if len(self.b) == 1 else self.b

    def __call__(self, x: Tensor) -> Tensor:
        x, a = x.flatten(1), self.a.to(x)
        if (d := max(len(self.b), *a.shape, 1)) > 1:  # a stiffness alone takes any
            _of_dimension(d, x, "quadratic", "seed with dimension, matrix, centre")
        y = x - self.b.to(x)
        return (y * (y @ a if a.ndim == 2 else a * y)).sum(1) / 2


def _of_dimension(d: int, x: Tensor, name: str, keys: str) -> None:
    """Raises ``ValueError`` where a potential of d coordinates meets points x (n, other than d)."""
    if x.shape[1] != d:
        raise ValueError(
            f"potential {name!r} is one of {d} coordinates, the points have {x.shape[1]}: its settings that say so "
            f"({keys}) must fit data and source"
        )


def random_spd(d: int, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """A (d, d) with eigenvalues from 1 to ``condition`` in random directions, and b (d,) from N(0, I)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    values = condition ** torch.linspace(0, 1, d, dtype=torch.float64) if d > 1 else torch.ones(1).double()
    return (q * values) @ q.mT, torch.randn(d, generator=generator, dtype=torch.float64)


@POTENTIALS.register("double_well")
class DoubleWell(Configured):
    """V(x) = height sum_i ((x_i / width)^2 - 1)^2: wells at +-width in every coordinate."""

    class Config(Settings):
        height: float = Field(1.0, gt=0)
        width: float = Field(1.0, gt=0)

    def __call__(self, x: Tensor) -> Tensor:
        return self.config.height * ((x.flatten(1) / self.config.width).square() - 1).square().sum(1)


@POTENTIALS.register("rippled")
class Rippled(Configured):
    """V(x) = sum_i sin(2 pi x_i) / pi + x_i^2 / 4: a bowl with wells a unit apart (arXiv 2106.00736, section 5.4)."""

    def __call__(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return (torch.sin(2 * torch.pi * x) / torch.pi + x.square() / 4).sum(1)


@POTENTIALS.register("gaussian_mixture")
class MixturePotential(Configured):
    """V(x) = -log sum_k w_k exp(-|x - m_k|^2 / (2 s_k^2)) s_k^{-d}: wells at the centres of a mixture."""

    class Config(Settings):
        means: Annotated[list[list[float]], Field(min_length=1)]
        weights: list[Positive] | None = None
        scales: list[Positive] | None = None

        @model_validator(mode="after")
        def _as_many_of_each(self):
            if len({len(mean) for mean in self.means}) > 1:
                raise ValueError("means: all of them must have the same number of coordinates")
            for key in ("weights", "scales"):
                if (given := getattr(self, key)) is not None and len(given) != len(self.means):
                    raise ValueError(f"{key}: {len(given)} of them for {len(self.means)} means")
            return self

    def __call__(self, x: Tensor) -> Tensor:
        c, x = self.config, x.flatten(1)
        _of_dimension(len(c.means[0]), x, "gaussian_mixture", "means")
        means = torch.tensor(c.means).to(x)
        w, s = (torch.tensor(given or [1.0] * len(means)).to(x) for given in (c.weights, c.scales))
        away = (x[:, None] - means).square().sum(-1) / (2 * s.square())
        return -torch.logsumexp((w / w.sum()).log() - away - x.shape[1] * s.log(), dim=1)
