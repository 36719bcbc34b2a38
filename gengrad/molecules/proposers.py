"""Where new molecules come from: a proposer makes them from parents, whatever its way, and knows no objective."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field

from gengrad.molecules.workers import Workers
from gengrad.registry import PROPOSERS, Configured, Settings


@dataclass(frozen=True)
class Proposal:
    """A SMILES, None where nothing came out, and the place of its (first) parent among the parents given."""

    smiles: str | None
    parent: int


class Proposer(Configured):
    """Base of all: ``propose(parents, n, generator)`` gives n proposals, in order, a function of its arguments.

    Parents may be named several times, the better ones more often. A proposal may be invalid, or known already: who
    asks checks it and counts it. ``with proposer.ready(processes, timeout):`` around many calls keeps its processes.
    """

    @contextmanager
    def ready(self, processes: int = 1, timeout: float = 10.0):
        yield self

    def propose(self, parents: Sequence[str], n: int, generator: torch.Generator) -> list[Proposal]:
        raise NotImplementedError


@PROPOSERS.register("graph")
class Graph(Proposer):
    """Crossover and mutation of molecular graphs (Jensen 2019): of two parents mostly, of one by mutation alone.

    ``crossover``: the share of children of two parents; of these ``mutation_rate`` are mutated as well.
    """

    class Config(Settings):
        crossover: float = Field(0.8, ge=0, le=1)
        mutation_rate: float = Field(0.5, ge=0, le=1)
        max_atoms: int = Field(60, ge=2)  # heavy atoms

    def __init__(self, config=None, **settings):
        super().__init__(config, **settings)
        self._workers = Workers("breed", self.config.model_dump(include={"mutation_rate", "max_atoms"}))

    @contextmanager
    def ready(self, processes=1, timeout=10.0):
        self._workers.processes, self._workers.timeout = processes, timeout
        with self._workers:
            yield self

    def propose(self, parents, n, generator):
        pairs = torch.randint(len(parents), (n, 2), generator=generator).tolist()
        both = (torch.rand(n, generator=generator) < self.config.crossover).tolist()
        seeds = torch.randint(2**62, (n,), generator=generator).tolist()
        items = [
            (parents[a], parents[b] if two and parents[a] != parents[b] else None, seed)
            for (a, b), two, seed in zip(pairs, both, seeds)
        ]
        answers = self._workers.map(items)
        return [Proposal(None if x.problem is not None else x.value, a) for x, (a, _) in zip(answers, pairs)]
