"""The families of initial densities: Gaussians, mixtures, products of these, boxes, annuli, Barenblatt profiles."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gengrad.data.even_clouds import lattice, settled
from gengrad.data.families import EDGE, Family, Members, direction, log_ball, rotations
from gengrad.data.moments import moved_to
from gengrad.registry import FAMILIES

MOST = 200  # steps to a quantile; with wide brackets and narrow components about 50 are halvings


class GaussianMembers(Members):
    """sum_c w_c N(m_c, L_c L_c'): means (count, c, d), lower factors L (count, c, d, d), weights (count, c)."""

    spare = 1  # says which component, for ``push_wide``
    smooth = True

    def __init__(self, means: Tensor, factors: Tensor, weights: Tensor):
        self.means, self.factors, self.weights = means, factors, weights

    def made(self, how: str, u: Tensor, which: Tensor) -> Tensor:
        return getattr(GaussianMembers(self.means[which], self.factors[which], self.weights[which]), how)(u[which])

    def push(self, u: Tensor) -> Tensor:
        """The Knothe-Rosenblatt rearrangement: each coordinate by the quantile of its law given those before it.

        It is smooth and monotone in each coordinate, so that evenly spread u are evenly spread over the mixture;
        points told apart by a coordinate that says which component are not.
        """
        x, logs = [], self.weights.log()[:, None].expand(-1, u.shape[1], -1)  # of the components, given x so far
        z = u.new_zeros(*u.shape[:2], self.means.shape[1], 0)  # their own white coordinates of x so far
        for k in range(u.shape[-1] - self.spare):
            stds = self.factors[:, None, :, k, k]
            centres = self.means[:, None, :, k] + (self.factors[:, None, :, k, :k] * z).sum(-1)
            x.append(mixture_quantile(u[..., k].clamp(EDGE, 1 - EDGE), centres, stds, torch.softmax(logs, -1)))
            white = (x[-1][..., None] - centres) / stds
            z, logs = torch.cat([z, white[..., None]], -1), logs - white.square() / 2 - stds.log()
        return torch.stack(x, -1)

    def cloud(self, u: Tensor, within: Tensor | float = 0.5) -> Tensor:
        x = self.push(lattice(u, u.shape[-1] - self.spare, within))
        return moved_to(settled(x, self.log_density, self._smoothed), *self.moments())

    def net(self, u: Tensor) -> Tensor:
        return moved_to(super().net(u), *self.moments())

    def _smoothed(self, h: Tensor) -> Callable[[Tensor], Tensor]:
        """The log density after a convolution with N(0, h^2 I), h (count, 1, 1)."""
        wider = h[..., None].square() * torch.eye(self.means.shape[-1], dtype=h.dtype, device=h.device)
        factors = torch.linalg.cholesky(self.factors @ self.factors.mT + wider)
        return GaussianMembers(self.means, factors, self.weights).log_density

    def moments(self) -> tuple[Tensor, Tensor]:
        w = self.weights[..., None]
        mean = (w * self.means).sum(1)
        away = self.means - mean[:, None]
        within = self.factors @ self.factors.mT + away[..., :, None] * away[..., None, :]
        return mean, (w[..., None] * within).sum(1)

    def push_wide(self, u: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """z from N(0, factor^2) in each component, with the ratio of N(0, 1) to that as its weight."""
        z = factor * math.sqrt(2) * torch.erfinv(2 * u[..., :-1].clamp(EDGE, 1 - EDGE) - 1)
        weight = factor ** z.shape[-1] * (-(1 - factor**-2) / 2 * z.square().sum(-1)).exp()
        bounds = self.weights.cumsum(1)[:, :-1].contiguous()
        component = torch.searchsorted(bounds, u[..., -1].contiguous())
        means = torch.take_along_dim(self.means, component[..., None], 1)
        factors = torch.take_along_dim(self.factors, component[..., None, None], 1)
        return means + (factors @ z[..., None])[..., 0], weight

    def log_density(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        away = x[:, :, None] - self.means[:, None]  # (count, n, c, d)
        white = torch.linalg.solve_triangular(self.factors, away.permute(0, 2, 3, 1), upper=False)
        volume = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        logs = self.weights.log() - volume - d / 2 * math.log(2 * math.pi)
        return torch.logsumexp(logs[..., None] - white.square().sum(2) / 2, 1)


def mixture_quantile(u: Tensor, means: Tensor, stds: Tensor, weights: Tensor) -> Tensor:
    """x (...) with sum_c w_c Phi((x - m_c) / s_c) = u (...), 0 < u < 1; the components' (..., c).

    x lies between the components' own quantiles. Newton's method within that bracket; where it would leave it, or a
    step is not shorter than half of the last one (narrow components make it cycle), the bracket is halved. Raises
    ``RuntimeError`` where that does not end.
    """
    ends = means + stds * torch.special.ndtri(u)[..., None]
    low, high = ends.amin(-1), ends.amax(-1)
    x, last = (weights * ends).sum(-1).clamp(low, high), high - low
    for _ in range(MOST):
        z = (x[..., None] - means) / stds
        excess = (weights * torch.special.ndtr(z)).sum(-1) - u
        low, high = torch.where(excess <= 0, x, low), torch.where(excess >= 0, x, high)
        if bool(((excess.abs() < 1e-13) | (high - low <= 1e-15 * (1 + x.abs()))).all()):
            return x
        slope = (weights / stds * (-z.square() / 2).exp()).sum(-1) / math.sqrt(2 * math.pi)
        step = excess / slope.clamp_min(1e-300)
        good = (x - step > low) & (x - step < high) & (step.abs() < last / 2)
        after = torch.where(good, x - step, (low + high) / 2)
        x, last = after, (after - x).abs()
    raise RuntimeError(f"a quantile of a mixture was not found in {MOST} steps")


@FAMILIES.register("gaussians")
class Gaussians(Family):
    """N(m, S), S with standard deviations from ``smallest`` to ``largest`` in directions drawn evenly."""

    def members(self, count: int, dimension: int, generator: torch.Generator) -> GaussianMembers:
        centres = self._centres(count, 1, dimension, generator=generator)
        factors = self._oblong(count, 1, dimension, generator)
        return GaussianMembers(centres, factors, torch.ones(count, 1, dtype=torch.float64))


@FAMILIES.register("mixtures")
class Mixtures(Family):
    """Two to ``components`` Gaussians, each with a centre, a size and a weight (0.5 to 1.5 before sharing).

    They are round; ``oblong`` ones have a size for each direction, as ``gaussians`` have.
    """

    class Config(Family.Config):
        components: int = Field(3, ge=2)
        oblong: bool = False

    def members(self, count: int, dimension: int, generator: torch.Generator) -> GaussianMembers:
        most = self.config.components
        centres = self._centres(count, most, dimension, generator=generator)
        if self.config.oblong:
            factors = self._oblong(count, most, dimension, generator)
        else:
            stds = self._sizes(count, most, 1, 1, generator=generator)
            factors = stds * torch.eye(dimension, dtype=torch.float64)
        weights = 0.5 + torch.rand(count, most, generator=generator, dtype=torch.float64)
        present = torch.randint(2, most + 1, (count, 1), generator=generator) > torch.arange(most)
        weights = weights * present
        return GaussianMembers(centres, factors, weights / weights.sum(1, keepdim=True))


class ProductMembers(GaussianMembers):
    """Independent coordinates x . axes_k, of the laws ``marginals`` on the line; ``axes`` (d, d) orthonormal rows."""

    def __init__(self, marginals: list[GaussianMembers], axes: Tensor):
        self.marginals, self.axes = marginals, axes
        each = torch.cartesian_prod(*(torch.arange(law.weights.shape[1]) for law in marginals)).view(-1, len(axes))
        means, stds, weights = (
            torch.stack([values[:, column] for values, column in zip(one, each.T)], -1)
            for one in (
                [law.means[..., 0] for law in marginals],
                [law.factors[..., 0, 0] for law in marginals],
                [law.weights for law in marginals],
            )
        )
        factors = torch.linalg.cholesky((axes.mT * stds[..., None, :].square()) @ axes)
        super().__init__(means @ axes, factors, weights.prod(-1))


@FAMILIES.register("products")
class Products(Family):
    """Coordinates independent of each other, each with a law of ``mixtures`` on the line; d <= 3.

    ``axes``: the directions of these coordinates, orthonormal rows; none: those of space. Where a functional is a sum
    over the same coordinates (an entropy, a potential), its JKO step moves each by itself.
    """

    class Config(Family.Config):
        components: int = Field(3, ge=2, le=16)  # of each coordinate: so many to the power of d in all
        axes: list[list[float]] | None = Field(None, min_length=1)

        @model_validator(mode="after")
        def _orthonormal(self):
            if self.axes is None:
                return self
            if len({len(row) for row in self.axes} | {len(self.axes)}) > 1:
                raise ValueError("axes: as many rows as columns, the directions of independent coordinates")
            rows = torch.tensor(self.axes, dtype=torch.float64)
            if not torch.allclose(rows @ rows.mT, torch.eye(len(rows), dtype=torch.float64), atol=1e-6):
                raise ValueError("axes: rows of length 1 at right angles to each other")
            return self

    def members(self, count: int, dimension: int, generator: torch.Generator) -> ProductMembers:
        if dimension > 3:
            raise ValueError(f"family {self.name!r} is for d <= 3; these points have d = {dimension}")
        axes = torch.tensor(self.config.axes or torch.eye(dimension).tolist(), dtype=torch.float64)
        if len(axes) != dimension:
            raise ValueError(f"family {self.name!r}: {len(axes)} axes for points of d = {dimension}")
        law = Mixtures(**self.config.model_dump(exclude={"axes"}))
        return ProductMembers([law.members(count, 1, generator) for _ in range(dimension)], axes)


class PlacedMembers(Members):
    """x = centre + R (size * y), y from ``_unit`` and R a rotation; y has the log density ``_unit_log_density``."""

    def __init__(self, centres: Tensor, sizes: Tensor, turn: Tensor):
        self.centres, self.sizes, self.turn = centres, sizes, turn  # (count, d), (count, d), (count, d, d)

    def push(self, u: Tensor) -> Tensor:
        return self.centres[:, None] + (self.sizes[:, None] * self._unit(u)) @ self.turn.mT

    def log_density(self, x: Tensor) -> Tensor:
        y = (x - self.centres[:, None]) @ self.turn / self.sizes[:, None]
        return self._unit_log_density(y) - self.sizes.log().sum(1)[:, None]

    @abstractmethod
    def _unit(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def _unit_log_density(self, y: Tensor) -> Tensor: ...


class BoxMembers(PlacedMembers):
    def _unit(self, u: Tensor) -> Tensor:
        return 2 * u - 1

    def _unit_log_density(self, y: Tensor) -> Tensor:
        # a point on the edge may be rounded out of it
        inside = y.abs().amax(-1) <= 1 + EDGE
        return torch.where(inside, -y.shape[-1] * math.log(2), -math.inf)


@FAMILIES.register("boxes")
class Boxes(Family):
    """Uniform on boxes with half sides from ``smallest`` to ``largest``, turned at random."""

    def members(self, count: int, dimension: int, generator: torch.Generator) -> BoxMembers:
        centres, sizes = (f(count, dimension, generator=generator) for f in (self._centres, self._sizes))
        return BoxMembers(centres, sizes, rotations(count, dimension, generator))


class AnnulusMembers(PlacedMembers):
    """Uniform between the radii ``inner`` and 1: |y|^d is uniform between inner^d and 1."""

    def __init__(self, centres: Tensor, sizes: Tensor, inner: Tensor):
        super().__init__(centres, sizes.expand_as(centres), torch.eye(centres.shape[1], dtype=centres.dtype))
        self.inner = inner  # (count, 1)

    def _unit(self, u: Tensor) -> Tensor:
        d, least = u.shape[-1], self.inner ** u.shape[-1]
        if d == 1:  # one coordinate tells both the side and the radius
            side = torch.where(u < 0.5, -1.0, 1.0)
            share = (2 * u) % 1.0
            return side * (self.inner[..., None] + (1 - self.inner[..., None]) * share)
        radius = (least + (1 - least) * u[..., 0]) ** (1 / d)
        return radius[..., None] * direction(u[..., 1:])

    def _unit_log_density(self, y: Tensor) -> Tensor:
        d, radius = y.shape[-1], y.norm(dim=-1)
        inside = (radius >= self.inner - EDGE) & (radius <= 1 + EDGE)
        return torch.where(inside, -(log_ball(d) + torch.log1p(-(self.inner**d))), -math.inf)


@FAMILIES.register("annuli")
class Annuli(Family):
    """Uniform between two concentric spheres: outer radii from ``smallest`` to ``largest``, inner 0.3 to 0.7 of it.

    On the line two intervals, in space a shell; d <= 3.
    """

    def members(self, count: int, dimension: int, generator: torch.Generator) -> AnnulusMembers:
        centres, sizes = self._balls(count, dimension, generator)
        inner = 0.3 + 0.4 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        return AnnulusMembers(centres, sizes, inner)


class BarenblattMembers(PlacedMembers):
    """(1 - |y|^2)^p on the unit ball, p = 1 / (m - 1): |y|^2 is Beta(d/2, p + 1)."""

    def __init__(self, centres: Tensor, sizes: Tensor, m: float):
        super().__init__(centres, sizes.expand_as(centres), torch.eye(centres.shape[1], dtype=centres.dtype))
        self.m, self.p = m, 1 / (m - 1)

    def _unit(self, u: Tensor) -> Tensor:
        from scipy.special import betaincinv

        d = u.shape[-1]
        if d == 1:  # the law is symmetric: |2u - 1| is the share of mass nearer to the centre
            return torch.sign(u - 0.5) * torch.from_numpy(betaincinv(0.5, self.p + 1, (2 * u - 1).abs().numpy())).sqrt()
        squared = torch.from_numpy(betaincinv(d / 2, self.p + 1, u[..., 0].contiguous().numpy()))
        return squared.sqrt()[..., None] * direction(u[..., 1:])

    def _unit_log_density(self, y: Tensor) -> Tensor:
        d, p = y.shape[-1], self.p
        log_mass = log_ball(d) + math.lgamma(p + 1) + math.lgamma(1 + d / 2) - math.lgamma(p + 1 + d / 2)
        room = 1 - y.square().sum(-1)
        return torch.where(room > 0, p * room.clamp_min(1e-300).log() - log_mass, -math.inf)


@FAMILIES.register("barenblatts")
class Barenblatts(Family):
    """The profiles (1 - |x - c|^2 / R^2)^{1/(m-1)}, R from ``smallest`` to ``largest``; d <= 3."""

    class Config(Family.Config):
        m: float = Field(2.0, gt=1)

    def members(self, count: int, dimension: int, generator: torch.Generator) -> BarenblattMembers:
        centres, sizes = self._balls(count, dimension, generator)
        return BarenblattMembers(centres, sizes, self.config.m)
