"""The map of an entropic plan, at any point: optimal transport between two clouds that new points can follow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gengrad.flows.transports import KINDS, Noise, Transport

BLOCK = 2**24  # pairs of a point and a target at once


class EntropicMap(Transport):
    """x <- x + stop (T x - x) in ``steps`` equal steps of a straight line; no network is evaluated.

        T x = sum_j w_j(x) y_j,    w_j(x) proportional to b_j exp((g_j - |x - y_j|^2 / 2) / epsilon)

    with g the plan's potential at the targets y_j (Pooladian and Niles-Weed 2021, arXiv 2109.12004: the entropic map).
    At the points that the plan was solved for T is its barycentric map; elsewhere it is the same formula, for the
    potential of the source is a function of all of space. ``targets`` (m, *event), ``g`` (m,), uniform b.
    """

    kind = "entropic_map"

    def __init__(self, targets: Tensor, g: Tensor, epsilon: float, stop: float = 1.0, steps: int = 10):
        super().__init__()
        self.register_buffer("targets", targets)
        self.register_buffer("g", g)
        self.epsilon, self.stop, self.steps = epsilon, stop, steps

    def map(self, x: Tensor) -> Tensor:
        """T x, like x (n, *event)."""
        y = self.targets.flatten(1)
        centre = y.mean(0)  # of everything: products of points far from the origin would leave no digits
        y, z = y - centre, x.flatten(1).to(y) - centre
        height, scaled = (self.g - y.square().sum(1) / 2) / self.epsilon, y.mT / self.epsilon
        with torch.autocast(x.device.type, enabled=False):
            blocks = z.split(max(1, BLOCK // len(y)))
            moved = torch.cat([torch.softmax(rows @ scaled + height, 1) @ y for rows in blocks])
        return (moved + centre).view_as(x).to(x)

    def path(self, x: Tensor, generator: Noise = None, nfe: int | None = None) -> Iterator[Tensor]:
        way = self.map(x) - x
        for step in range(1, self.steps + 1):
            yield x + self.stop * step / self.steps * way

    def cost(self, nfe: int | None = None) -> int:
        """No network evaluations, whatever the budget."""
        return 0

    def describe(self) -> dict:
        settings = {name: getattr(self, name) for name in ("epsilon", "stop", "steps")}
        return {"kind": self.kind, "targets": list(self.targets.shape), **settings}

    @classmethod
    def rebuild(cls, description: dict) -> EntropicMap:
        shape = description["targets"]
        settings = (description[name] for name in ("epsilon", "stop", "steps"))
        return cls(torch.zeros(shape), torch.zeros(shape[0]), *settings)


KINDS[EntropicMap.kind] = EntropicMap
