"""The time predictor of NSGF++: how far along the clock is this sample?"""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gengrad.registry import Configured, Settings


class TimePredictor(nn.Module, Configured):
    """t_phi(x) in (0, 1), shape (batch,): convolutions for images (c, h, w), a perceptron for points (d,).

    Trained on x_t = t x_1 + (1 - t) x_0 to give back t (arXiv 2401.14069, algorithm 3). Noise shows in every patch of
    an image, so that few convolutions and a mean over all places tell the time.
    """

    class Config(Settings):
        width: int = Field(32, ge=1)
        depth: int = Field(3, ge=1)

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...], **settings):
        nn.Module.__init__(self)
        Configured.__init__(self, config, **settings)
        self.event_shape = tuple(event_shape)
        c, image = self.config, len(event_shape) == 3
        width = event_shape[0] if image else prod(event_shape)
        layers: list[nn.Module] = []
        for level in range(c.depth):
            stride = 2 if image and level else 1
            layers.append(nn.Conv2d(width, c.width, 3, stride, 1) if image else nn.Linear(width, c.width))
            width = c.width
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x if len(self.event_shape) == 3 else x.flatten(1)
        for layer in self.layers:
            h = F.silu(layer(h))
        return self.head(h.flatten(2).mean(2) if h.dim() == 4 else h).squeeze(1).float().sigmoid()
