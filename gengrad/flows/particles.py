"""The particle flow itself, without a network: what every learned flow is an approximation of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from gengrad.functionals.base import Functional


@dataclass(frozen=True)
class ParticleFlow:
    """States kept and velocities between them: ``states`` (kept + 1, n, *event), ``velocities`` (kept, n, *event).

    ``taus`` are the lengths in flow time between the states kept. ``values``, F where it was asked for, and ``logs``,
    what the functional said, are of every step, also of those whose states were not kept.
    """

    states: Tensor
    velocities: Tensor
    taus: tuple[float, ...]
    values: tuple[float, ...] = ()
    logs: tuple[dict[str, float], ...] = field(default=())


def geodesic_times(steps: int) -> list[float]:
    """Equal steps of the geodesic clock: t_k = k / steps, k = 0 .. steps.

    Where the velocity of the remaining flow is w = v / (1 - t), a step of the clock from t_k to t_{k+1} moves by
    eta_k v with eta_k = (t_{k+1} - t_k) / (1 - t_k); a constant eta gives t_k = 1 - (1 - eta)^k.
    """
    return [k / steps for k in range(steps + 1)]


def geodesic_taus(times: Sequence[float]) -> list[float]:
    """eta_k = (t_{k+1} - t_k) / (1 - t_k): the steps of a particle flow that make the clock show ``times``."""
    return [(after - before) / (1 - before) for before, after in pairwise(times)]


def particle_flow(
    functional: Functional | Callable[[int], Functional],
    x: Tensor,
    taus: Sequence[float],
    *,
    record_values: bool = False,
    momentum: float = 0.0,
    every: int = 1,
) -> ParticleFlow:
    """Explicit Euler on particles: X^{k+1} = X^k + tau_k v(X^k), v = ``functional.velocity`` = -n dF/dX.

    Source: algorithm 1 of arXiv 2401.14069, there with v of the Sinkhorn divergence.
    ``functional`` may also be a function of the step number, for a fresh target batch at each step. x: (n, *event).
    ``momentum`` m: U^{k+1} = m U^k + v(X^k), X^{k+1} = X^k + tau_k U^{k+1} (Polyak's heavy ball), no gradient flow any
    more, but at the same minimum after about 1 - m as many steps. ``every``: of so many steps the last state is kept,
    and the mean velocity; the number of steps is a multiple of it.
    Raises ``ValueError`` for a functional that needs a density, for a step that is not positive and finite, and for a
    momentum outside [0, 1). Solvers inside the functional are warm-started from the step before.
    """
    choose = functional if not isinstance(functional, Functional) else (lambda step: functional)
    if any(not 0 < tau < float("inf") for tau in taus):
        raise ValueError(f"the steps tau of a particle flow are positive and finite; got {list(taus)}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum:g} has to lie in [0, 1)")
    if every < 1 or len(taus) % every:
        raise ValueError(f"every={every}: the number of steps, {len(taus)}, has to be a multiple of it")
    states, velocities, values, logs, memory = [x], [], [], [], {}
    u = torch.zeros_like(x)
    for step, tau in enumerate(taus):
        current = choose(step)
        if current.needs_density:
            raise ValueError(
                f"{type(current).__name__} needs a density, which a cloud of particles does not have; "
                "descend it with a method that carries densities"
            )
        v = current.velocity(x, memory)
        if record_values:
            values.append(float(current(x)))
        logs.append(dict(memory.get("log", {})))
        u = momentum * u + v if momentum else v
        x = x + tau * u
        if (step + 1) % every == 0:
            length = sum(taus[step + 1 - every : step + 1])
            velocities.append(u if every == 1 else (x - states[-1]) / length)
            states.append(x)
    if record_values:
        values.append(float(choose(len(taus) - 1)(states[-1])))
    return ParticleFlow(
        states=torch.stack(states),
        velocities=torch.stack(velocities) if velocities else x.new_empty(0, *x.shape),
        taus=tuple(taus) if every == 1 else tuple(sum(taus[k : k + every]) for k in range(0, len(taus), every)),
        values=tuple(values),
        logs=tuple(logs),
    )
