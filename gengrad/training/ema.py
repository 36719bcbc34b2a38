"""The exponential moving average of the weights, whose horizon is a share of the run."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class EMA:
    """Averages of named networks: after step k, average <- d average + (1 - d) weights.

    d = min(exp(-1 / horizon), k / (k + 1) ...): until k reaches the ``horizon`` (in steps) it is the plain mean of all
    weights so far, so that the first averages are not the initial weights. Buffers are copied as they are.
    """

    def __init__(self, networks: dict[str, nn.Module], horizon: float):
        self.horizon = horizon
        self.networks = {name: copy.deepcopy(net).eval().requires_grad_(False) for name, net in networks.items()}

    def decay(self, step: int) -> float:
        return min(math.exp(-1 / self.horizon), step / (step + 1)) if self.horizon > 0 else 0.0

    @torch.no_grad()
    def update(self, networks: dict[str, nn.Module], step: int) -> None:
        """Takes in the weights after optimiser step ``step`` (0 for the first)."""
        weight = 1 - self.decay(step)
        for name, average in self.networks.items():
            ours, theirs = list(average.parameters()), list(networks[name].parameters())
            torch._foreach_lerp_(ours, theirs, weight)
            for mine, new in zip(average.buffers(), networks[name].buffers()):
                mine.copy_(new)
