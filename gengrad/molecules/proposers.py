"""Where new molecules come from: a proposer makes them from parents, whatever its way, and knows no objective."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

from gengrad.files import sha256_of
from gengrad.molecules.described import describe
from gengrad.molecules.library import library
from gengrad.molecules.metrics import tanimoto
from gengrad.molecules.objective import Objective
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
    asks checks it and counts it. ``with proposer.ready(processes, timeout, objective):`` around many calls keeps its
    processes, and says what is searched for. ``digest`` tells apart what it reads beside its settings.
    """

    @contextmanager
    def ready(self, processes: int = 1, timeout: float = 10.0, objective: Objective | None = None):
        yield self

    def digest(self) -> str | None:
        return None

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
    def ready(self, processes=1, timeout=10.0, objective=None):
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
        path = self.config.path
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"proposer screen: no molecule file at {path!r} (looked in {Path.cwd()})")
        self._processes, self._timeout, self._shelf = 1, 10.0, None
        self._near: dict[str, list[int]] = {}

    @contextmanager
    def ready(self, processes=1, timeout=10.0, objective=None):
        self._processes, self._timeout = processes, timeout
        self._on_offer()
        yield self

    def digest(self):
        return None if self.config.path is None else sha256_of(self.config.path)

    def _on_offer(self):
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
        shelf = self._on_offer()
        unknown = [text for text in dict.fromkeys(parents) if text not in self._near]
        if unknown:
            seen = describe(unknown, (), self._processes, self._timeout)
            for text, bits in zip([text for text, valid in zip(unknown, seen.valid) if valid], seen.fingerprints):
                order = tanimoto(bits[None], shelf.fingerprints)[0].argsort(descending=True, stable=True).tolist()
                self._near[text] = [i for i in order if shelf.smiles[i] != text][: self.config.nearest]
        places = torch.randint(len(parents), (n,), generator=generator).tolist()
        chances = torch.rand(n, generator=generator).tolist()
        found = []
        for place, chance in zip(places, chances):
            near = self._near.get(parents[place], [])
            found.append(Proposal(shelf.smiles[near[int(chance * len(near))]] if near else None, place))
        return found
