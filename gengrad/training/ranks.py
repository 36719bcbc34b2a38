"""The processes of a run, as few functions as possible: who am I, wait for all, tell all, fail together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's ``rank`` among ``world``; ``gather_object`` gives all ranks' objects to all."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None
    gather_object: Callable[[Any], list] = lambda value: [value]

    @classmethod
    def of_process_group(cls) -> Ranks:
        """The ranks of ``torch.distributed``, or the single process when no group was started."""
        import torch.distributed as group

        if not (group.is_available() and group.is_initialized()):
            return cls()

        def gather(value: object) -> list:
            values = [None] * group.get_world_size()
            group.all_gather_object(values, value)
            return values

        return cls(group.get_rank(), group.get_world_size(), group.barrier, gather)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what all share."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest ``value`` of all ranks."""
        return max(self.gather_object(value))


def together(ranks: Ranks, action: Callable[[], T], errors: tuple[type[Exception], ...]) -> list[T]:
    """Run ``action`` on every rank and return all results; a failure on any raises the same exception on all.

    ``errors`` are the classes (built from one message) to choose from: the first that a failure is an
    instance of, else the last. Every rank must call it, or the others wait.
    """
    result, told, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        if ranks.world == 1 and isinstance(error, errors):
            raise
        kind = next((i for i, cls in enumerate(errors) if isinstance(error, cls)), len(errors) - 1)
        text = str(error) if isinstance(error, errors) else f"{type(error).__name__}: {error}"
        # the exception itself stays here: ranks exchange plain values only
        told, cause = (kind, text), error
    outcomes = ranks.gather_object((result, told))
    failures = [(rank, *told) for rank, (_, told) in enumerate(outcomes) if told]
    if not failures:
        return [value for value, _ in outcomes]
    lines = [f"rank {rank} of {ranks.world}: {text}" if ranks.world > 1 else text for rank, _, text in failures]
    if len(failures) == ranks.world and len({text for _, _, text in failures}) == 1:
        lines = [failures[0][2]]  # the same mistake everywhere is said once
    raise errors[min(kind for _, kind, _ in failures)]("\n".join(lines)) from cause
