"""What every functional promises, and the sums that ``a * F + b * G`` builds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gengrad.registry import Configured

VelocityField = Callable[[Tensor], Tensor]  # points (m, *event) -> velocities like them


@dataclass(frozen=True)
class Density:
    """The density at the particles: ``log`` rho (n,), and its gradient, the ``score`` (n, *event), where known."""

    log: Tensor
    score: Tensor | None = None


class Functional(Configured, ABC):
    """A functional F of a measure, evaluated on the empirical measure of particles x (n, *event).

    ``F(x)`` is a scalar; duplicating all particles leaves it unchanged. ``F.velocity(x)`` is minus the Wasserstein
    gradient at the particles: v_i = -n dF/dx_i. Functionals add and scale: ``0.5 * F + G``.

    Where ``needs_density`` is true, value and velocity also take the particles' ``density``. After a map T with
    y = T(x), log rho(y) = log rho(x) - log det DT(x): with that log density, the derivative of ``value`` in the map is
    the one of the change of variables, -E[(f'(r) - f(r)/r) d log det DT] for an internal energy.
    """

    needs_density = False  # true for entropies and their like, which no empirical measure has
    takes: ClassVar[Literal["nothing", "samples", "density"]] = "samples"  # of a target, as its first argument
    alone: ClassVar[bool] = False  # whether one that takes samples means something without any

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """F of the particles, a scalar tensor, differentiable in x."""

    def __call__(self, x: Tensor, density: Density | None = None) -> Tensor:
        return self.value(x, density) if self.needs_density else self.value(x)

    def of_draws(self, x: Tensor) -> Tensor:
        """F, up to a constant, estimated from independent draws x: a subclass with pairs leaves out the pairs i = k."""
        return self.value(x)

    def velocity(self, x: Tensor, memory: dict | None = None) -> Tensor:
        """v_i = -n dF/dx_i, like x, by autograd unless a subclass knows better.

        ``memory``: a dict that the caller keeps along one flow; a functional may warm-start from it and leaves its
        diagnosis of the evaluation under ``memory["log"]`` (name -> number).
        """
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.value(leaf), leaf)
        return -len(x) * gradient

    def field(self, x: Tensor) -> VelocityField:
        """y (m, *event) -> the velocity there, that the particles x cause: at y = x it is ``velocity(x)``.

        By itself that of one particle more, which is off by O(1 / n), one value and gradient for each row of y; a
        subclass with a formula knows better.
        """

        def velocity(y: Tensor) -> Tensor:
            rows = []
            for row in y.detach():
                leaf = row[None].requires_grad_(True)
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(self.value(torch.cat([x.to(y), leaf])), leaf)
                rows.append(-(len(x) + 1) * gradient)
            return torch.cat(rows)

        return velocity

    def __add__(self, other: Functional) -> Functional:
        if not isinstance(other, Functional):
            return NotImplemented
        return Sum([*terms_of(self), *terms_of(other)])

    def __mul__(self, factor: float) -> Functional:
        if not isinstance(factor, int | float):
            return NotImplemented
        return Sum([(float(factor) * weight, term) for weight, term in terms_of(self)])

    __rmul__ = __mul__

    def __neg__(self) -> Functional:
        return -1.0 * self

    def __sub__(self, other: Functional) -> Functional:
        return self + -other if isinstance(other, Functional) else NotImplemented

    def __radd__(self, other: object) -> Functional:
        return self if other == 0 else NotImplemented  # so that sum([F, G]) works


class Sum(Functional):
    """F(x) = sum_k w_k F_k(x) with the velocities summed likewise; what ``a * F + b * G`` returns."""

    takes = "nothing"

    def __init__(self, terms: list[tuple[float, Functional]]):
        super().__init__()
        self.terms = terms
        self.needs_density = any(term.needs_density for _, term in terms)

    def value(self, x: Tensor, density: Density | None = None) -> Tensor:
        return torch.stack([weight * term(x, density) for weight, term in self.terms]).sum()

    def of_draws(self, x: Tensor) -> Tensor:
        return torch.stack([weight * term.of_draws(x) for weight, term in self.terms]).sum()

    def velocity(self, x: Tensor, memory: dict | None = None, density: Density | None = None) -> Tensor:
        memory = {} if memory is None else memory
        if len(memory.get("terms", ())) != len(self.terms):  # the first step, or another sum than before
            memory["terms"] = [{} for _ in self.terms]
        parts = memory["terms"]
        total = sum(w * velocity_of(term, x, part, density) for (w, term), part in zip(self.terms, parts))
        memory["log"] = {key: value for part in parts for key, value in part.get("log", {}).items()}
        return total

    def field(self, x: Tensor) -> VelocityField:
        fields = [(weight, term.field(x)) for weight, term in self.terms]
        return lambda y: sum(weight * velocity(y) for weight, velocity in fields)


def velocity_of(functional: Functional, x: Tensor, memory: dict | None, density: Density | None) -> Tensor:
    """The functional's velocity, with the density for those that need it."""
    if functional.needs_density:
        return functional.velocity(x, memory, density)
    return functional.velocity(x, memory)


def samples_of(target: object, functional: Functional) -> Tensor:
    """The ``target`` of a functional of samples as (m, d); raises ``ValueError`` for what is none."""
    if not isinstance(target, Tensor) or target.ndim < 2 or not len(target):
        found = (
            f"a tensor of shape {tuple(target.shape)}" if isinstance(target, Tensor) else f"a {type(target).__name__}"
        )
        raise ValueError(
            f"{type(functional).__name__} takes samples of the target, a tensor (m, *event) of one or more; found "
            f"{found}. Draw them from a data set with data.sample(m, generator)"
        )
    return target.flatten(1)


def terms_of(functional: Functional) -> list[tuple[float, Functional]]:
    """[(weight, term), ...] of a sum, and of one term alone."""
    return functional.terms if isinstance(functional, Sum) else [(1.0, functional)]
