"""Gradients of convex potentials as transports: optimal maps with densities and inverses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gengrad.flows.newton import invert_gradient
from gengrad.flows.transports import KINDS, Transport
from gengrad.registry import NETWORKS, settings_of


class GradientTransport(Transport):
    """x -> grad u(x) of a convex potential, an optimal map; one network evaluation, invertible, with a density.

    ``record``: plain data of the step that it makes, such as its length ``tau`` in flow time and the energy after it.
    """

    kind = "gradient"
    has_density = True

    def __init__(self, network: nn.Module, record: dict | None = None):
        super().__init__()
        self.network, self.record = network, dict(record or {})

    def path(self, x: Tensor, generator: torch.Generator | None = None, nfe: int | None = None) -> Iterator[Tensor]:
        yield self.network(x)

    def cost(self, nfe: int | None = None) -> int:
        return 1

    def log_det(self, x: Tensor) -> Tensor:
        """log det Hess u(x), (n, *event) -> (n,): exact up to d = 64; above, from 16 random probes of a fixed seed."""
        return self.network.log_det(x, torch.Generator().manual_seed(0))

    def inverse(self, y: Tensor) -> Tensor:
        """The x with grad u(x) = y, by convex minimisation; raises ``ValueError`` where that does not converge."""
        return invert_gradient(self.network, y.flatten(1)).view_as(y)

    def describe(self) -> dict:
        return {
            "kind": self.kind,
            "network": settings_of(self.network),
            "event_shape": list(self.network.event_shape),
            "record": self.record,
        }

    @classmethod
    def rebuild(cls, description: dict) -> GradientTransport:
        network = NETWORKS.build(description["network"], event_shape=tuple(description["event_shape"]))
        return cls(network, description["record"])


KINDS[GradientTransport.kind] = GradientTransport
