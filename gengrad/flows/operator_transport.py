"""A learned JKO operator as a transport: one network that moves every measure, each step corrected by its condition."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gengrad.flows.newton_correction import Correction, corrections_of, residual_of
from gengrad.flows.polar_factor import circulation
from gengrad.flows.transports import KINDS, Noise, Transport
from gengrad.functionals.base import Density, Functional
from gengrad.functionals.expression import build_expression, reweighted, told
from gengrad.networks.kernels import Marks
from gengrad.networks.local_fit import SmoothMaps, slopes
from gengrad.networks.set_operator import FOLD, determinant
from gengrad.registry import DATASETS, NETWORKS, settings_of

SETTINGS = ("tau", "terms", "data", "family", "taus", "weights", "correction")  # of a transport, plain data
DOUBTED = 1.0  # of a step's way, times 1 / tau: a residual that a step has which is by far too short, or rough
UNKNOWN = -1e30  # stands for a log density that is not known, where only finite numbers are stored


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
    the polynomial by which a step is corrected (``corrections_of``) where its energy needs no log densities, or they
    are known, after which what moves the measure within itself is taken out (``circulation``); 0 for neither.
    ``corrected`` (K, terms + 3, d): the polynomials of the anchors' steps, ``packed``.
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
                x = Correction.unpacked(self.corrected[k].to(x))(x)
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

        Where it is not, or not ``told``, the network sees no log densities, and nothing corrects the step of an energy
        that needs a density. Nor does it see them where its step folds, or the residual of the step's condition is more
        than ``DOUBTED``, and the step by the points alone does not fold and has the smaller one: log densities that are
        rough mislead it.
        """
        x, log_rho = x.clone(), log_rho if log_rho is None else log_rho.clone()  # of no inference mode
        tau, maps = tau or self.tau, None if log_rho is None else SmoothMaps.where_enough(x)
        told, functional = told and log_rho is not None, self.functional()
        known = log_rho if told and self.network.config.log_density else None
        dense = functional.needs_density
        scored = dense and told and (known is not None or self.correction > 0)  # a residual is asked for

        def pushed(known: Tensor | None) -> tuple[Tensor, Tensor | None, Density | None]:
            y, logs = push(self.network, x, tau, log_rho, x, self.told(), known, maps)
            return y, logs, Density(logs, slopes(y, logs)[0]) if scored else None

        y, logs, density = pushed(known)
        if known is not None:
            sound, folds = log_rho.isfinite(), _folds(logs, log_rho)
            off = _residual(functional, tau, x, y, density, sound)
            if folds or not off * tau <= DOUBTED * float((y - x).square().sum(-1).mean().sqrt()):
                other = pushed(None)
                if not _folds(other[1], log_rho) and (
                    folds or _residual(functional, tau, x, other[0], other[2], sound) < off
                ):
                    (y, logs, density), known = other, None
        moved = Moved(y, logs, None, known)
        if not self.correction or (dense and not told):
            return moved
        return self._corrected(functional, tau, x, log_rho, moved, density, maps)

    def _corrected(
        self, functional: Functional, tau: float, x: Tensor, log_rho: Tensor | None, moved: Moved,
        density: Density | None, maps: SmoothMaps | None,
    ) -> Moved:  # fmt: skip
        """The step x -> ``moved.x`` by the first of ``corrections_of`` it after which the residual is no larger, and

        without what circulates. q is smooth, but what comes of it need not be: beside a narrow component a polynomial
        bends what it does not see.
        """
        y, logs = moved.x.double(), moved.log_rho
        rows = y.isfinite().all(-1) if logs is None else logs.isfinite()
        off = _residual(functional, tau, x, y, density, rows)
        for found in corrections_of(functional, tau, x, y, density, self.correction):
            z, after = found(y), logs if logs is None else logs - torch.linalg.det(found.jacobian(y)).log().to(logs)
            bends = slopes(z, after) if density else ()
            if _residual(functional, tau, x, z, density and Density(after, bends[0]), rows) <= off:
                break
        else:
            return moved
        circulated = circulation(maps, x, z, *bends) if bends and maps is not None else None
        if circulated is not None:
            det = determinant(maps.jacobians(x, z + circulated))
            if bool((det > FOLD)[after.isfinite()].all()):
                z, after = z + circulated, log_rho - det.log().to(log_rho)
        return Moved(z.to(moved.x), after, found, moved.told)


KINDS[OperatorTransport.kind] = OperatorTransport


def _folds(after: Tensor, before: Tensor) -> bool:
    """Whether log rho' is unknown where log rho was known."""
    return bool((after.isnan() & ~before.isnan()).any())


def _residual(
    functional: Functional, tau: float, x: Tensor, y: Tensor, density: Density | None, rows: Tensor
) -> float:  # fmt: skip
    """Root mean square of ``residual_of`` over these rows; NaN where F cannot be taken of the particles."""
    try:
        return float(residual_of(functional, tau, x, y, density)[rows].square().sum(-1).mean().sqrt())
    except ValueError:  # as where particles coincide and an interaction is infinite
        return math.nan


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
    would carry densities of their places alone. But where that map folds, DT is the network's own,
    if ``maps`` are given.
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
        folded = determinant(jacobian) <= FOLD
        if maps and folded.any():  # neighbours on one side can lead a quartic astray; in training a fold is dropped
            jacobian[folded] = network(x, context, jacobian=True)[1].to(jacobian)[folded]
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
        corrections.append(step.correction)
        x, log_rho = step.x, step.log_rho
    corrected, given = None, log_rho is not None
    if any(corrections):
        every = [correction or Correction.none(x.shape[1]) for correction in corrections]
        most = max(correction.degree for correction in every)
        corrected = torch.stack([correction.packed(most).to(x) for correction in every])  # none is on the CPU
    return torch.stack(states), torch.stack(known).to(x) if given else None, corrected
