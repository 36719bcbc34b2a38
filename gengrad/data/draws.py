"""Randomness as a function of keys: which draw comes at which place never depends on batch size or process count.

Everything random in gengrad starts from ``generator_for(seed, purpose, *numbers)``; a long sequence of draws is a
``Stream``, whose element ``i`` is the same however the sequence is cut into batches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gengrad.data.base import Distribution, FiniteData
from gengrad.data.gaussians import StandardNormal

BLOCK = 256  # draws that share one generator: large enough to be fast, small enough to waste little at the ends


def generator_for(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded by a hash of ``(seed, purpose, *numbers)``; different keys are independent."""
    key = repr((int(seed), purpose, *map(int, numbers))).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def draw(distribution: Distribution, start: int, stop: int, seed: int, purpose: str) -> Tensor:
    """Draws ``start`` .. ``stop - 1`` of the sequence keyed by ``(seed, purpose)``, shape (stop - start, *event).

    The sequence is cut into blocks of 256 with a generator each, so draw ``i`` is the same in any range that holds it.
    """
    if stop <= start:
        return torch.empty(0, *distribution.event_shape)
    first, last = start // BLOCK, (stop - 1) // BLOCK
    blocks = [distribution.sample(BLOCK, generator_for(seed, purpose, b)) for b in range(first, last + 1)]
    return torch.cat(blocks)[start - first * BLOCK : stop - first * BLOCK]


def draw_labels(weights: Tensor, start: int, stop: int, seed: int) -> Tensor:
    """Labels ``start`` .. ``stop - 1`` of the sequence keyed by ``seed``, int64; class c comes with weights[c]."""
    first, last = start // BLOCK, (stop - 1) // BLOCK
    blocks = [
        torch.multinomial(weights, BLOCK, replacement=True, generator=generator_for(seed, "labels", b))
        for b in range(first, last + 1)
    ]
    return torch.cat(blocks)[start - first * BLOCK : stop - first * BLOCK]


@dataclass(frozen=True)
class Keyed:
    """Noise that belongs to the samples ``start`` .. ``stop - 1``, keyed by ``(seed, purpose)``.

    In the place of a generator where each sample must meet the same noise in whatever batch it comes.
    """

    start: int
    stop: int
    seed: int
    purpose: str

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws (stop - start, *shape) on the CPU; the same at every call."""
        return draw(StandardNormal(event_shape=shape), self.start, self.stop, self.seed, self.purpose)


class Shuffle:
    """An endless sequence of indices below ``size``: shuffled epochs, each visiting every index once.

    Element ``i`` is a pure function of ``(size, seed, purpose, i)``.
    """

    def __init__(self, size: int, seed: int, purpose: str):
        self.size, self.seed, self.purpose = size, seed, purpose
        # at most two epochs meet in one batch unless the batch is larger than an epoch
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(self.size, generator=generator_for(self.seed, self.purpose, epoch))

    def take(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` .. ``stop - 1``, int64."""
        position, parts = start, []
        while position < stop:
            epoch, offset = divmod(position, self.size)
            parts.append(self._epoch(epoch)[offset : offset + stop - position])
            position += len(parts[-1])
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


class Stream:
    """The endless training sequence of a distribution: fresh draws of a density, shuffled epochs of finite data.

    Element ``i`` is a pure function of ``(seed, purpose, i)``: an interrupted run goes on exactly where it was, and
    two processes take disjoint slices of the sequence that one process would take whole.
    """

    def __init__(self, distribution: Distribution, seed: int, purpose: str):
        self.distribution, self.seed, self.purpose = distribution, seed, purpose
        self._order = Shuffle(len(distribution), seed, purpose)

    def take(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` .. ``stop - 1``, shape (stop - start, *event)."""
        if isinstance(self.distribution, FiniteData):
            return self.distribution.pick(self._order.take(start, stop))
        return draw(self.distribution, start, stop, self.seed, self.purpose)

    def labels(self, start: int, stop: int) -> Tensor:
        """The labels of elements ``start`` .. ``stop - 1`` of finite data that have some, int64."""
        return self.distribution.pick_labels(self._order.take(start, stop))
