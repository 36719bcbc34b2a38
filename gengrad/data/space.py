"""No data at all: the functional alone says where mass goes."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.registry import DATASETS, Settings


@DATASETS.register("space")
class Space(Distribution):
    """R^d with no samples and no density: for flows whose end the functional decides, as that of an equation."""

    has_samples = False

    class Config(Settings):
        dimension: int = Field(2, ge=1)

    def prepare(self) -> None:
        self.event_shape = (self.config.dimension,)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        raise ValueError("data 'space' has no samples: the functional alone decides where this flow ends")
