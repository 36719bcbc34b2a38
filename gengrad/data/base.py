"""What a source or a target of mass is: something one can draw points or images from."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gengrad.registry import Configured


class Distribution(Configured, ABC):
    """A source or target of mass on events of one shape: ``(d,)`` points, or ``(c, h, w)`` images in [-1, 1].

    Draws depend on nothing but the generator, so that equal generators give equal draws.
    """

    event_shape: tuple[int, ...]
    # centres (k, d) of the modes and the radius within which a sample counts as belonging to one; None: no modes
    modes: Tensor | None = None
    mode_radius: float | None = None

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent draws, float32, shape ``(n, *event_shape)``, on the CPU."""

    @property
    def is_image(self) -> bool:
        return len(self.event_shape) == 3

    def __len__(self) -> int:
        """Number of training points of finite data; 0 for a density that never runs out."""
        return 0


class FiniteData(Distribution):
    """Data that end: ``points`` (n, *event) to train on, ``held_out`` never seen in training, optional ``labels``."""

    points: Tensor
    held_out: Tensor
    labels: Tensor | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.points.shape[1:])

    def __len__(self) -> int:
        return len(self.points)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` draws with replacement from the training points."""
        return self.points[torch.randint(len(self.points), (n,), generator=generator)]
