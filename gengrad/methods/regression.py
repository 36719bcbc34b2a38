"""Velocity-field matching: what all methods share that regress a network on the velocities of points on their way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from gengrad.data.draws import generator_for
from gengrad.methods.base import Problem
from gengrad.ot import principal_components

LabelDropout = Annotated[float, Field(ge=0, lt=1)]
OTDims = Annotated[int, Field(ge=1)] | None


@dataclass(frozen=True)
class Examples:
    """Rows to learn from: velocity ``v`` (n, *event) at position ``x`` and time ``t`` (n,), of class ``y`` (n,)."""

    x: Tensor
    t: Tensor
    v: Tensor
    y: Tensor | None = None

    def to(self, device: torch.device) -> Examples:
        y = None if self.y is None else self.y.to(device)
        return Examples(self.x.to(device), self.t.to(device), self.v.to(device), y)

    def __add__(self, other: Examples) -> Examples:
        y = None if self.y is None else torch.cat([self.y, other.y])
        pairs = ((self.x, other.x), (self.t, other.t), (self.v, other.v))
        return Examples(*(torch.cat(pair) for pair in pairs), y)


def matching_loss(network: nn.Module, e: Examples) -> Tensor:
    """mean |u(x, t, y) - v|^2 over rows and coordinates, a scalar."""
    prediction = network(e.x, e.t) if e.y is None else network(e.x, e.t, e.y)
    return (prediction - e.v).square().mean()


def forget_labels(e: Examples, share: float, classes: int, generator: torch.Generator, rows: slice, n: int) -> Examples:
    """``e`` with a ``share`` of its labels replaced by ``classes``, the label of no class (Ho and Salimans 2022).

    A network trained so also knows the velocity without a class, which guidance needs. ``e`` holds ``rows`` of a
    batch of ``n``, for which the draws are made, so that they do not depend on how the batch is shared out.
    """
    if e.y is None or share == 0:
        return e
    forgotten = (torch.rand(n, generator=generator) < share)[rows].to(e.y.device)
    return replace(e, y=torch.where(forgotten, classes, e.y))


def classes_in(y: Tensor | None, n: int) -> list[Tensor]:
    """The row numbers of each class; one list of all ``n`` rows where there are no labels. Couplings stay within."""
    return [torch.arange(n)] if y is None else [(y == c).nonzero().squeeze(1) for c in y.unique()]


class PlanView:
    """What a coupling sees of points (n, *event): their first ``dims`` principal components, or all of them for None.

    The components are those of 4,096 points of the target, drawn for the purpose: a function of the seed.
    """

    def __init__(self, problem: Problem, dims: int | None):
        self.basis: Tensor | None = None
        if dims is not None:
            generator = generator_for(problem.seed, "train/components")
            points = problem.target.sample(4096, generator).flatten(1)
            self.basis = principal_components(points, dims, generator)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, dims), or (n, d) for all of them."""
        x = x.flatten(1)
        if self.basis is None:
            return x
        self.basis = self.basis.to(x)
        return x @ self.basis


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """n times in [0, 1), one in each of n equal strata, shuffled: uniform like independent draws, less noisy."""
    t = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return t[torch.randperm(n, generator=generator)]
