"""The scorer's ledger: each different molecule is scored once, never more than the budget, none twice after a cut."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gengrad.files import decode_json
from gengrad.molecules.objective import Objective
from gengrad.molecules.scoring import judged, raw_scores, ready


@dataclass(frozen=True)
class Member:
    """One scored molecule. ``parent`` is the id of the one in the starting population that it comes from."""

    id: int
    smiles: str
    parent: int | None
    step: int
    properties: list[float]
    desirabilities: list[float]
    total: float
    passed: bool
    scaffold: str
    notes: list[str] = field(default_factory=list)


class Ledger:
    """Scores by an objective within ``budget`` molecules, and writes each one down in ``journal`` before going on.

    A journal that is there already, of the same ``head``, answers for the molecules in it without a call: a search
    that is a function of its seed then goes on where it was cut. Raises ``ValueError`` for another head.
    """

    def __init__(self, objective: Objective, budget: int, journal: Path | None = None, head: dict | None = None):
        self.objective, self.budget, self.members = objective, budget, []
        self._ids: dict[str, int] = {}
        self._known: dict[str, dict] = {}
        self._journal, self._head, self._file = journal, head or {}, None
        self.resumed = 0  # molecules that the journal answers for

    @property
    def left(self) -> int:
        return self.budget - len(self.members)

    def __contains__(self, smiles: str) -> bool:
        return smiles in self._ids

    def of(self, smiles: str) -> Member:
        return self.members[self._ids[smiles]]

    def open(self, processes: int = 1, timeout: float = 10.0) -> Ledger:
        """``with ledger.open(...):`` - worker processes and the journal, for this block alone."""
        self._processes, self._timeout = processes, timeout
        return self

    def __enter__(self) -> Ledger:
        with ExitStack() as stack:
            if self._journal is not None:
                self._file = stack.enter_context(_locked(self._journal))
                self._read()
            self._workers = stack.enter_context(ready(self.objective, self._processes, self._timeout))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _read(self) -> None:
        """Takes over what the journal holds; a last line that was cut off is dropped from it."""
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        lines = [decode_json(line, f"{self._journal}, line {i}") for i, line in enumerate(whole.splitlines(), 1)]
        if lines and lines[0] != self._head:
            other = [key for key in {**lines[0], **self._head} if lines[0].get(key) != self._head.get(key)]
            told = ", ".join(f"{key} {lines[0].get(key)!r}, now {self._head.get(key)!r}" for key in other)
            raise ValueError(
                f"{self._journal} is of another search ({told}): give another --out, or delete that folder"
            )
        self._known = {line["smiles"]: line for line in lines[1:]}
        self.resumed = len(self._known)
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not lines:
            self._write([self._head])

    def _write(self, lines: Sequence[dict]) -> None:
        if self._file is not None:
            self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())

    def score(self, smiles: Sequence[str], parents: Sequence[int | None], step: int) -> list[Member]:
        """The members of the SMILES (canonical, new ones) that the budget allows, from the first on, in order.

        Raises ``ValueError`` when one of the objective's properties has no value for any molecule so far: a search
        would be blind.
        """
        fresh = dict(zip(reversed(smiles), reversed(parents)))  # of equal ones the first's parent
        fresh = {text: fresh[text] for text in dict.fromkeys(smiles) if text not in self._ids}
        fresh = dict(list(fresh.items())[: self.left])
        unknown = [text for text in fresh if text not in self._known]
        if unknown:
            values, scaffolds, notes = raw_scores(
                self.objective, unknown, self._processes, self._timeout, self._workers
            )
            lines = [
                {"smiles": text, "values": [None if v != v else v for v in row], "scaffold": ring, "notes": note}
                for text, row, ring, note in zip(unknown, values.tolist(), scaffolds, notes)
            ]
            self._write(lines)
            self._known |= {line["smiles"]: line for line in lines}
        self._enter(fresh, step)
        self._check()
        return [self.of(text) for text in fresh]

    def _enter(self, fresh: dict[str, int | None], step: int) -> None:
        lines = [self._known[text] for text in fresh]
        rows = [[float("nan") if v is None else v for v in line["values"]] for line in lines]
        properties = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self.objective.scorers))
        s, held, total, passed = judged(self.objective, properties)
        for i, (line, parent) in enumerate(zip(lines, fresh.values())):
            refused = [f"filter: {f}" for f, holds in zip(self.objective.filters, held[i].tolist()) if not holds]
            self._ids[line["smiles"]] = len(self.members)
            self.members.append(
                Member(
                    len(self.members),
                    line["smiles"],
                    parent,
                    step,
                    rows[i],
                    s[i].tolist(),
                    total[i].item(),
                    bool(passed[i]),
                    line["scaffold"],
                    [*line["notes"], *refused],
                )
            )

    def _check(self) -> None:
        for column, label in enumerate(self.objective.labels):
            if self.members and all(m.properties[column] != m.properties[column] for m in self.members):
                first = next((note for m in self.members for note in m.notes), "no reason")
                raise ValueError(
                    f"{label} has no value for any of {len(self.members)} molecules ({first}): a search by it "
                    "would be blind. Mend the scorer; `gengrad molecules score` tries it on a file"
                )


def _locked(path: Path):
    """The journal, open for reading and writing, and nobody else's until it is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")  # noqa: SIM115 - lives as long as the ledger
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"{path} is being written by another process: wait for it, or give another --out") from None
    file.seek(0)
    return file


def best(members: Sequence[Member], k: int | None = None, per_scaffold: int | None = None) -> list[Member]:
    """The k members with the highest totals, at most ``per_scaffold`` of each scaffold; equal ones in their order.

    Those whose total is NaN, for which no component had a value, are left out.
    """
    found, seen = [], {}
    for member in sorted((m for m in members if m.total == m.total), key=lambda m: (-m.total, m.id)):
        seen[member.scaffold] = seen.get(member.scaffold, 0) + 1
        if per_scaffold is None or seen[member.scaffold] <= per_scaffold:
            found.append(member)
            if len(found) == k:
                break
    return found
