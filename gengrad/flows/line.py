"""Exact implicit steps on the line, by Newton's method on nodes that carry their mass: a reference for any density."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import solveh_banded
from torch import Tensor

from gengrad.functionals.base import Functional, terms_of
from gengrad.functionals.internal import InternalEnergy
from gengrad.functionals.potential import PotentialEnergy

NODES = 2001
TAIL = 32.0  # log density below its peak at which the line is cut


@dataclass
class Line:
    """A measure on nodes x (n,): masses of the nodes and of the intervals between; log rho (n - 1,) of these."""

    x: Tensor
    mass: Tensor
    between: Tensor
    log_rho: Tensor

    @classmethod
    def of(cls, log_density: object, low: float, high: float, nodes: int = NODES) -> Line:
        """The law with ``log_density`` ((n, 1) -> (n,)) between ``low`` and ``high``, cut where it is negligible."""
        wide = torch.linspace(low, high, 20_001, dtype=torch.float64)
        logs = log_density(wide[:, None]).double()
        seen = wide[logs > logs.max() - TAIL]
        x = torch.linspace(float(seen[0]), float(seen[-1]), nodes, dtype=torch.float64)
        log_rho = log_density(((x[1:] + x[:-1]) / 2)[:, None]).double().clamp_min(float(logs.max()) - 2 * TAIL)
        between = log_rho.exp() * x.diff()
        between = between / between.sum()
        zero = between.new_zeros(1)
        return cls(x, (torch.cat([between, zero]) + torch.cat([zero, between])) / 2, between, log_rho)


def implicit_step(functional: Functional, line: Line, tau: float, tol: float = 1e-12) -> Line:
    """argmin over increasing T of tau F(T_# rho) + E |T x - x|^2 / 2, for potential and internal energies.

    Newton's method, whose matrix is tridiagonal, halving steps that leave the increasing maps or raise the objective.
    Raises ``ValueError`` for other functionals and where it does not converge in 100 steps.
    """
    smooth, internal = _parts(functional)
    volume = line.x.diff()

    def value(t: Tensor) -> Tensor:
        widths = t.diff()
        if not bool((widths > 0).all()):
            return torch.tensor(torch.inf, dtype=t.dtype)
        log_rho = line.log_rho + (volume / widths).log()
        inner = sum(weight * term.per_particle(log_rho) for weight, term in internal)
        outer = sum(weight * term.V(t[:, None]) for weight, term in smooth)
        energy = (line.between * inner).sum() + (line.mass * outer).sum()
        return tau * energy + (line.mass * (t - line.x).square()).sum() / 2

    t = line.x.clone()
    for _ in range(100):
        gradient, banded = _derivatives(line, volume, t, tau, smooth, internal)
        direction = torch.from_numpy(solveh_banded(banded, -gradient.numpy(), lower=True))
        decrement, share, before = float(-(gradient * direction).sum()), 1.0, value(t)
        if decrement < tol:
            break
        while not value(t + share * direction) <= before - 1e-4 * share * decrement and share > 1e-10:
            share /= 2
        t = t + share * direction
    else:
        raise ValueError(f"the implicit step on the line did not converge: decrement {decrement:.3g} after 100 steps")
    return Line(t, line.mass, line.between, line.log_rho + (volume / t.diff()).log())


def _derivatives(
    line: Line, volume: Tensor, t: Tensor, tau: float, smooth: list, internal: list
) -> tuple[Tensor, np.ndarray]:
    """Gradient (n,) and Hessian, as its diagonal and the one below, of the objective."""
    leaf, widths = t.clone().requires_grad_(True), t.diff().requires_grad_(True)
    outer = sum(weight * term.V(leaf[:, None]).sum() for weight, term in smooth) + 0.0 * leaf.square().sum()
    log_rho = line.log_rho + (volume / widths).log()
    inner = sum(weight * term.per_particle(log_rho).sum() for weight, term in internal) + 0.0 * widths.square().sum()
    first, second = [], []
    for whole, place in ((outer, leaf), (inner, widths)):
        (slope,) = torch.autograd.grad(whole, place, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), place)
        first.append(slope.detach())
        second.append(bend)
    pull, stiff = tau * line.between * first[1], tau * line.between * second[1]
    gradient = line.mass * (tau * first[0] + t - line.x)
    gradient[1:] += pull
    gradient[:-1] -= pull
    diagonal = line.mass * (tau * second[0] + 1)
    diagonal[1:] += stiff
    diagonal[:-1] += stiff
    return gradient, np.stack([diagonal.numpy(), np.append(-stiff.numpy(), 0.0)])


def _parts(functional: Functional) -> tuple[list, list]:
    terms = terms_of(functional)
    smooth = [(weight, term) for weight, term in terms if isinstance(term, PotentialEnergy)]
    internal = [(weight, term) for weight, term in terms if isinstance(term, InternalEnergy)]
    if len(smooth) + len(internal) < len(terms):
        raise ValueError("implicit steps on the line are solved for potential and internal energies alone")
    return smooth, internal


def carried(start: Line, now: Line, x: Tensor, log_rho: Tensor) -> tuple[Tensor, Tensor]:
    """Points x (n, 1) of the start, with their log densities, where the composed map has brought them: linear between

    nodes, and the map's derivative linear between the middles of the intervals.
    """
    at, nodes = x[:, 0].double().numpy(), start.x.numpy()
    y = np.interp(at, nodes, now.x.numpy())
    slope = np.interp(at, (nodes[1:] + nodes[:-1]) / 2, (now.x.diff() / start.x.diff()).log().numpy())
    return torch.from_numpy(y)[:, None], log_rho.double() - torch.from_numpy(slope)
