"""Atoms of mass: one point or a few, where flows that split mass start or end."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.data.gaussians import Positive, Vector
from gengrad.registry import DATASETS, Settings


@DATASETS.register("diracs")
class Diracs(Distribution):
    """sum_k w_k delta_(a_k). A point of one number stands for the event with that number in all coordinates.

    ``points: [[0]]`` is the Dirac at the origin of any space, points or images.
    """

    takes_event_shape = True
    event_shape = (2,)

    class Config(Settings):
        points: Annotated[list[Vector], Field(min_length=1)] = [[-1.0], [1.0]]
        # relative weights of the points, scaled to sum to one; None: equal
        weights: list[Positive] | None = None

        @field_validator("points")
        @classmethod
        def _one_length(cls, points: list[Vector]) -> list[Vector]:
            if len(lengths := sorted({len(point) for point in points})) > 1:
                raise ValueError(f"all points need as many coordinates; these have {lengths}")
            return points

        @field_validator("weights")
        @classmethod
        def _one_per_point(cls, weights: list | None, info: ValidationInfo) -> list | None:
            if weights is not None and "points" in info.data and len(weights) != len(info.data["points"]):
                raise ValueError(f"{len(weights)} weights for {len(info.data['points'])} points")
            return weights

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...] | None = None, **settings):
        own = (config if config is not None else self.Config(**settings)).points[0]
        if event_shape is None and len(own) > 1:
            event_shape = (len(own),)
        super().__init__(config, event_shape=event_shape, **settings)

    def prepare(self) -> None:
        points, size = torch.tensor(self.config.points), math.prod(self.event_shape)
        if points.shape[1] not in (1, size):
            raise ValueError(
                f"data set 'diracs': points with {points.shape[1]} coordinates where the other end has events of shape "
                f"{self.event_shape}; give {size} coordinates, or one for all of them"
            )
        self.atoms = points.expand(len(points), size).reshape(len(points), *self.event_shape)
        self.weights = torch.tensor(self.config.weights or [1.0] * len(points))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.atoms[torch.multinomial(self.weights, n, replacement=True, generator=generator)]
