"""MMD with Riesz kernels: the attraction of a target and the repulsion of particles, and its one-sided derivative."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from gengrad.functionals.base import Functional, VelocityField, samples_of
from gengrad.ot.riesz import Route, kernel_mean, riesz_sums
from gengrad.registry import FUNCTIONALS, Settings


@FUNCTIONALS.register("riesz_mmd")
class RieszMMD(Functional):
    """F(mu) = E|x - y|^r - E|x - x'|^r / 2 - E|y - y'|^r / 2: half the squared MMD of the kernel -|x - y|^r, 0 < r < 2.

    Without a ``target`` only the interaction energy -E|x - x'|^r / 2 is left. V-statistics: the pairs x = x' count,
    with distance 0, so duplicating particles changes nothing. Its velocity is

        v_i = r mean_k |x_i - x_k|^(r-2) (x_i - x_k) - r mean_j |x_i - y_j|^(r-2) (x_i - y_j),

    coincident pairs giving 0, exact in tiles or by a sort, or sliced (``gengrad.ot.riesz_sums``; values are always
    exact). Source: Altekrueger, Hertrich, Steidl, arXiv 2301.11624. target: (m, *event) samples. Memory: the clouds.
    """

    alone = True  # the interaction energy

    class Config(Settings):
        r: float = Field(1.0, gt=0, lt=2)
        route: Route = "auto"
        directions: int = Field(256, ge=1)  # of the route "slices"

    def __init__(self, target: Tensor | None = None, config: Settings | None = None, **settings):
        super().__init__(config, **settings)
        if target is not None and not len(target):
            raise ValueError("the target has no points; leave it out for the interaction energy alone")
        self.target = None if target is None else samples_of(target, self)

    @cached_property
    def _target_term(self) -> Tensor:
        return kernel_mean(self.target, self.target, self.config.r) / 2  # constant in x: computed once

    def value(self, x: Tensor) -> Tensor:
        x, r = x.flatten(1), self.config.r
        repulsion = kernel_mean(x, x, r) / 2
        if self.target is None:
            return -repulsion
        return kernel_mean(x, self.target.to(x), r) - repulsion - self._target_term.to(x)

    def of_draws(self, x: Tensor) -> Tensor:
        """F up to the target's constant, without bias: the mean over pairs i != k, n / (n - 1) times that over all."""
        x, r = x.flatten(1), self.config.r
        _at_least_two(x)
        repulsion = len(x) / (len(x) - 1) * kernel_mean(x, x, r) / 2
        return -repulsion if self.target is None else kernel_mean(x, self.target.to(x), r) - repulsion

    def velocity(self, x: Tensor, memory: dict | None = None) -> Tensor:
        flat = x.flatten(1)
        repulsion, attraction = self._gradients(flat, memory)
        return (repulsion - attraction).view_as(x)

    def field(self, x: Tensor) -> VelocityField:
        c, x, target = self.config, x.flatten(1), self.target

        def velocity(y: Tensor) -> Tensor:
            points = y.flatten(1)
            force = riesz_sums(points, x.to(y), c.r, potential=False).gradient
            if target is not None:
                force = force - riesz_sums(points, target.to(y), c.r, potential=False).gradient
            return force.view_as(y)

        return velocity

    def _gradients(self, x: Tensor, memory: dict | None = None) -> tuple[Tensor, Tensor]:
        """The gradients at x of mean_k |x - x_k|^r and of mean_j |x - y_j|^r (0 without a target)."""
        c = self.config
        options = {"route": c.route, "directions": c.directions, "potential": False}
        own = riesz_sums(x, x, c.r, **options)
        if memory is not None:
            memory["route"], memory["reason"] = own.route, own.reason
        if self.target is None:
            return own.gradient, torch.zeros_like(x)
        return own.gradient, riesz_sums(x, self.target.to(x), c.r, **options).gradient

    def directional_derivative(self, x: Tensor, v: Tensor, of_draws: bool = False) -> Tensor:
        """DF(v) = lim (F(x + h v) - F(x)) / h for h -> 0 from above, differentiable in v; x, v (n, *event).

        Pairs of different points: mean_ij r |x_i - y_j|^(r-2) <x_i - y_j, v_i> and
        mean_ik -r/2 |x_i - x_k|^(r-2) <x_i - x_k, v_i - v_k>. Pairs that coincide grow like h^r: with

            c = mean_ij [x_i = y_j] |v_i|^r - mean_ik [x_i = x_k] |v_i - v_k|^r / 2

        they add c for r = 1, nothing for r > 1, and make DF infinite with the sign of c for r < 1 (arXiv 2301.11624,
        section 4). Autograd at coincident points would give 0 or NaN. ``of_draws``: pairs i = k are left out.
        """
        x, v, r = x.flatten(1), v.flatten(1), self.config.r
        if of_draws:
            _at_least_two(x)
        unbias = len(x) / (len(x) - 1) if of_draws else 1.0
        repulsion, attraction = self._gradients(x)
        slope = ((attraction - unbias * repulsion) * v).sum(1).mean()
        if r > 1:
            return slope
        c = self._coincident(x, v, unbias)
        if r == 1:
            return slope + c
        return slope if c == 0 else torch.sign(c) * math.inf

    def _coincident(self, x: Tensor, v: Tensor, unbias: float) -> Tensor:
        """c of ``directional_derivative``; points coincide where they are equal in every digit."""
        n, r = len(x), self.config.r
        points = x if self.target is None else torch.cat([x, self.target.to(x)])
        place = torch.unique(points, dim=0, return_inverse=True)[1]
        here, count = place[:n], torch.bincount(place[:n])
        c = v.new_zeros(())
        for atom in (count > 1).nonzero().flatten().tolist():
            group = v[here == atom]
            c = c - unbias * (len(group) / n) ** 2 * kernel_mean(group, group, r) / 2
        if self.target is not None:
            share = torch.bincount(place[n:], minlength=int(place.max()) + 1)[here] / len(self.target)
            met = share > 0
            c = c + (share[met].to(v) * v[met].norm(dim=1).pow(r)).sum() / n
        return c


MMD = RieszMMD  # the only kernels here


def _at_least_two(x: Tensor) -> None:
    if len(x) < 2:
        raise ValueError("pairs of draws need at least two particles; raise the batch, or its share of each process")


@FUNCTIONALS.register("energy_distance")
class EnergyDistance(RieszMMD):
    """``RieszMMD`` with r = 1: E|x - y| - E|x - x'| / 2 - E|y - y'| / 2 (Szekely and Rizzo 2013)."""

    class Config(RieszMMD.Config):
        r: float = Field(1.0, ge=1, le=1)
