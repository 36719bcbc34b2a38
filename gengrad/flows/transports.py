"""What moves mass once it is trained: a network read as a transport, with its cost in network evaluations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gengrad.flows.solvers import EVALUATIONS, SOLVERS, integrate, steps_for
from gengrad.registry import NETWORKS, settings_of


class Transport(nn.Module, ABC):
    """One map of the flow: ``push`` moves points, ``cost`` says what that takes in network evaluations."""

    kind: str  # its name in flow.json

    @abstractmethod
    def path(self, x: Tensor, generator: torch.Generator | None = None, nfe: int | None = None) -> Iterator[Tensor]:
        """The states on the way from x (batch, *event), the last one where ``push`` ends."""

    def push(self, x: Tensor, generator: torch.Generator | None = None, nfe: int | None = None) -> Tensor:
        """x moved, like x. ``nfe``: network evaluations to spend, where the transport leaves a choice."""
        last = x
        for state in self.path(x, generator, nfe):
            last = state
        return last

    @abstractmethod
    def cost(self, nfe: int | None = None) -> int:
        """Network evaluations per sample that ``push(..., nfe=nfe)`` spends; raises ``ValueError`` if it cannot."""

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

    def path(self, x: Tensor, generator: torch.Generator | None = None, nfe: int | None = None) -> Iterator[Tensor]:
        return integrate(self.network, x, self.t0, self.t1, self.cost(nfe) // EVALUATIONS[self.solver], self.solver)

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


KINDS: dict[str, type] = {cls.kind: cls for cls in (VelocityTransport,)}


def transport_from(description: dict) -> Transport:
    """The transport that ``describe`` described, with fresh weights; raises ``ValueError`` for an unknown kind."""
    kind = description.get("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown transport {kind!r}; this version knows: {', '.join(KINDS)}")
    return KINDS[kind].rebuild(description)
