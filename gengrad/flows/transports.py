"""What moves mass once it is trained: a network read as a transport, with its cost in network evaluations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gengrad.data.draws import Keyed
from gengrad.flows.solvers import EVALUATIONS, SOLVERS, Velocity, integrate, steps_for
from gengrad.registry import NETWORKS, settings_of

# what a transport with a latent variable draws it from: ``Keyed`` gives every sample its own noise
Noise = Keyed | torch.Generator | None


@dataclass(frozen=True)
class Condition:
    """The classes ``y`` (batch,) that the samples are to have, and the ``guidance`` w towards them."""

    y: Tensor
    guidance: float = 1.0


def conditioned(network: nn.Module, condition: Condition | None) -> Velocity:
    """v(x, t) = u(x, t) + w (u(x, t, y) - u(x, t)): classifier-free guidance (Ho and Salimans 2022, eq. 6).

    There w counts from zero: theirs is w - 1. w = 1 is the plain conditional velocity, one evaluation instead of two.
    """
    if condition is None:
        return network
    y, w = condition.y, condition.guidance
    if w == 1:
        return lambda x, t: network(x, t, y)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        nobody = torch.full_like(y, network.classes)
        without, with_class = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([nobody, y])).chunk(2)
        return without + w * (with_class - without)

    return guided


class Transport(nn.Module, ABC):
    """One map of the flow: ``push`` moves points, ``cost`` says what that takes in network evaluations.

    ``condition`` is handed only to transports of networks that take classes.
    """

    kind: str  # its name in flow.json
    has_density = False  # whether it has ``log_det`` and ``inverse``, so that densities can be carried along

    @abstractmethod
    def path(self, x: Tensor, generator: Noise = None, nfe: int | None = None) -> Iterator[Tensor]:
        """The states on the way from x (batch, *event), the last one where ``push`` ends."""

    def push(self, x: Tensor, generator: Noise = None, nfe: int | None = None, **condition) -> Tensor:
        """x moved, like x. ``nfe``: network evaluations to spend, where the transport leaves a choice."""
        last = x
        for state in self.path(x, generator, nfe, **condition):
            last = state
        return last

    def velocity_networks(self) -> list[nn.Module]:
        """The networks whose evaluations are the NFE."""
        return [self.network] if hasattr(self, "network") else []

    def other_networks(self) -> dict[str, nn.Module]:
        """Networks by name that are evaluated besides, whose evaluations are reported apart."""
        return {}

    def phases(self, nfe: int | None = None) -> list[tuple[str, int]]:
        """(name, number of states) of the phases that ``path`` goes through, where it has any."""
        return []

    @abstractmethod
    def cost(self, nfe: int | None = None) -> int:
        """Network evaluations per sample that ``push(..., nfe=nfe)`` spends; raises ``ValueError`` if it cannot."""

    def log_det(self, x: Tensor) -> Tensor:
        """log |det D push| at x (n, *event) -> (n,), where ``has_density``."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """The x with push(x) = y, where ``has_density``."""
        raise NotImplementedError

    @abstractmethod
    def describe(self) -> dict:
        """Plain data from which ``transport_from`` builds this transport again, weights aside."""


class VelocityTransport(Transport):
    """dx/dt = network(x, t) from ``t0`` to ``t1`` by ``solver`` with equal steps; ``nfe`` buys the steps."""

    kind = "velocity"
    default_nfe = 10

    def __init__(self, network: nn.Module, t0: float = 0.0, t1: float = 1.0, solver: str = "euler"):
        super().__init__()
        if not 0 <= t0 < t1 <= 1:
            raise ValueError(f"a transport runs from t0 to t1 with 0 <= t0 < t1 <= 1; got {t0} and {t1}")
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
        self.network, self.t0, self.t1, self.solver = network, t0, t1, solver

    def path(
        self, x: Tensor, generator: Noise = None, nfe: int | None = None, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        v, steps = conditioned(self.network, condition), self.cost(nfe) // EVALUATIONS[self.solver]
        return integrate(v, x, self.t0, self.t1, steps, self.solver)

    def cost(self, nfe: int | None = None) -> int:
        nfe = self.default_nfe * EVALUATIONS[self.solver] if nfe is None else nfe
        steps_for(self.solver, nfe)
        return nfe

    def describe(self) -> dict:
        return {
            "kind": self.kind,
            "network": settings_of(self.network),
            "event_shape": list(self.network.event_shape),
            "t0": self.t0,
            "t1": self.t1,
            "solver": self.solver,
        }

    @classmethod
    def rebuild(cls, description: dict) -> VelocityTransport:
        network = NETWORKS.build(description["network"], event_shape=tuple(description["event_shape"]))
        return cls(network, description["t0"], description["t1"], description["solver"])


class PlanTransport(Transport):
    """A plan: y = x + scale network(x, z) with z standard normal, drawn afresh for each sample, so that atoms split.

    One network evaluation, whatever ``nfe`` allows. The pushed measure has no density that could be computed.
    """

    kind = "plan"

    def __init__(self, network: nn.Module, scale: float = 1.0):
        super().__init__()
        self.network, self.scale = network, scale

    def path(self, x: Tensor, generator: Noise = None, nfe: int | None = None) -> Iterator[Tensor]:
        self.cost(nfe)
        size = self.network.latent
        z = generator.normal(size) if isinstance(generator, Keyed) else torch.randn(len(x), size, generator=generator)
        yield x + self.scale * self.network(x, z.to(x))

    def cost(self, nfe: int | None = None) -> int:
        if nfe is not None and nfe < 1:
            raise ValueError(f"nfe is the number of network evaluations per sample, at least 1; got {nfe}")
        return 1

    def describe(self) -> dict:
        return {
            "kind": self.kind,
            "network": settings_of(self.network),
            "event_shape": list(self.network.event_shape),
            "scale": self.scale,
        }

    @classmethod
    def rebuild(cls, description: dict) -> PlanTransport:
        network = NETWORKS.build(description["network"], event_shape=tuple(description["event_shape"]))
        return cls(network, description["scale"])


KINDS: dict[str, type] = {cls.kind: cls for cls in (VelocityTransport, PlanTransport)}


def transport_from(description: dict) -> Transport:
    """The transport that ``describe`` described, with fresh weights; raises ``ValueError`` for an unknown kind."""
    kind = description.get("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown transport {kind!r}; this version knows: {', '.join(KINDS)}")
    return KINDS[kind].rebuild(description)
