"""From a file to a clean set: standardised, each molecule once, every other row in rejected.csv with its reason."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rdkit

import gengrad
from gengrad.files import sha256_of, write_atomically, write_json
from gengrad.molecules.reading import Row, read_molecules
from gengrad.molecules.standard import Standard
from gengrad.molecules.workers import Workers

KEPT = ("id", "row", "smiles", "input", "changes")
REJECTED = ("row", "id", "input", "reason")


@dataclass(frozen=True)
class Prepared:
    """``kept``: (row, SMILES, changes), ``rejected``: (row, reason); together every row once, in the file's order."""

    kept: list[tuple[Row, str, list[str]]] = field(default_factory=list)
    rejected: list[tuple[Row, str]] = field(default_factory=list)

    @property
    def smiles(self) -> list[str]:
        return [smiles for _, smiles, _ in self.kept]

    def reasons(self) -> dict[str, int]:
        """How often each reason came, most frequent first; details in brackets and numbers of rows left out."""
        short = (reason.partition(" (")[0].partition(" of row")[0] for _, reason in self.rejected)
        return dict(Counter(short).most_common())


def standardise_rows(
    rows: Sequence[Row], settings: Standard | None = None, processes: int = 1, timeout: float = 10.0
) -> list[tuple[str, list[str]] | ValueError]:
    """For each row its canonical SMILES and changes, or the reason as a ``ValueError``; same order and length."""
    task = (settings or Standard()).model_dump()
    answers = Workers("standardise", task, processes, timeout).map([(row.kind, row.text) for row in rows])
    return [ValueError(a.problem) if a.problem is not None else (a.value[0], a.value[1]) for a in answers]


def prepare(
    rows: Sequence[Row], settings: Standard | None = None, processes: int = 1, timeout: float = 10.0
) -> Prepared:
    """Standardises and keeps the first of equal molecules; ``timeout`` is in seconds for each molecule."""
    found, first = Prepared(), {}
    for row, result in zip(rows, standardise_rows(rows, settings, processes, timeout)):
        if isinstance(result, ValueError):
            found.rejected.append((row, str(result)))
        elif result[0] in first:
            found.rejected.append((row, f"duplicate of row {first[result[0]]}"))
        else:
            first[result[0]] = row.number
            found.kept.append((row, *result))
    return found


def prepare_file(
    path: str | Path,
    out: str | Path,
    *,
    column: str | None = None,
    settings: Standard | None = None,
    processes: int = 1,
    timeout: float = 10.0,
) -> dict:
    """Writes molecules.csv, rejected.csv and prepare.json into the folder ``out``; returns what prepare.json holds.

    Raises ``ValueError`` when no molecule is left, after writing why.
    """
    settings, out = settings or Standard(), Path(out)
    contents = read_molecules(path, column)
    out.mkdir(parents=True, exist_ok=True)  # refused now, if it is, and not after the work
    found = prepare(contents.rows, settings, processes, timeout)
    summary = {
        "input": str(path),
        "sha256": sha256_of(path),
        "encoding": contents.encoding,
        "column": contents.column,
        "delimiter": contents.delimiter,
        "rows": len(contents.rows),
        "kept": len(found.kept),
        "rejected": len(found.rejected),
        "reasons": found.reasons(),
        "changes": dict(Counter(change for _, _, changes in found.kept for change in changes).most_common()),
        "settings": settings.model_dump(),
        "gengrad": gengrad.__version__,
        "rdkit": rdkit.__version__,
    }
    kept = ((row.name, row.number, smiles, row.shown, "; ".join(changes)) for row, smiles, changes in found.kept)
    rejected = ((row.number, row.name, row.shown, reason) for row, reason in found.rejected)
    write_atomically(out / "rejected.csv", table(REJECTED, rejected))
    if not found.kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in list(found.reasons().items())[:5])
        raise ValueError(
            f"{path}: no molecule is left of {len(contents.rows)} rows ({reasons or 'there were none'}). "
            f"Each row and its reason: {out / 'rejected.csv'}"
        )
    write_atomically(out / "molecules.csv", table(KEPT, kept))
    write_json(out / "prepare.json", summary)
    return summary


def table(header: Sequence[str], rows: Iterable[Sequence]) -> bytes:
    """A CSV file in UTF-8: floats in full, None and NaN as nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode("utf-8")


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if value != value else repr(value)
    return "" if value is None else value
