"""Interaction energies: 1/2 E W(x - x') over pairs of particles."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gengrad.functionals.base import Functional, VelocityField
from gengrad.registry import FUNCTIONALS, Settings

BLOCK = 2**15  # pairs held at once
COINCIDENT = 1e-3  # share of pairs that may coincide by rounding, where W is singular


@FUNCTIONALS.register("interaction")
class InteractionEnergy(Functional):
    """F(mu) = 1/2 E W(x - x') with an even W, (..., d) -> (...), over all pairs.

    ``InteractionEnergy(W)`` takes any callable; without one it is W(z) = |z|^a / a - |z|^b / b with a = ``attraction``
    and b = ``repulsion``, the logarithm at 0 (the aggregation equation: Carrillo, Craig and Yao 2019). Where W is
    infinite at 0, ``singular``, no particle meets itself: the mean is over n (n - 1) pairs, and over those that do not
    coincide by rounding; where more than one in a thousand does, ``ValueError`` is raised. A callable W takes
    n x n x d numbers.
    """

    takes: ClassVar = "nothing"

    class Config(Settings):
        attraction: float = 2.0
        repulsion: float | None = 0.0  # none: there is none

        @model_validator(mode="after")
        def _attracts(self):
            if self.repulsion is not None and self.repulsion >= self.attraction:
                raise ValueError("repulsion must be below attraction, or the energy has no minimum")
            return self

    def __init__(
        self,
        W: Callable[[Tensor], Tensor] | None = None,
        config: Settings | None = None,
        *,
        singular: bool = False,
        **settings,
    ):
        super().__init__(config, **settings)
        c = self.config
        self.W = W
        powers = [power for power in (c.attraction, c.repulsion) if power is not None]
        self.singular = singular if W is not None else min(powers) <= 0

    def value(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        n = len(x)
        if self.W is None:
            total, pairs = _PowerPairs.apply(x, self.config, self.singular)
        else:
            z = x[:, None] - x[None]
            apart = z.detach().square().sum(-1) > 0 if self.singular else torch.ones_like(z[..., 0], dtype=torch.bool)
            pairs = apart.sum()
            total = torch.where(apart, self.W(torch.where(apart[..., None], z, 1.0)), 0.0).sum()
        pairs = int(pairs)
        # a particle and itself, and the pair that rounding brought together, are left out
        if self.singular and (n == 1 or n * (n - 1) - pairs > COINCIDENT * n * (n - 1)):
            raise ValueError(
                f"{(n * (n - 1) - pairs) // 2} pairs of {n} particles coincide, where this interaction is infinite; "
                "start from a source without atoms, take a smaller tau, or give two particles or more"
            )
        return total / (2 * pairs)

    def field(self, x: Tensor) -> VelocityField:
        """-mean_k grad W(y - x_k), over the particles that y does not coincide with where W is singular."""
        x = x.flatten(1)
        block = max(1, BLOCK // len(x))
        return lambda y: torch.cat([self._pull(rows, x.to(y)) for rows in y.flatten(1).split(block)]).view_as(y)

    def _pull(self, y: Tensor, x: Tensor) -> Tensor:
        z = y[:, None] - x[None]
        squared = z.square().sum(-1)
        together = squared == 0
        count = (~together).sum(1, keepdim=True) if self.singular else len(x)
        if self.W is None:
            inside = squared.masked_fill(together, 1.0)
            slope = _power(inside, self.config.attraction)[1]
            if self.config.repulsion is not None:
                slope = slope - _power(inside, self.config.repulsion)[1]
            gradient = slope.masked_fill(together, 0.0)[..., None] * z
        else:
            leaf = z.masked_fill(together[..., None], 1.0).requires_grad_(True)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(self.W(leaf).sum(), leaf)
            gradient = gradient.masked_fill(together[..., None], 0.0)
        return -gradient.sum(1) / count


class _PowerPairs(torch.autograd.Function):
    """sum_ij W(x_i - x_j) and the number of pairs, for W = |z|^a/a - |z|^b/b; the gradient is taken on the way.

    d/dx_i = 2 sum_j (|z_ij|^{a-2} - |z_ij|^{b-2}) z_ij, row block by row block, one coordinate at a time: no array
    is larger than a block, and no difference of near particles loses digits.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, config: Settings, singular: bool) -> tuple[Tensor, Tensor]:
        total, pairs, gradient = x.new_zeros(()), 0, torch.empty_like(x)
        block = max(1, BLOCK // len(x))
        for start in range(0, len(x), block):
            rows = x[start : start + block]
            z = [rows[:, None, c] - x[None, :, c] for c in range(x.shape[1])]
            squared = torch.stack([part.square() for part in z]).sum(0) if len(z) > 1 else z[0].square()
            together = squared == 0
            inside = squared.masked_fill(together, 1.0)
            value, slope = _power(inside, config.attraction)
            if config.repulsion is not None:
                less = _power(inside, config.repulsion)
                value, slope = value - less[0], slope - less[1]
            total += value.masked_fill(together, 0.0).sum()
            pairs += together.numel() - int(together.sum()) if singular else together.numel()
            slope = slope.masked_fill(together, 0.0)
            gradient[start : start + block] = torch.stack([2 * (slope * part).sum(1) for part in z], dim=1)
        ctx.save_for_backward(gradient)
        count = torch.tensor(pairs)
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, _: None) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def _power(squared: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """|z|^a / a (log |z| at a = 0) and |z|^{a-2}, from |z|^2 > 0."""
    if a == 0:
        return squared.log() / 2, 1 / squared
    if a == 2:
        return squared / 2, torch.ones_like(squared)
    if a == 4:
        return squared.square() / 4, squared
    slope = squared ** (a / 2 - 1)
    return squared * slope / a, slope
