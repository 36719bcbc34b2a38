"""The table of a population, one molecule on each line, and reading one back whoever wrote it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gengrad.files import write_atomically
from gengrad.molecules.ledger import Ledger, Member
from gengrad.molecules.prepare import table
from gengrad.molecules.progress import tanimoto_of
from gengrad.molecules.reading import read_molecules

FIRST = ("id", "parent", "smiles", "valid")
LAST = ("total", "passed", "similarity", "scaffold", "step", "seed", "notes")


def write_population(path: Path, ledger: Ledger, members: Sequence[Member], seed: int) -> None:
    """Columns: id, parent, smiles, valid, every property, every desirability (``NAME.s``), total, passed,
    similarity, scaffold, step, seed, notes.

    ``parent`` is the id of the molecule of the starting population that this one comes from, ``similarity`` the
    Tanimoto similarity to it (Morgan 2, 2048); both are empty for one that was there from the start.
    """
    objective = ledger.objective
    header = [*FIRST, *objective.labels, *(f"{c.label}.s" for c in objective.components), *LAST]
    write_atomically(path, table(header, (_line(ledger, member, seed) for member in members)))


def _line(ledger: Ledger, m: Member, seed: int) -> list:
    near = None if m.parent is None else tanimoto_of(ledger.members[m.parent].smiles, m.smiles)
    numbers = [*m.properties, *m.desirabilities, m.total]
    return [m.id, m.parent, m.smiles, 1, *numbers, int(m.passed), near, m.scaffold, m.step, seed, "; ".join(m.notes)]


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Dictionaries of the same keys as a table."""
    write_atomically(path, table(list(rows[0]) if rows else [], (list(row.values()) for row in rows)))


@dataclass(frozen=True)
class Population:
    """A table as it was read: SMILES in the file's order, and every column of text by its lower-case name."""

    smiles: list[str]
    columns: dict[str, list[str]]

    def numbers(self, name: str) -> list[float] | None:
        """A column as floats, NaN for what is none; None when there is no such column or nothing in it."""
        values = [_number(text) for text in self.columns.get(name.lower(), [])]
        return values if any(value == value for value in values) else None


def read_population(path: str | Path, column: str | None = None) -> Population:
    """A population's table, or any file of molecules; raises ``ValueError`` when it has no SMILES or no row."""
    path = Path(path)
    contents = read_molecules(path, column)
    if any(row.kind != "smiles" for row in contents.rows):
        raise ValueError(f"{path}: a population is a table or a list of SMILES; `gengrad molecules prepare` makes one")
    if not contents.rows:
        raise ValueError(f"{path}: no molecule in it, only a header")
    smiles = [row.text for row in contents.rows]
    columns = {"id": [row.name for row in contents.rows], "smiles": smiles}
    if contents.delimiter is not None:
        columns |= _columns(path, contents)
    return Population(smiles, columns)


def _columns(path: Path, contents) -> dict[str, list[str]]:
    """Every column of a plain table; of a packed one those that reading found."""
    try:
        text = path.read_bytes().decode(contents.encoding)
    except UnicodeDecodeError:
        return {}
    lines = [line for line in csv.reader(io.StringIO(text), delimiter=contents.delimiter) if line]
    if len(lines) - 1 != len(contents.rows):
        return {}
    header = [name.strip().lower() for name in lines[0]]
    return {name: [line[i] if i < len(line) else "" for line in lines[1:]] for i, name in enumerate(header) if name}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
