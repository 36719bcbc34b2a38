"""Where new molecules come from: a proposer makes them from parents, whatever its way, and knows no objective."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field

from gengrad.molecules.described import describe
from gengrad.molecules.library import library
from gengrad.molecules.metrics import tanimoto
from gengrad.molecules.prepare import prepare
from gengrad.molecules.reading import read_molecules
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


@PROPOSERS.register("screen")
class Screen(Proposer):
    """Makes nothing: one of the ``nearest`` molecules (Tanimoto, Morgan 2) of a file or the library to a parent."""

    class Config(Settings):
        path: str | None = None  # a file of molecules; none: the library
        column: str | None = None
        library: int = Field(20_000, ge=1, le=1_000_000)
        nearest: int = Field(200, ge=1)

    def __init__(self, config=None, **settings):
        super().__init__(config, **settings)
        self._processes, self._timeout, self._shelf = 1, 10.0, None
        self._near: dict[str, list[int]] = {}

    @contextmanager
    def ready(self, processes=1, timeout=10.0):
        self._processes, self._timeout = processes, timeout
        yield self

    def _shelves(self):
        """The molecules on offer, looked at once."""
        if self._shelf is None:
            c = self.config
            if c.path is None:
                texts = library(c.library)
            else:
                texts = prepare(read_molecules(c.path, c.column).rows, processes=self._processes).smiles
                if not texts:
                    raise ValueError(f"{c.path}: no molecule in it; `gengrad molecules prepare` says why")
            self._shelf = describe(texts, (), self._processes, self._timeout)
        return self._shelf

    def propose(self, parents, n, generator):
        shelf = self._shelves()
        unknown = [text for text in dict.fromkeys(parents) if text not in self._near]
        if unknown:
            seen = describe(unknown, (), self._processes, self._timeout)
            for text, bits in zip([text for text, valid in zip(unknown, seen.valid) if valid], seen.fingerprints):
                likeness = tanimoto(bits[None], shelf.fingerprints)[0]
                self._near[text] = likeness.argsort(descending=True, stable=True)[: self.config.nearest].tolist()
        places = torch.randint(len(parents), (n,), generator=generator).tolist()
        chances = torch.rand(n, generator=generator).tolist()
        found = []
        for place, chance in zip(places, chances):
            near = self._near.get(parents[place], [])
            found.append(Proposal(shelf.smiles[near[int(chance * len(near))]] if near else None, place))
        return found
