"""What a method is to the training loop: stages in order, each an optimisation problem that leaves a transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gengrad.data.base import Distribution
from gengrad.flows.flow import Flow
from gengrad.flows.transports import Transport
from gengrad.registry import Configured


@dataclass(frozen=True)
class Part:
    """The rows of the global batch of ``size`` that this process computes at ``step`` (counted within the stage).

    Where gradients are accumulated, one ``piece`` of ``pieces`` of the process's share at a time.
    """

    step: int
    size: int
    rank: int = 0
    world: int = 1
    piece: int = 0
    pieces: int = 1

    def share(self) -> slice:
        """The rows of this process, all pieces of them: what its couplings see."""
        share = self.size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def within(self) -> slice:
        """The rows of the piece, counted from the start of the share."""
        size = self.size // self.world // self.pieces
        return slice(self.piece * size, (self.piece + 1) * size)

    def rows(self) -> slice:
        """The rows of the piece in the global batch."""
        start, piece = self.share().start, self.within()
        return slice(start + piece.start, start + piece.stop)


@dataclass(frozen=True)
class Problem:
    """What a method is asked to do: carry ``source`` to ``target`` with networks that ``make_network`` builds."""

    source: Distribution
    target: Distribution
    make_network: Callable[[], nn.Module]
    seed: int
    steps: int  # optimiser steps of the whole run
    batch_size: int  # global
    device: torch.device
    classes: int | None = None  # labels that the network takes; none: it is not trained on labels


class Stage(ABC):
    """One optimisation problem: named networks, a number of steps and an objective.

    Draws come from the generator handed in and from streams keyed by the seed, so that a stage needs to save only
    what is not a function of (seed, step): nothing, unless it overrides ``state``.
    """

    name: str
    steps: int
    networks: dict[str, nn.Module]
    averages: dict[str, nn.Module]  # their averaged weights, which the fitter puts here
    replaces = False  # whether its transport has taken in the flow's last one and stands in its place

    @abstractmethod
    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, logs) of this process's rows. ``networks``: the stage's, as wrapped for several processes.

        A log whose name ends in ``_seconds`` is the time that this call took; the sum over the steps since is written.
        """

    @abstractmethod
    def transport(self, networks: dict[str, nn.Module]) -> Transport:
        """What this stage adds to the flow, made of the given (averaged) networks."""

    def state(self) -> dict:
        """State beyond networks and step, by name: tensors and JSON values."""
        return {}

    def summary(self) -> dict[str, float]:
        """What is worth a line when the stage has ended, after its last ``transport``: numbers by name."""
        return {}

    def load_state(self, state: dict) -> None:  # noqa: B027 - a stage without state has nothing to take back
        """Takes back what ``state`` gave."""


class Method(Configured, ABC):
    """How a transport is learned. One file, one class, its ``Config`` the schema of ``method:`` in the YAML."""

    learns: ClassVar[str] = "velocity"  # the kind of network it trains, which ``network:`` must name one of

    def batches(self) -> dict[str, tuple[int, bool]]:
        """Batches it takes besides ``train.batch_size``: key -> (size, whether the processes share it out)."""
        return {}

    def plans(self, batch_size: int, source_size: int, target_size: int) -> dict[str, tuple[int, int]]:
        """Transport problems it solves with a ``train.batch_size``: "key=size", as given -> (rows, columns).

        ``source_size``, ``target_size``: how many points these have, 0 where they are densities.
        """
        return {}

    def least_nfe(self) -> int:
        """The fewest network evaluations that a sample of its flow takes."""
        return 1

    def refusals(self, network: dict) -> list[str]:
        """What is wrong with these settings for a network of those settings, one sentence each."""
        return []

    def objections(self, source: Distribution, target: Distribution) -> list[str]:
        """Why it cannot carry this source to this target; nothing is started where there is a reason."""
        return []

    @abstractmethod
    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        """The stages in order; when the next one is asked for, ``flow`` holds the transports of those before."""
