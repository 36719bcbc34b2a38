"""Scoring a list of molecules by an objective: one line out for each line in, whatever happens to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gengrad.files import write_atomically
from gengrad.molecules.objective import Objective
from gengrad.molecules.prepare import standardise_rows, table
from gengrad.molecules.reading import Row, read_molecules
from gengrad.molecules.standard import Standard
from gengrad.molecules.workers import Workers
from gengrad.registry import settings_of

AS_WRITTEN = Standard(stereo=True)  # scores keep stereo, which a program may look at


@dataclass(frozen=True)
class Scores:
    """Per molecule, in the order given: raw properties, desirabilities, the total, filters held, scaffold, notes.

    ``total`` is 0 for a molecule that a filter refuses, and NaN where no component has a value. ``calls`` counts the
    different molecules that were scored.
    """

    properties: Tensor  # (n, scorers)
    desirabilities: Tensor  # (n, components)
    total: Tensor  # (n,)
    held: Tensor  # (n, filters), bool
    passed: Tensor  # (n,), bool
    scaffolds: list[str]
    notes: list[str]
    calls: int


def score(objective: Objective, smiles: Sequence[str], processes: int = 1, timeout: float = 10.0) -> Scores:
    """Scores every SMILES, equal ones once; ``timeout`` is in seconds per molecule for RDKit's properties."""
    unique = list(dict.fromkeys(smiles))
    properties, scaffolds, notes = raw_scores(objective, unique, processes, timeout)
    s, held, total, passed = judged(objective, properties)
    for i, row in enumerate(held.tolist()):
        notes[i] += [f"filter: {f}" for f, holds in zip(objective.filters, row) if not holds]
    if objective.settings.per_scaffold:
        _limit_scaffolds(objective.settings.per_scaffold, total, passed, scaffolds, notes)
    place = {text: i for i, text in enumerate(unique)}
    at = torch.tensor([place[text] for text in smiles], dtype=torch.long)
    return Scores(
        properties[at],
        s[at],
        total[at],
        held[at],
        passed[at],
        [scaffolds[i] for i in at.tolist()],
        ["; ".join(notes[i]) for i in at.tolist()],
        len(unique),
    )


def judged(objective: Objective, properties: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Desirabilities (n, components), filters held (n, filters), totals and passed (n,) of properties (n, scorers)."""
    s, held = objective.desirabilities(properties), objective.passes(properties)
    total = objective.totals(s)
    passed = held.all(1) & ~total.isnan()
    return s, held, torch.where(held.all(1), total, torch.zeros_like(total)), passed


@contextmanager
def ready(objective: Objective, processes: int = 1, timeout: float = 10.0):
    """Worker processes for ``raw_scores``, kept until the end of the block; they start when they are first needed."""
    settings = [settings_of(scorer) for scorer in objective.scorers if not scorer.outside]
    with ExitStack() as stack:
        for scorer in objective.scorers:
            if scorer.outside:
                stack.enter_context(scorer.kept(processes))
        yield stack.enter_context(Workers("score", {"scorers": settings}, processes, timeout))


def raw_scores(
    objective: Objective, smiles: list[str], processes: int, timeout: float, workers: Workers | None = None
) -> tuple[Tensor, list[str], list[list[str]]]:
    """Properties (n, scorers) in float64 with NaN, scaffolds, and for each molecule what went wrong.

    ``workers``: those of ``with ready(objective) as workers``, where many batches are scored one after the other.
    """
    if workers is None:
        with ready(objective, processes, timeout) as workers:
            return raw_scores(objective, smiles, processes, timeout, workers)
    inside = [i for i, scorer in enumerate(objective.scorers) if not scorer.outside]
    properties = torch.full((len(smiles), len(objective.scorers)), math.nan, dtype=torch.float64)
    scaffolds, notes = [""] * len(smiles), [[] for _ in smiles]
    for row, answer in enumerate(workers.map(smiles)):
        if answer.problem is not None:
            notes[row].append(answer.problem)
            continue
        properties[row, inside] = torch.tensor(answer.value["values"], dtype=torch.float64)
        scaffolds[row] = answer.value["scaffold"]
        problems = answer.value["problems"].items()
        notes[row] += [f"{objective.labels[inside[int(i)]]}: {problem}" for i, problem in problems]
    for i, scorer in enumerate(objective.scorers):
        if scorer.outside:
            for row, answer in enumerate(scorer.answers(smiles, processes)):
                if answer.problem is None:
                    properties[row, i] = answer.value
                else:
                    notes[row].append(f"{objective.labels[i]}: {answer.problem}")
    return properties, scaffolds, notes


def _limit_scaffolds(most: int, total: Tensor, passed: Tensor, scaffolds: list[str], notes: list[list[str]]) -> None:
    """Only the ``most`` best of each scaffold go on passing; equal ones in their order. Their totals stay."""
    seen: Counter = Counter()
    for i in sorted(passed.nonzero().flatten().tolist(), key=lambda i: (-total[i].item(), i)):
        seen[scaffolds[i]] += 1
        if seen[scaffolds[i]] > most:
            passed[i] = False
            notes[i].append(f"scaffold: {most} better ones have it")


def score_file(
    path: str | Path,
    objective: Objective,
    out: str | Path,
    *,
    column: str | None = None,
    processes: int = 1,
    timeout: float = 10.0,
) -> dict:
    """Writes the table ``out``, one line per row of the file and in its order; returns a summary.

    Columns: id, row, input, smiles, valid, every property, every desirability (``NAME.s``), total, passed, scaffold,
    notes. Raises ``ValueError``, after writing, when no row is a molecule or a scorer gave no value at all.
    """
    rows = read_molecules(path, column).rows
    results = standardise_rows(rows, AS_WRITTEN, processes, timeout)
    good = [i for i, result in enumerate(results) if not isinstance(result, ValueError)]
    scores = score(objective, [results[i][0] for i in good], processes, timeout)
    columns = [*objective.labels, *(f"{component.label}.s" for component in objective.components)]
    header = ["id", "row", "input", "smiles", "valid", *columns, "total", "passed", "scaffold", "notes"]
    write_atomically(out, table(header, _lines(rows, results, dict(zip(good, range(len(good)))), scores)))
    if not good:
        raise ValueError(f"{path}: none of {len(rows)} rows is a molecule; the reasons are in {out}")
    for label, values in zip(objective.labels, scores.properties.T):
        if values.isnan().all():
            first = next((note for note in scores.notes if note), "")
            raise ValueError(f"{label} has no value for any molecule ({first}); the rest is in {out}")
    s = {c.label: scores.desirabilities[:, i].nanmean().item() for i, c in enumerate(objective.components)}
    medians = {label: values.nanmedian().item() for label, values in zip(objective.labels, scores.properties.T)}
    refused = {str(f): int((~scores.held[:, i]).sum()) for i, f in enumerate(objective.filters)}
    return {
        "rows": len(rows),
        "valid": len(good),
        "calls": scores.calls,
        "passed": int(scores.passed.sum()),
        "median": medians,
        "mean_desirability": s,
        "refused": refused,
        "without_value": {k: int(v.isnan().sum()) for k, v in zip(objective.labels, scores.properties.T)},
    }


def _lines(rows: list[Row], results: list, place: dict[int, int], scores: Scores):
    width = scores.properties.shape[1] + scores.desirabilities.shape[1] + 1
    for i, (row, result) in enumerate(zip(rows, results)):
        start = [row.name, row.number, row.shown]
        if i not in place:
            yield [*start, None, 0, *[None] * width, 0, None, str(result)]
            continue
        k = place[i]
        numbers = [*scores.properties[k].tolist(), *scores.desirabilities[k].tolist(), scores.total[k].item()]
        yield [*start, result[0], 1, *numbers, int(scores.passed[k]), scores.scaffolds[k], scores.notes[k]]
