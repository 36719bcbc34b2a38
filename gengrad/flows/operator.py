"""A learned JKO operator on clouds of the user's: one step, or many with their energies and densities."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gengrad.flows.asked import whole
from gengrad.flows.least_squares import by_place
from gengrad.flows.operator_family import outside
from gengrad.flows.operator_transport import OperatorTransport
from gengrad.functionals.base import Density, Functional
from gengrad.functionals.expression import has_pairs

if TYPE_CHECKING:
    from gengrad.flows.flow import Flow

PAIRS = 4096  # particles whose energy is taken where every one meets every other, spread over the cloud
NOTICED = 1e-3  # of the fall since the start: a rise that counts
LARGEST = 1e9  # coordinates; fourth powers are within what float32 holds
FAR = 0.25  # of the width of the training family outside of it from which on a warning is given


def energies_of(functional: Functional, x: Tensor, log_rho: Tensor | None) -> Tensor:
    """F of each cloud of x (clouds, n, d), float64 (clouds,); ``log_rho`` (clouds, n) where F needs a density."""
    values = [functional(cloud, Density(log_rho[k]) if functional.needs_density else None) for k, cloud in enumerate(x)]
    return torch.stack(values).double().cpu()


def rises(energies: Sequence[float]) -> list[bool]:
    """Whether F rose in each step of a rollout, by more than rounding and than ``NOTICED`` of its fall since the start.

    Where a rollout has come to rest, F wavers by less. An energy that is NaN counts as risen.
    """
    start, pairs = energies[0], pairwise(energies)
    return [not after <= e + max(1e-6 * (1 + abs(e)), NOTICED * (start - e)) for e, after in pairs]


@dataclass(frozen=True)
class Evolution:
    """A cloud on its way under an operator.

    ``states`` (steps + 1, n, d) with the start; ``times`` (steps + 1,) flow times; ``energies`` (steps + 1,) and
    ``log_density`` (steps + 1, n), None where they are not known; ``outside``: how far the start lay outside of the
    training family, in widths of it; ``folded``: the share of points at which the map folded in any step, whose
    densities are NaN from there on (None without densities); ``corrected`` (steps,): the degree of the polynomial that
    corrected each step, 0 where it is as the network made it; ``nfe``: network evaluations a point.
    """

    states: Tensor
    times: Tensor
    energies: Tensor | None
    log_density: Tensor | None
    outside: float
    folded: float | None
    corrected: tuple[int, ...]
    nfe: int
    seconds: float

    @property
    def x(self) -> Tensor:
        """The cloud at the end, (n, d)."""
        return self.states[-1]


def step(
    flow: Flow, points: Tensor, tau: float | None = None, weights: Mapping[str, float] | None = None,
    log_density: object = None,
) -> Tensor:  # fmt: skip
    """One step of the flow's operator on a cloud (n, d), or on each of many (clouds, n, d), of any size."""
    transport = operator_of(flow).reweighted(weights)
    tau, x = _tau(transport, tau), _checked(flow, points)
    network, known = transport.network, _density(flow, points, x, log_density)
    _measured(transport, x.reshape(-1, *x.shape[-2:]))
    dense = transport.functional().needs_density
    with torch.no_grad():
        if known is None and (dense or not transport.correction):
            return _restored(flow, network(x, network.context(x, tau, transport.told()))).cpu()
        clouds = x.reshape(-1, *x.shape[-2:])  # each has its own correction
        logs = [None] * len(clouds) if known is None else known.reshape(len(clouds), -1)
        moved = torch.stack([transport.moved(cloud, log_rho, tau).x for cloud, log_rho in zip(clouds, logs)])
        return _restored(flow, moved.view_as(x)).cpu()


def evolve(
    flow: Flow, points: Tensor, n_steps: int, *, tau: float | None = None,
    weights: Mapping[str, float] | None = None, log_density: object = None, energies: bool | None = None,
) -> Evolution:  # fmt: skip
    """``n_steps`` steps of the flow's operator on a cloud (n, d); ``Flow.evolve`` says what it takes and raises."""
    transport, started = operator_of(flow).reweighted(weights), time.perf_counter()
    whole("n_steps", n_steps, "the number of JKO steps", least=1)
    tau, x = _tau(transport, tau), _checked(flow, points)
    if x.dim() != 2:
        raise ValueError(f"evolve takes one cloud (n, d); got {tuple(points.shape)}. step() takes many clouds at once")
    log_rho, functional = _density(flow, points, x, log_density), transport.functional()
    if energies and functional.needs_density and log_rho is None:
        raise ValueError(
            "this operator's energy needs a density, which points alone do not have: give log_density= (a tensor "
            "(n,) of log rho at the points, or whatever has log_density(x)), or leave energies out"
        )
    known = log_rho is not None or not functional.needs_density
    states, densities, degrees, values, rest = [x], [log_rho], [], [], functional.needs_density
    for _ in range(n_steps):
        moved = transport.moved(states[-1], log_rho, tau)
        log_rho = moved.log_rho
        states.append(moved.x)
        densities.append(log_rho)
        degrees.append(moved.correction.degree if moved.correction else 0)
    if known and energies is not False:
        # the energy of a fold would be NaN: it is taken over the points whose density is known at the end
        rows = densities[-1].isfinite().nonzero()[:, 0] if rest else torch.arange(len(x), device=x.device)
        if has_pairs(functional):
            rows = rows[by_place(x[rows], PAIRS)]
        try:
            with torch.no_grad():
                values = [energies_of(functional, s[None, rows], l[None, rows] if rest else None)
                          for s, l in zip(states, densities)]  # fmt: skip
        except ValueError:  # as of particles that coincide, where an interaction is infinite
            if energies:
                raise
            values = []
    volume = 0.0 if flow.units is None else x.shape[1] * torch.tensor(flow.units[1]).log().item()
    carried = log_rho is not None
    return Evolution(
        states=_restored(flow, torch.stack(states)).cpu(),
        times=tau * torch.arange(n_steps + 1),
        energies=torch.cat(values) if values else None,
        log_density=(torch.stack(densities) - volume).to(x).cpu() if carried else None,
        outside=_measured(transport, x[None]),
        folded=float((~log_rho.isfinite()).double().mean()) if carried else None,
        corrected=tuple(degrees),
        nfe=n_steps,
        seconds=time.perf_counter() - started,
    )


def operator_of(flow: Flow) -> OperatorTransport:
    """The flow's operator; raises ``ValueError`` where it has none."""
    found = [t for t in flow.transports if isinstance(t, OperatorTransport)]
    if not found:
        raise ValueError("this flow holds no operator, so it has no steps for clouds of yours; method jko_operator has")
    return found[0]


def _tau(transport: OperatorTransport, tau: float | None) -> float:
    if tau is None or tau == transport.tau:
        return transport.tau
    if not isinstance(tau, Real):
        raise ValueError(f"tau is a number, the length of a step; got {tau!r}")
    if transport.taus is None:
        raise ValueError(
            f"this operator was trained for steps of tau={transport.tau:g} alone, not {tau:g}; train with method.taus "
            "and network.on_tau=true for others"
        )
    low, high = transport.taus
    if not low <= tau <= high:
        raise ValueError(f"tau={tau:g} is outside of {low:g} to {high:g}, which this operator was trained for")
    return float(tau)


def _checked(flow: Flow, points: Tensor) -> Tensor:
    """The points as the network takes them; raises ``ValueError`` for what is no cloud of the flow's space."""
    (d,) = flow.event_shape
    if not isinstance(points, Tensor) or points.dim() not in (2, 3) or points.shape[-1] != d:
        found = tuple(points.shape) if isinstance(points, Tensor) else f"a {type(points).__name__}"
        raise ValueError(f"this operator moves clouds of points of shape (n, {d}); got {found}")
    if points.shape[-2] < 2:
        raise ValueError(f"an operator moves a measure, and {points.shape[-2]} points are none; give at least 2")
    if not points.numel():
        raise ValueError(f"these are no clouds at all: points of shape {tuple(points.shape)}")
    if points.is_complex():
        raise ValueError(f"points of real numbers are wanted; got {points.dtype}")
    if bad := int((~points.isfinite()).any(-1).sum()):
        raise ValueError(f"{bad} of the points are not finite; leave them out")
    if (largest := float(points.detach().abs().max())) > LARGEST:
        raise ValueError(f"coordinates of {largest:.3g} overflow in the network; scale the points down")
    x = points.to(flow.device, torch.get_default_dtype() if not points.is_floating_point() else points.dtype)
    x = x.detach().to(next(flow.parameters()).dtype)
    if bool((x == x[..., :1, :]).all(-1).all(-1).any()):  # as the network sees them
        raise ValueError("all points are identical: an atom of mass, which no map can spread; give points that differ")
    return x if flow.units is None else (x - flow.units[0].to(x)) / flow.units[1]


def _restored(flow: Flow, x: Tensor) -> Tensor:
    return x if flow.units is None else flow.units[0].to(x) + flow.units[1] * x


def _density(flow: Flow, points: Tensor, x: Tensor, given: object) -> Tensor | None:
    """log rho (..., n) at the points in the network's units, from a tensor or from what has a log density."""
    if given is None:
        return None
    value, wanted = given, tuple(points.shape[:-1])
    if hasattr(given, "log_density"):
        value = given.log_density(points.flatten(0, -2)).view(wanted)
    if not isinstance(value, Tensor) or value.shape != wanted:
        found = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"log_density must be of shape {wanted}, one number for each point; got {found}")
    if bad := int((~value.isfinite()).sum()):
        raise ValueError(f"{bad} of the log densities are not finite; leave these points out")
    volume = 0.0 if flow.units is None else x.shape[-1] * torch.tensor(flow.units[1]).log().item()
    return value.to(x.device, torch.float64) + volume  # a large constant would cost digits of what is fitted to it


def _measured(transport: OperatorTransport, clouds: Tensor) -> float:
    """How far the farthest cloud is outside of the training family; a warning where it is far."""
    if transport.family is None:
        return 0.0
    distance, what = max(outside(transport.family, cloud) for cloud in clouds)
    if distance > FAR:
        warnings.warn(
            f"the cloud lies {distance:.2g} widths of the training family outside of it ({what}): the operator was not "
            "trained there",
            stacklevel=4,
        )
    return distance
