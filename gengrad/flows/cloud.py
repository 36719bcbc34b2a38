"""A particle flow kept as a transport: new particles follow the forces of the cloud that has flowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gengrad.data.draws import Keyed
from gengrad.flows.transports import KINDS, Noise, Transport
from gengrad.ot.riesz import riesz_sums


class RieszCloud(Transport):
    """x + spread z, then x <- x + tau_k (grad mean_i |x - X^k_i|^r - grad mean_j |x - y_j|^r), k = 0 .. K - 1.

    ``states`` (K, N, *event): the cloud X^k at the start of each step; ``target`` (m, *event), m = 0: none. No network
    is evaluated; a step costs (N + m) pairs a sample. ``spread`` tells particles of one atom apart.
    """

    kind = "riesz_cloud"

    def __init__(self, states: Tensor, target: Tensor, taus: Sequence[float], r: float, spread: float = 0.0):
        super().__init__()
        self.register_buffer("states", states)
        self.register_buffer("target", target)
        self.taus, self.r, self.spread = list(taus), r, spread

    def path(self, x: Tensor, generator: Noise = None, nfe: int | None = None) -> Iterator[Tensor]:
        x = self.start(x, generator)
        for cloud, tau in zip(self.states, self.taus):
            x = x + tau * self.velocity(x, cloud)
            yield x

    def start(self, x: Tensor, generator: Noise = None) -> Tensor:
        """x with the noise that splits atoms."""
        if not self.spread:
            return x
        shape = x.shape[1:]
        z = generator.normal(*shape) if isinstance(generator, Keyed) else torch.randn(x.shape, generator=generator)
        return x + self.spread * z.to(x)

    def velocity(self, x: Tensor, cloud: Tensor) -> Tensor:
        """The velocity at x (n, *event) that the cloud and the target cause."""
        flat = x.flatten(1)
        force = riesz_sums(flat, cloud.flatten(1), self.r, potential=False).gradient
        if len(self.target):
            force = force - riesz_sums(flat, self.target.flatten(1), self.r, potential=False).gradient
        return force.view_as(x)

    def cost(self, nfe: int | None = None) -> int:
        """No network evaluations, whatever the budget."""
        return 0

    def describe(self) -> dict:
        shapes = {"states": list(self.states.shape), "target": list(self.target.shape)}
        return {"kind": self.kind, **shapes, "taus": self.taus, "r": self.r, "spread": self.spread}

    @classmethod
    def rebuild(cls, description: dict) -> RieszCloud:
        empty = [torch.zeros(description[name]) for name in ("states", "target")]
        return cls(*empty, description["taus"], description["r"], description["spread"])


KINDS[RieszCloud.kind] = RieszCloud


def growing_taus(total: float, steps: int) -> list[float]:
    """Steps between the times total (k / steps)^2: short ones first, where an atom has just burst."""
    return [total * (2 * k + 1) / steps**2 for k in range(steps)]
