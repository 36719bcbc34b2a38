"""Fixed-step solvers of dx/dt = v(x, t), each a free function of one step.

``nfe`` is the budget: a solver that evaluates the velocity k times a step makes nfe / k steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def euler(v: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """x + h v(x, t). First order, one evaluation."""
    return x + h * v(x, t)


def midpoint(v: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """x + h v(x + h/2 v(x, t), t + h/2). Second order, two evaluations."""
    return x + h * v(x + h / 2 * v(x, t), t + h / 2)


def heun(v: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """x + h (k1 + k2) / 2, k1 = v(x, t), k2 = v(x + h k1, t + h). Second order, two evaluations."""
    k1 = v(x, t)
    k2 = v(x + h * k1, t + h)
    return x + h * (k1 + k2) / 2


def rk4(v: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """The classical Runge-Kutta step. Fourth order, four evaluations."""
    k1 = v(x, t)
    k2 = v(x + h / 2 * k1, t + h / 2)
    k3 = v(x + h / 2 * k2, t + h / 2)
    k4 = v(x + h * k3, t + h)
    return x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}  # of the velocity, per step


def steps_for(solver: str, nfe: int) -> int:
    """Number of steps that spend ``nfe`` evaluations; raises ``ValueError`` when they do not divide evenly."""
    if nfe < 1:
        raise ValueError(f"nfe is the number of network evaluations per sample, at least 1; got {nfe}")
    steps, rest = divmod(nfe, EVALUATIONS[solver])
    if rest or not steps:
        each = EVALUATIONS[solver]
        raise ValueError(f"solver {solver!r} evaluates {each} times a step; nfe={nfe} is no multiple of {each}")
    return steps


def integrate(v: Velocity, x: Tensor, t0: float, t1: float, steps: int, solver: str) -> Iterator[Tensor]:
    """The states after each of ``steps`` equal steps from t0 to t1; x (batch, *event), t passed as (batch,)."""
    step = SOLVERS[solver]
    times = torch.linspace(t0, t1, steps + 1, dtype=torch.float64).tolist()
    for before, after in pairwise(times):
        x = step(v, x, torch.full((len(x),), before, device=x.device), torch.tensor(after - before, dtype=x.dtype))
        yield x
