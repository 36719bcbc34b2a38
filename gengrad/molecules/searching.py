"""Baselines at an exact number of scorer calls: random screening, and a graph-based genetic algorithm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import rdkit
import torch
from pydantic import Field

import gengrad
from gengrad.data.draws import generator_for
from gengrad.files import sha256_of, write_atomically, write_json
from gengrad.molecules.ledger import Ledger, Member, best
from gengrad.molecules.library import library
from gengrad.molecules.objective import load_objective
from gengrad.molecules.population import write_population, write_rows
from gengrad.molecules.prepare import prepare
from gengrad.molecules.progress import Progress, yields
from gengrad.molecules.proposers import Graph, Proposer
from gengrad.molecules.reading import read_molecules
from gengrad.registry import Settings, unknown

BASELINES = ("random", "graph-ga")
IDLE = 20  # generations without one new molecule, after which a search has come to its end


class Search(Settings):
    """``population``: of the genetic algorithm, and of the tables before and after; ``offspring`` of a generation."""

    population: int = Field(100, ge=1)
    offspring: int = Field(100, ge=1)


def run_baseline(
    method: str,
    objective_file: str | Path,
    calls: int,
    out: str | Path,
    *,
    start: str | Path | None = None,
    column: str | None = None,
    seed: int = 0,
    processes: int = 1,
    timeout: float = 10.0,
    settings: Search | None = None,
) -> dict:
    """Spends exactly ``calls`` scorer calls (different molecules scored) and writes the folder ``out``; its run.json.

    Files: calls.csv (every molecule scored, in order), population_before.csv, population_after.csv, steps.csv,
    objective.yaml, run.json, and calls.jsonl, from which the same command goes on after a cut, or with more calls.
    Everything but the times in run.json is a function of the arguments; ``processes`` changes no byte. Raises
    ``ValueError`` for an unknown method, a budget below 1, or a start file with too few molecules.
    """
    settings, out = settings or Search(), Path(out)
    if method not in BASELINES:
        raise ValueError(unknown("baseline", method, BASELINES))
    if calls < 1:
        raise ValueError(f"--calls {calls}: a search needs at least 1 scorer call")
    objective = load_objective(objective_file)
    head = search_head("baseline", objective_file, start, seed) | {"method": method, **settings.model_dump()}
    first = calls if method == "random" else min(settings.population, calls)
    molecules = starting(start, column, first, seed, processes, timeout)
    if method == "random" and len(molecules) < calls:
        raise ValueError(
            f"{start} has {len(molecules)} different molecules: --calls {calls} cannot all be spent on them"
        )
    ledger = Ledger(objective, calls, out / "calls.jsonl", head)
    progress, began = Progress(ledger), time.monotonic()
    with ledger.open(processes, timeout):
        if method == "random":
            ended = random_screening(ledger, progress, molecules, settings)
        else:
            ended = graph_ga(ledger, progress, molecules, Graph(), seed, settings, processes, timeout)
    found = {**head, "calls": len(ledger.members), "budget": calls, "ended": ended, "resumed_after": ledger.resumed}
    after = best(ledger.members, settings.population, objective.settings.per_scaffold)
    before = [m for m in ledger.members if m.step == 0][: settings.population]
    return write_folder(out, objective_file, ledger, progress, before, after, found, time.monotonic() - began)


def starting(path, column: str | None, n: int, seed: int, processes: int, timeout: float) -> list[str]:
    """n of a file's molecules (standardised, each once) in an order drawn by ``seed``, or of the library."""
    if path is None:
        return library(n, seed)
    rows = read_molecules(path, column).rows
    kept = prepare(rows, processes=processes, timeout=timeout).smiles
    if not kept:
        raise ValueError(f"{path}: none of {len(rows)} rows is a molecule; `gengrad molecules prepare` says why")
    order = torch.randperm(len(kept), generator=generator_for(seed, "start of a search")).tolist()
    return [kept[i] for i in order[:n]]


def random_screening(ledger: Ledger, progress: Progress, molecules: Sequence[str], settings: Search) -> str:
    """Scores the molecules as they come, in steps of ``population``; says how it ended."""
    for step, at in enumerate(range(0, len(molecules), settings.population)):
        batch = molecules[at : at + settings.population]
        progress.spend(proposed=len(batch), valid=len(batch), new=len(batch))
        ledger.score(batch, [None] * len(batch), step)
        progress.note(step)
    return "budget spent"


def graph_ga(
    ledger: Ledger,
    progress: Progress,
    molecules: Sequence[str],
    proposer: Proposer,
    seed: int,
    settings: Search,
    processes: int = 1,
    timeout: float = 10.0,
) -> str:
    """Jensen (2019): parents drawn in proportion to their total, the best of parents and children live on.

    The first generation are ``molecules``; at most ``per_scaffold`` of a scaffold live on, where the objective says so.
    """
    limit = ledger.objective.settings.per_scaffold
    progress.spend(proposed=len(molecules), valid=len(molecules), new=len(molecules))
    alive = best(ledger.score(molecules, [None] * len(molecules), 0), settings.population, limit)
    progress.note(0)
    idle, generation = 0, 0
    with proposer.ready(processes, timeout):
        while ledger.left and idle < IDLE:
            generation += 1
            generator = generator_for(seed, "genetic algorithm", generation)
            pool = mating_pool(alive, settings.offspring, generator)
            proposals = proposer.propose([m.smiles for m in pool], settings.offspring, generator)
            valid = [(p.smiles, _origin(pool[p.parent])) for p in proposals if p.smiles is not None]
            new = {text: origin for text, origin in reversed(valid) if text not in ledger}
            new = {text: new[text] for text, _ in valid if text in new}
            progress.spend(proposed=len(proposals), valid=len(valid), new=len(new))
            children = ledger.score(list(new), list(new.values()), generation)
            idle = 0 if children else idle + 1
            alive = best([*alive, *children], settings.population, limit)
            if children:
                progress.note(generation)
    return "budget spent" if not ledger.left else f"{IDLE} generations brought no new molecule"


def mating_pool(alive: Sequence[Member], n: int, generator: torch.Generator) -> list[Member]:
    """n members drawn with replacement in proportion to their totals; all alike when no total is above 0."""
    totals = torch.tensor([max(m.total, 0.0) for m in alive], dtype=torch.float64)
    weights = totals if totals.sum() > 0 else torch.ones_like(totals)
    return [alive[i] for i in torch.multinomial(weights, n, replacement=True, generator=generator).tolist()]


def _origin(member: Member) -> int:
    """The id of the molecule of the starting population that a child of ``member`` comes from."""
    return member.id if member.parent is None else member.parent


def search_head(command: str, objective_file, start, seed: int) -> dict:
    """What a journal must agree in with the command that goes on with it."""
    return {
        "command": command,
        "objective_sha256": sha256_of(objective_file),
        "start": "library" if start is None else Path(start).name,
        "start_sha256": None if start is None else sha256_of(start),
        "seed": seed,
        "gengrad": gengrad.__version__,
        "rdkit": rdkit.__version__,
    }


def write_folder(
    out: Path,
    objective_file,
    ledger: Ledger,
    progress: Progress,
    before: Sequence[Member],
    after: Sequence[Member],
    found: dict,
    seconds: float,
) -> dict:
    """The tables and run.json of a search; returns what run.json holds."""
    write_atomically(out / "objective.yaml", Path(objective_file).read_bytes())
    for name, members in (("calls", ledger.members), ("population_before", before), ("population_after", after)):
        write_population(out / f"{name}.csv", ledger, members, found["seed"])
    write_rows(out / "steps.csv", progress.rows)
    last = {k: None if v != v else v for k, v in progress.rows[-1].items()} if progress.rows else {}
    report = {**found, "yield": yields(ledger, progress.spent), "last_step": last, "seconds": round(seconds, 2)}
    write_json(out / "run.json", report)
    return report
