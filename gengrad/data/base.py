"""What a source or a target of mass is: something one can draw points or images from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from gengrad.registry import Configured, Settings

# squared distances of points up to here stay finite in float32, in a million dimensions too
LARGEST = 1e15


class Distribution(Configured, ABC):
    """A source or target of mass on events of one shape: ``(d,)`` points, or ``(c, h, w)`` images in [-1, 1].

    Draws depend on nothing but the generator, so that equal generators give equal draws. A density known in
    closed form also has ``log_density(x)``, (n, d) -> (n,).

    ``event_shape`` may be passed when it is built: noise without a shape of its own takes it
    (``takes_event_shape``), everything else checks it and raises ``ValueError`` where it does not agree.
    """

    takes_event_shape: ClassVar[bool] = False
    has_samples: ClassVar[bool] = True  # false for a target that is known by its density, or by a functional, alone
    event_shape: tuple[int, ...]
    # centres (k, d) of the modes, the share (k,) of mass each holds (None: equal shares), and the radius
    # within which a sample counts as belonging to one; modes None: it has none
    modes: Tensor | None = None
    mode_weights: Tensor | None = None
    mode_radius: float | None = None
    notes: tuple[str, ...] = ()  # what a user should know of how the data were read
    # (m, s) where the events are (x - m) / s of what the user gave: mean (*event) and one scale; None: as given
    units: tuple[Tensor, float] | None = None

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...] | None = None, **settings):
        super().__init__(config, **settings)
        if self.takes_event_shape and event_shape is not None:
            self.event_shape = tuple(int(size) for size in event_shape)
        self.prepare()
        own = tuple(self.event_shape)
        if event_shape is not None and tuple(event_shape) != own:
            raise ValueError(
                f"data set {self.name!r} has events of shape {own}, not {tuple(event_shape)}: source and target "
                "must have the same shape ('normal' and 'uniform' take any)"
            )

    def prepare(self) -> None:
        """Compute what draws need from ``self.config``; runs once, when the distribution is built."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent draws, float32, shape ``(n, *event_shape)``, on the CPU."""

    def restore(self, x: Tensor) -> Tensor:
        """Events in the units that the user gave: m + s x."""
        return x if self.units is None else self.units[0].to(x) + self.units[1] * x

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean (d,) and covariance (d, d), float64, where a Gaussian; pools of particles are made to have them."""
        return None

    def estimate(self, generator: torch.Generator) -> Distribution:
        """These data; or, where the log density is a sum over many rows, one with an unbiased estimate of it."""
        return self

    def table_of(self, x: Tensor) -> tuple[list[str], Tensor] | None:
        """(names of columns, rows) of samples x (n, *event) for a user's table; None: they are one as they are."""
        return None

    def score_samples(self, x: Tensor) -> dict[str, float]:
        """Figures of merit of samples x (n, *event) that only these data can tell; none by default."""
        return {}

    @property
    def is_image(self) -> bool:
        return len(self.event_shape) == 3

    def __len__(self) -> int:
        """Number of training points of finite data; 0 for a density that never runs out."""
        return 0


class FiniteData(Distribution):
    """Data that end: ``points`` (n, *event) to train on, ``held_out`` to evaluate, ``labels`` where known."""

    points: Tensor
    held_out: Tensor
    labels: Tensor | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.points.shape[1:])

    def __len__(self) -> int:
        return len(self.points)

    def pick(self, numbers: Tensor) -> Tensor:
        """Training points by number, 0 .. len(self) - 1, float32 (n, *event)."""
        return self.points[numbers]

    def pick_labels(self, numbers: Tensor) -> Tensor:
        """Their labels, int64 (n,)."""
        return self.labels[numbers]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` draws with replacement from the training points."""
        return self.pick(torch.randint(len(self), (n,), generator=generator))
