"""What the checkpoint tests share: bitwise comparison, known states, ranks as threads, and a store that can die."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from gengrad.training.checkpoint import CheckpointStore, Ranks

POINTS = {  # named points of a save, by the rank that passes them
    0: [
        *("begun", "directory_made", "shared_written", "rank_written", "gathered", "manifest_written"),
        *("synced", "renamed", "committed", "doomed", "pruned"),
    ],
    1: ["rank_written", "gathered", "committed"],
}


def same(a, b) -> bool:
    """Equal in types, keys, order of keys, dtypes, shapes and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)  # tells -0.0 from 0.0


def bits(tensor: torch.Tensor) -> bytes:
    fresh = torch.cat([tensor.detach().reshape(-1)])  # an empty or one-element tensor may have any strides
    return fresh.view(torch.uint8).numpy().tobytes()


def shared_state(step: int, size: int = 4096) -> dict:
    """A state that tells its step everywhere: parts of two different saves never pass for one."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(size, generator=generator)
    return {"step": step, "networks": {"velocity": {"weight": weight, "steps": torch.tensor(step)}}, "list": [step]}


def rank_state(step: int, rank: int) -> dict:
    return {"step": step, "rank": rank, "noise": torch.full((64,), step * 100 + rank)}


def fits(found, rank: int | None, size: int = 4096) -> bool:
    """Whether a checkpoint holds exactly the state of its step."""
    expected = None if rank is None else rank_state(found.step, rank)
    return same(found.shared, shared_state(found.step, size)) and same(found.rank, expected)


class MortalStore(CheckpointStore):
    """Kills its process at one named point of the save of one step."""

    def __init__(self, *args, dies_at: tuple[int, str] | None = None, **settings):
        super().__init__(*args, **settings)
        self.dies_at, self.saving = dies_at, -1

    def save(self, step, *args):
        self.saving = step
        return super().save(step, *args)

    def _point(self, name: str) -> None:
        if self.dies_at == (self.saving, name):
            os.kill(os.getpid(), signal.SIGKILL)


def in_ranks(world: int, run: Callable[[Ranks], object]) -> list:
    """``run(ranks)`` in ``world`` threads that gather from each other; gives each one's result or exception."""
    barrier, slots, results = threading.Barrier(world, timeout=30), [None] * world, [None] * world

    def work(rank: int) -> None:
        def gather(value):
            slots[rank] = value
            barrier.wait()
            values = list(slots)
            barrier.wait()
            return values

        try:
            results[rank] = run(Ranks(rank, world, barrier.wait, gather))
        except Exception as error:
            results[rank] = error
            if isinstance(error, threading.BrokenBarrierError):
                barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def load_in_ranks(directory, world: int) -> list:
    """What each of ``world`` ranks loads, or the exception that it gets."""
    return in_ranks(world, lambda ranks: CheckpointStore(directory, ranks=ranks).load_latest())


def save_steps(directory: Path, steps, world: int = 1, size: int = 4096, keep: int = 2) -> None:
    def save(ranks):
        store = CheckpointStore(directory, keep, ranks)
        for step in steps:
            store.save(step, shared_state(step, size), rank_state(step, ranks.rank))

    for result in in_ranks(world, save):
        assert result is None, result


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
