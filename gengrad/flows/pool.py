"""The trajectory pool: particle paths that a network is trained on, with a stated memory bound."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TrajectoryPool:
    """A ring of particle paths; ``segments`` reads them at any time of the geodesic clock.

    Each path is ``states`` (len(times), n, *event) at the common ``times``; between two of them a particle moves
    straight, at the velocity w = (x_{k+1} - x_k) / (t_{k+1} - t_k) that a velocity network is to learn.
    The ring never holds more than ``capacity`` paths, nor more than ``memory_bound`` bytes: the oldest leave first.
    """

    times: Tensor
    capacity: int
    memory_bound: int
    dtype: torch.dtype = torch.float32
    _paths: list[Tensor] = field(default_factory=list)
    _labels: list[Tensor | None] = field(default_factory=list)

    def add(self, states: Tensor, labels: Tensor | None = None) -> None:
        """Takes in one batch of paths, with the classes (n,) of its particles where they have some.

        Raises ``ValueError`` when it alone exceeds the memory bound.
        """
        states = states.to(self.dtype)
        if (needed := states.nbytes) > self.memory_bound:
            raise ValueError(
                f"one batch of particle paths takes {needed / 2**20:.0f} MiB, more than the pool's bound of "
                f"{self.memory_bound / 2**20:.0f} MiB; lower method.ot_batch or method.flow_steps, or raise "
                "method.pool_memory_mb"
            )
        self._paths.append(states)
        self._labels.append(labels)
        while len(self._paths) > self.capacity or self.nbytes > self.memory_bound:
            del self._paths[0], self._labels[0]

    @property
    def nbytes(self) -> int:
        return sum(path.nbytes for path in self._paths)

    def __len__(self) -> int:
        """Number of particles whose paths are held."""
        return sum(path.shape[1] for path in self._paths)

    def segments(self, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, w): position and velocity of particle ``rows[i]`` at time ``t[i]``; rows (n,) int, t (n,) in [0, 1]."""
        k = (torch.searchsorted(self.times, t, right=True) - 1).clamp(0, len(self.times) - 2)
        size = self._paths[0].shape[1]  # all batches of one run have the same size
        batch, row = rows // size, rows % size
        before, after = self._read(batch, k, row), self._read(batch, k + 1, row)
        shape = (-1, *[1] * (before.dim() - 1))
        start, length = self.times[k], self.times[k + 1] - self.times[k]
        w = (after - before) / length.view(shape)
        return before + (t - start).view(shape) * w, w

    def labels(self, rows: Tensor) -> Tensor | None:
        """The classes of particles ``rows``, (n,); None where they were added without."""
        return None if self._labels[0] is None else torch.cat(self._labels)[rows]

    def _read(self, batch: Tensor, k: Tensor, row: Tensor) -> Tensor:
        if len(self._paths) == 1:
            return self._paths[0][k, row].float()
        found = torch.empty(len(row), *self._paths[0].shape[2:], device=self._paths[0].device)
        for number, path in enumerate(self._paths):
            chosen = batch == number
            found[chosen] = path[k[chosen], row[chosen]].float()
        return found
