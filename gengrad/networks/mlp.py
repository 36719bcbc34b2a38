"""A plain perceptron with time as one more input: the velocity network of points in low dimension."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gengrad.registry import NETWORKS, Configured, Settings

ACTIVATIONS = {"selu": nn.SELU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def perceptron(inputs: int, width: int, depth: int, outputs: int, activation: str) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` units, each followed by the activation, and a linear layer."""
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs] + [width] * depth):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


@NETWORKS.register("mlp")
class MLP(nn.Module, Configured):
    """``net(x, t)``: ``depth`` hidden layers of ``width`` units on the concatenation of the flattened x and t.

    x: (batch, *event_shape); t: (batch,) in [0, 1]; returns a velocity of x's shape.
    """

    class Config(Settings):
        width: int = Field(64, ge=1)
        depth: int = Field(3, ge=1)
        activation: Literal["selu", "silu", "gelu", "tanh"] = "selu"

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...], **settings):
        nn.Module.__init__(self)
        Configured.__init__(self, config, **settings)
        self.event_shape = tuple(event_shape)
        size, c = prod(event_shape), self.config
        self.layers = perceptron(size + 1, c.width, c.depth, size, c.activation)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is not None:
            raise ValueError("the mlp network takes no class labels; leave y out")
        inputs = torch.cat([x.flatten(1), t.to(x.dtype).reshape(-1, 1).expand(len(x), 1)], dim=1)
        return self.layers(inputs).view_as(x)
