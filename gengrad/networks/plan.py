"""A map with a latent variable: where a particle goes may be drawn, so that an atom of mass can split."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gengrad.networks.mlp import perceptron
from gengrad.registry import NETWORKS, Configured, Settings


@NETWORKS.register("plan")
class Plan(nn.Module, Configured):
    """``net(x, z)`` = A w + perceptron(w), w = (x, z, z / |z|): the displacement of x (batch, *event_shape).

    z (batch, latent). The linear part makes dilations, and spheres out of atoms, exact. Linear and last layer start at
    ``start`` times their usual size: near zero, so that the plan is near the identity, but not at zero, where all
    images of one atom coincide and no gradient tells them apart.
    """

    learns = "plan"

    class Config(Settings):
        width: int = Field(128, ge=1)
        depth: int = Field(3, ge=1)
        activation: Literal["selu", "silu", "gelu", "tanh"] = "silu"
        latent: int | None = Field(None, ge=1)  # none: the dimension of x
        start: float = Field(0.01, gt=0)

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...], **settings):
        nn.Module.__init__(self)
        Configured.__init__(self, config, **settings)
        self.event_shape = tuple(event_shape)
        size, c = prod(event_shape), self.config
        self.latent = c.latent or size
        inputs = size + 2 * self.latent
        self.layers = perceptron(inputs, c.width, c.depth, size, c.activation)
        self.linear = nn.Linear(inputs, size, bias=False)
        with torch.no_grad():
            for parameter in (*self.layers[-1].parameters(), self.linear.weight):
                parameter.mul_(c.start)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if z.shape != (len(x), self.latent):
            raise ValueError(f"the plan network takes a latent of shape {(len(x), self.latent)}; got {tuple(z.shape)}")
        w = torch.cat([x.flatten(1), z, nn.functional.normalize(z)], dim=1)
        return (self.linear(w) + self.layers(w)).view_as(x)
