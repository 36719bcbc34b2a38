"""Where exact implicit steps bring points: on the line, coordinate by coordinate, and of a cloud by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gengrad.data.families import Members
from gengrad.data.family_members import ProductMembers
from gengrad.flows.cloud_step import implicit_cloud_step
from gengrad.flows.line import Line, carried, implicit_step
from gengrad.functionals.base import Functional, Sum, terms_of
from gengrad.functionals.internal import Entropy
from gengrad.functionals.potential import PotentialEnergy

State = tuple[Tensor, Tensor | None]  # points (n, d) and log rho (n,) at them, where the energy needs it
Reference = Callable[[int], State]  # step -> the state that exact implicit steps lead to, from the same points


def on_the_line(
    functional: Functional, tau: float, log_density: Callable[[Tensor], Tensor], x: Tensor, log_rho: Tensor
) -> Reference:
    """The reference by the solver on the line, each step solved when it is first asked for."""
    reach = 2 * float(x.abs().max()) + 1
    lines = [Line.of(log_density, -reach, reach)]

    def state(k: int) -> State:
        while len(lines) <= k:
            lines.append(implicit_step(functional, lines[-1], tau))
        return carried(lines[0], lines[k], x, log_rho)

    return state


def of_coordinates(
    functional: Functional, tau: float, members: ProductMembers, x: Tensor, log_rho: Tensor
) -> Reference:
    """The reference for independent coordinates under F = sum_k F_k: the steps of each on the line.

    Of such a kind are the entropy, for log rho is a sum, and potentials V(x) = sum_k V_k(x . axes_k), which is looked
    at on the points x. Raises ``ValueError`` for other functionals.
    """
    axes, each = members.axes, []
    if not _is_sum_along(functional, axes, x):
        raise ValueError("no reference is known here: the functional is no sum over the independent coordinates")
    y = x.double() @ axes.mT
    for k, law in enumerate(members.marginals):
        density, at = partial(of_one_member, law), y[:, k, None]
        each.append(on_the_line(_along(functional, axes[k]), tau, density, at, density(at)))

    def state(k: int) -> State:
        states, starts = [line(k) for line in each], [line(0) for line in each]
        moved = torch.cat([points for points, _ in states], 1) @ axes
        return moved, log_rho.double() + sum(now[1] - then[1] for now, then in zip(states, starts))

    return state


def axes_of(functional: Functional, d: int) -> Tensor | None:
    """Directions (d, d), orthonormal rows, along which an entropy and potentials are a sum; none where there are none.

    Of a sum over coordinates the Hessian is diagonal in them at every point: they are its eigenvectors at one of them.
    Looked at within a few units of the origin; ``of_coordinates`` looks again where its points are.
    """
    if not functional.needs_density:
        return None
    x = 0.7 * torch.randn(256, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = torch.zeros(d, d, dtype=torch.float64)
    for weight, term in terms_of(functional):
        if isinstance(term, PotentialEnergy):
            hessian += weight * torch.autograd.functional.hessian(lambda one, V=term.V: V(one[None])[0], x[0])
    axes = torch.linalg.eigh(hessian).eigenvectors.mT.contiguous()
    return axes if _is_sum_along(functional, axes, x) else None


def _is_sum_along(functional: Functional, axes: Tensor, x: Tensor) -> bool:
    """Whether F is a sum of entropies and of potentials whose sum has V(x) = sum_k V_k(x . axes_k) at x (n, d)."""
    terms = terms_of(functional)
    if not all(isinstance(term, PotentialEnergy | Entropy) for _, term in terms):
        return False

    def value(at: Tensor) -> Tensor:
        return sum((w * term.V(at) for w, term in terms if isinstance(term, PotentialEnergy)), torch.zeros(len(at)))

    x = x.double()
    y, zero = x @ axes.mT, value(torch.zeros_like(x[:1]))
    whole, parts = value(x) - zero, sum(value(y[:, k, None] * axes[k]) - zero for k in range(len(axes)))
    return bool((whole - parts).abs().max() <= 1e-6 * (1e-9 + whole.std()))


def _along(functional: Functional, axis: Tensor) -> Functional:
    """The part of a sum of entropies and potentials that the coordinate along ``axis`` (d,) has."""
    return Sum([
        (weight, PotentialEnergy(lambda s, V=term.V: V(s * axis.to(s))) if isinstance(term, PotentialEnergy) else term)
        for weight, term in terms_of(functional)
    ])  # fmt: skip


def of_the_cloud(functional: Functional, tau: float, x: Tensor) -> Reference:
    """The reference by the steps of the cloud x itself under an energy of particles."""
    clouds = [x.double()]

    def state(k: int) -> State:
        while len(clouds) <= k:
            clouds.append(implicit_cloud_step(functional, clouds[-1], tau))
        return clouds[k], None

    return state


def of_one_member(members: Members, x: Tensor) -> Tensor:
    """log rho (n,) at x (n, d) of a family's one member."""
    return members.log_density(x[None])[0]
