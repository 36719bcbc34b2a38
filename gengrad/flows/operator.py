"""A learned JKO operator as a transport, and on clouds of the user's: one step, or many with energies and densities."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from gengrad.flows.asked import whole
from gengrad.flows.newton_correction import Correction, correction_of
from gengrad.flows.operator_family import outside
from gengrad.flows.polar_factor import circulation
from gengrad.flows.transports import KINDS, Noise, Transport
from gengrad.functionals.base import Density, Functional
from gengrad.functionals.expression import build_expression, has_pairs, reweighted, told
from gengrad.networks.kernels import Marks
from gengrad.networks.local_fit import SmoothMaps, slopes
from gengrad.networks.set_operator import FOLD, determinant
from gengrad.registry import DATASETS, NETWORKS, settings_of

if TYPE_CHECKING:
    from gengrad.flows.flow import Flow

SETTINGS = ("tau", "terms", "data", "family", "taus", "weights", "correction")  # of a transport, plain data
PAIRS = 4096  # particles whose energy is taken where every one meets every other
UNKNOWN = -1e30  # stands for a log density that is not known, where only finite numbers are stored
FAR = 0.25  # of the width of the training family outside of it from which on a warning is given


class Moved(NamedTuple):
    """A cloud after a step: T x (n, d), log rho'(T x) (n,) where log rho was known, the polynomial that corrected T,

    and the log densities that the network was told (n,).
    """

    x: Tensor
    log_rho: Tensor | None
    correction: Correction | None
    told: Tensor | None


class OperatorTransport(Transport):
    """x <- T(x; mu_k) = x + tau g(x, context(mu_k)), k = 0 .. K - 1; one network evaluation a step.

    Samples of the flow follow ``anchors`` (K, n, d): the measures mu_k as clouds that the operator has moved,
    the same for all samples, so that sample i does not depend on the batch that it comes in; ``known`` (K, n) their log
    densities, where the network takes them and the source has one. ``terms``, ``data`` and
    ``samples`` (m, d; m = 0 for none) are the functional's; ``family`` is the range of ``features`` of the clouds that
    the operator was trained on; ``taus`` the range of tau, where it takes others than ``tau``; ``weights`` the range of
    the weight of each term of that name, where it takes others than those of ``terms``. ``correction``: the degree of
    the polynomial by which a step is corrected where log densities are known (``correction_of``), after which what
    moves the measure within itself is taken out (``circulation``); 0 for neither. ``corrected`` (K, terms + 3, d): the
    polynomials of the anchors' steps, ``packed``.
    """

    kind = "operator"

    def __init__(
        self, network: nn.Module, anchors: Tensor, samples: Tensor, tau: float, terms: list[dict],
        data: dict | None = None, family: dict | None = None, taus: list[float] | None = None,
        weights: dict[str, list[float]] | None = None, correction: int | None = None, known: Tensor | None = None,
        corrected: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        self.network, self.tau, self.terms, self.data = network, tau, terms, data
        self.family, self.taus, self.weights, self.correction = family, taus, weights, correction or 0
        self.register_buffer("anchors", anchors)
        self.register_buffer("corrected", corrected)
        self.register_buffer("samples", samples)
        self.register_buffer("known", None if known is None else torch.where(known.isfinite(), known, UNKNOWN))

    def path(self, x: Tensor, generator: Noise = None, nfe: int | None = None) -> Iterator[Tensor]:
        for k in range(self.cost(nfe)):
            known = None
            if self.known is not None:
                known = torch.where(self.known[k] > UNKNOWN, self.known[k], math.nan).to(x)
            x = self.network(x, self.network.context(self.anchors[k].to(x), self.tau, self.told(), known))
            if self.corrected is not None:
                x = Correction.unpacked(self.corrected[k].to(x))(x)[0]
            yield x

    def cost(self, nfe: int | None = None) -> int:
        """One evaluation a step, all of its steps, whatever ``nfe`` allows above that."""
        if nfe is not None and nfe < len(self.anchors):
            raise ValueError(
                f"this flow makes {len(self.anchors)} steps, one network evaluation each; nfe={nfe} is less"
            )
        return len(self.anchors)

    def functional(self) -> Functional:
        target = DATASETS.build(self.data) if self.data else None
        return build_expression(self.terms, target, self.samples if len(self.samples) else None)

    def told(self) -> tuple[float, ...]:
        """The weights of ``terms`` that the network is told."""
        return told(self.terms, self.weights)

    def reweighted(self, weights: Mapping[str, float] | None) -> OperatorTransport:
        """The same operator for an energy with these weights of its terms; raises ``ValueError`` outside the ranges."""
        if not weights:
            return self
        for name, weight in weights.items():
            if name not in (self.weights or {}):
                known = ", ".join(self.weights or {}) or "none"
                raise ValueError(f"this operator was trained for one weight of {name!r}; method.weights had {known}")
            low, high = self.weights[name]
            if not low <= weight <= high:
                raise ValueError(f"the weight {weight:g} of {name!r} is outside of {low:g} to {high:g}, which this "
                                 "operator was trained for")  # fmt: skip
        other = copy.copy(self)  # the network and the buffers are the same objects
        other.terms = reweighted(self.terms, weights)
        return other

    def describe(self) -> dict:
        shapes = {"anchors": list(self.anchors.shape), "samples": list(self.samples.shape)}
        for name in ("known", "corrected"):
            if getattr(self, name) is not None:
                shapes[name] = list(getattr(self, name).shape)
        settings = {name: getattr(self, name) for name in SETTINGS}
        about = {"network": settings_of(self.network), "event_shape": list(self.network.event_shape)}
        return {"kind": self.kind, **about, **shapes, **settings}

    @classmethod
    def rebuild(cls, description: dict) -> OperatorTransport:
        settings = {"kernels": 0, "scaled": False, **description["network"]}  # flows from before there were these
        network = NETWORKS.build(settings, event_shape=tuple(description["event_shape"]))
        empty = [torch.zeros(description[name]) for name in ("anchors", "samples")]
        known = [torch.zeros(description[name]) if name in description else None for name in ("known", "corrected")]
        return cls(network, *empty, *(description.get(name) for name in SETTINGS), *known)

    @torch.inference_mode(False)  # gradients of potentials and interactions are autograd's
    @torch.no_grad()
    def moved(self, x: Tensor, log_rho: Tensor | None = None, tau: float | None = None, told: bool = True) -> Moved:
        """One step of a cloud x (n, d) with log rho (n,) at it, where it is known.

        Where it is not, or not ``told``, the network sees no log densities, and nothing corrects the step. Nor does it
        see them where the map that goes by them folds, and that by the points alone does not.
        """
        x, log_rho = x.clone(), log_rho if log_rho is None else log_rho.clone()  # of no inference mode
        tau, maps = tau or self.tau, None if log_rho is None else SmoothMaps.where_enough(x)
        told = told and log_rho is not None
        known = log_rho if told and self.network.config.log_density else None
        y, logs = push(self.network, x, tau, log_rho, x, self.told(), known, maps)
        if known is not None and _folds(logs, log_rho):
            other = push(self.network, x, tau, log_rho, x, self.told(), None, maps)
            if not _folds(other[1], log_rho):
                (y, logs), known = other, None
        if not (self.correction and told):
            return Moved(y, logs, None, known)
        found = correction_of(self.functional(), tau, x, y, Density(logs, slopes(y, logs)[0]), self.correction)
        if found is None:
            return Moved(y, logs, None, known)
        corrected, jacobian = found(y.double())
        logs = logs - determinant(jacobian).log().to(logs)
        circulated = None if maps is None else circulation(maps, x, corrected, *slopes(corrected, logs))
        if circulated is not None:
            det = determinant(maps.jacobians(x, corrected + circulated))
            if bool((det > FOLD)[logs.isfinite()].all()):
                corrected, logs = corrected + circulated, log_rho - det.log().to(log_rho)
        return Moved(corrected.to(y), logs, found, known)


KINDS[OperatorTransport.kind] = OperatorTransport


def _folds(after: Tensor, before: Tensor) -> bool:
    return bool((after.isnan() & ~before.isnan()).any())


@torch.no_grad()
def push(
    network: nn.Module, x: Tensor, tau: float, log_rho: Tensor | None = None, particles: Tensor | None = None,
    weights: Sequence[float] = (), known: Tensor | Marks | None = None, maps: SmoothMaps | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(T x, log rho'(T x)) for x (..., n, d), the context that of ``particles`` (default: x itself).

    log rho'(T x) = log rho(x) - log det DT(x); NaN where T folds, det DT <= 0. Without ``log_rho`` no determinant.
    ``known``: log rho at the particles, or its marks, for networks that take it; where no particles are given, who are
    x itself then, ``log_rho``.

    Of the particles themselves, where they are enough, DT is that of the smooth map that brings x to T x
    (``SmoothMaps``; ``maps``, where those of a cloud are at hand): each of them is at the middle of its own kernels,
    where T is bent by these as it is nowhere else, and the outermost, farther from each other than kernels are wide,
    would carry densities of their places alone.
    """
    own = particles is None or particles is x
    context = network.context(*(x, tau, weights, log_rho) if particles is None else (particles, tau, weights, known))
    if log_rho is None:
        return network(x, context), None
    clouds = x.reshape(-1, *x.shape[-2:])
    every = [maps] if maps else [SmoothMaps.where_enough(cloud) if own else None for cloud in clouds]
    if all(every):
        moved = network(x, context)
        found = [each.jacobians(*cloud) for each, *cloud in zip(every, clouds, moved.view_as(clouds))]
        jacobian = torch.stack(found).view(*x.shape, x.shape[-1])
    else:
        moved, jacobian = network(x, context, jacobian=True)
    return moved, log_rho - determinant(jacobian).log().to(log_rho)


def anchored(
    transport: OperatorTransport, x: Tensor, log_rho: Tensor | None, steps: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The cloud x before each of so many steps (steps, n, d); log rho there, where it is given, NaN in steps that go by

    the points alone; and what corrected each step, where that is done.
    """
    states, known, corrections = [], [], []
    for _ in range(steps):
        states.append(x)
        step = transport.moved(x, log_rho)
        known.append(None if log_rho is None else torch.full_like(log_rho, math.nan) if step.told is None else log_rho)
        corrections.append((step.correction or Correction.none(x.shape[1])).packed(transport.correction).to(x))
        x, log_rho = step.x, step.log_rho
    given = log_rho is not None
    return (
        torch.stack(states),
        torch.stack(known).to(x) if given else None,
        torch.stack(corrections) if given and transport.correction else None,
    )


def energies_of(functional: Functional, x: Tensor, log_rho: Tensor | None) -> Tensor:
    """F of each cloud of x (clouds, n, d), float64 (clouds,); ``log_rho`` (clouds, n) where F needs a density."""
    values = [functional(cloud, Density(log_rho[k]) if functional.needs_density else None) for k, cloud in enumerate(x)]
    return torch.stack(values).double().cpu()


@dataclass(frozen=True)
class Evolution:
    """A cloud on its way under an operator.

    ``states`` (steps + 1, n, d) with the start; ``times`` (steps + 1,) flow times; ``energies`` (steps + 1,) and
    ``log_density`` (steps + 1, n), None where they are not known; ``outside``: how far the start lay outside of the
    training family, in widths of it; ``folded``: the share of points at which the map folded in any step, whose
    densities are NaN from there on (None without densities); ``nfe``: network evaluations a point.
    """

    states: Tensor
    times: Tensor
    energies: Tensor | None
    log_density: Tensor | None
    outside: float
    folded: float | None
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
    with torch.no_grad():
        if known is None or not transport.correction:
            return _restored(flow, network(x, network.context(x, tau, transport.told(), known))).cpu()
        clouds = zip(x.reshape(-1, *x.shape[-2:]), known.reshape(-1, x.shape[-2]))  # each has its own correction
        moved = torch.stack([transport.moved(cloud, log_rho, tau)[0] for cloud, log_rho in clouds])
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
    states, densities, values, rest = [x], [log_rho], [], functional.needs_density
    for _ in range(n_steps):
        moved, log_rho, *_ = transport.moved(states[-1], log_rho, tau)
        states.append(moved)
        densities.append(log_rho)
    if known and energies is not False:
        most = PAIRS if has_pairs(functional) else len(x)
        rows = [slice(0, most)] * len(states)
        if rest:  # the energy of a fold would be NaN: it is taken over the points whose density is known at the end
            rows = [densities[-1].isfinite().nonzero()[:, 0][:most]] * len(states)
        with torch.no_grad():
            values = [energies_of(functional, s[None, r], l[None, r] if rest else None)
                      for s, l, r in zip(states, densities, rows)]  # fmt: skip
    volume = 0.0 if flow.units is None else x.shape[1] * torch.tensor(flow.units[1]).log().item()
    carried = log_rho is not None
    return Evolution(
        states=_restored(flow, torch.stack(states)).cpu(),
        times=tau * torch.arange(n_steps + 1),
        energies=torch.cat(values) if values else None,
        log_density=(torch.stack(densities) - volume).to(x).cpu() if carried else None,
        outside=_measured(transport, x),
        folded=float((~log_rho.isfinite()).double().mean()) if carried else None,
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
    if points.is_complex() or not bool(points.isfinite().all()):
        bad = int((~points.isfinite()).any(-1).sum())
        raise ValueError(f"{bad} of the points are not finite; leave them out")
    if bool((points == points[..., :1, :]).all(-1).all(-1).any()):
        raise ValueError("all points are identical: an atom of mass, which no map can spread; give points that differ")
    x = points.to(flow.device, torch.get_default_dtype() if not points.is_floating_point() else points.dtype)
    x = x.detach().to(next(flow.parameters()).dtype)
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


def _measured(transport: OperatorTransport, x: Tensor) -> float:
    """How far the cloud is outside of the training family; a warning where it is far."""
    if transport.family is None:
        return 0.0
    distance, what = outside(transport.family, x)
    if distance > FAR:
        warnings.warn(
            f"the cloud lies {distance:.2g} widths of the training family outside of it ({what}): the operator was not "
            "trained there",
            stacklevel=4,
        )
    return distance
