"""Samples and their features in shards of 1,000 that are whole or absent: what a restart finds it does not do again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from gengrad.data.images import as_bytes
from gengrad.evaluation.features import Extractor, Features
from gengrad.files import write_atomically
from gengrad.flows.flow import Flow

SIZE = 1000


class Shards:
    """The first ``n`` samples of ``flow`` at one setting, as bytes, in ``folder``; ``features`` of them beside.

    Shard k holds samples 1000 k .. 1000 k + 999, the last one fewer. Processes take every ``world``-th shard; a file
    that is there, readable and of the right size is not made again.
    """

    def __init__(self, flow: Flow, folder: Path, n: int, *, rank: int = 0, world: int = 1, **options):
        self.flow, self.folder, self.n, self.options = flow, folder, n, options
        self.own = range(rank, self.count, world)

    @property
    def count(self) -> int:
        return -(-self.n // SIZE)

    def _length(self, k: int) -> int:
        return min(SIZE, self.n - k * SIZE)

    def draw(self, told: Callable[[int], None] | None = None) -> int:
        """Draws this process's shards that are missing; returns how many. ``told``: called with the samples so far."""
        drawn = 0
        for k in self.own:
            file = self.folder / f"{k:06d}.safetensors"
            if _read(file, "images", self._length(k)) is None:
                found = self.flow.draw_samples(self._length(k), first=k * SIZE, chunk=SIZE, **self.options)
                bill = {"nfe": repr(found.nfe), **{name: repr(count) for name, count in found.others.items()}}
                write_atomically(file, tensors_to_bytes({"images": as_bytes(found.x)}, metadata=bill))
                drawn += 1
                if told:
                    told(k * SIZE + self._length(k))
        return drawn

    def extract(self, extract: Extractor, told: Callable[[int], None] | None = None) -> int:
        """Computes the features of this process's shards that have none yet; returns how many. ``told`` as above."""
        made = 0
        for k in self.own:
            file = self._features_file(extract, k)
            if _read(file, "features", self._length(k)) is None:
                features = extract(_read(self.folder / f"{k:06d}.safetensors", "images", self._length(k)))
                tensors = {"features": features.x.contiguous()}
                if features.logits is not None:
                    tensors["logits"] = features.logits.contiguous()
                write_atomically(file, tensors_to_bytes(tensors))
                made += 1
                if told:
                    told(k * SIZE + self._length(k))
        return made

    def features(self, extract: Extractor) -> Iterator[Features]:
        """All processes' features, shard by shard."""
        for k in range(self.count):
            file = self._features_file(extract, k)
            yield Features(_read(file, "features", self._length(k)), _read(file, "logits", self._length(k)))

    def _features_file(self, extract: Extractor, k: int) -> Path:
        return self.folder / f"features-{extract.key[:16]}" / f"{k:06d}.safetensors"

    def images(self) -> Tensor:
        """All samples as bytes (n, c, h, w)."""
        files = [self.folder / f"{k:06d}.safetensors" for k in range(self.count)]
        return torch.cat([_read(file, "images", self._length(k)) for k, file in enumerate(files)])

    @property
    def bill(self) -> dict[str, float]:
        """Evaluations per sample as counted while they were drawn: "nfe", and other networks by name."""
        with safe_open(self.folder / "000000.safetensors", "pt") as stored:
            return {name: float(count) for name, count in stored.metadata().items()}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(file: Path, name: str, length: int) -> Tensor | None:
    """A tensor of a shard, or None where the file or the tensor is missing, damaged or of another length."""
    try:
        with safe_open(file, "pt") as stored:
            found = stored.get_tensor(name)
    except (OSError, SafetensorError):
        return None
    return found if len(found) == length else None
