"""What is in the folder of a search or a flow, read once, with the molecules looked at in worker processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from gengrad.files import read_json, sha256_of
from gengrad.molecules.evaluating import PROPERTIES, alone, compared
from gengrad.molecules.metrics import Described, describe, describers
from gengrad.molecules.objective import Objective, load_objective
from gengrad.molecules.population import Population, read_population

WANTED = {  # file -> what the report lacks without it
    "population_before.csv": "no distribution to compare with, and no way that a molecule has come",
    "population_after.csv": "no molecules to show",
    "steps.csv": "no curves of how it went",
    "objective.yaml": "not known what was asked for",
}
OPTIONAL = ("reconstruction.json", "flow.json", "run.json", "metrics.json", "leads.csv")
SIDES = ("before", "after")


@dataclass
class Folder:
    """``tables`` and ``seen`` by side; ``steps`` {column: numbers}; ``notes`` the JSON files; ``missing`` with why."""

    path: Path
    tables: dict[str, Population] = field(default_factory=dict)
    seen: dict[str, Described] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)
    leads: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, dict] = field(default_factory=dict)
    objective: Objective | None = None
    objective_text: str = ""
    metrics: dict = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def readable(self, side: str) -> list[int]:
        """The rows of a table that are molecules."""
        return self.seen[side].valid.nonzero().flatten().tolist() if side in self.seen else []

    def numbers(self, side: str, column: str) -> list[float]:
        """A column of one side as floats, NaN where there is none."""
        if side not in self.tables:
            return []
        table = self.tables[side]
        return table.numbers(column) or [float("nan")] * len(table.smiles)

    def passed(self, side: str) -> list[bool]:
        """Whether each row passes, by the column of that name; without it every molecule does."""
        values = self.tables[side].numbers("passed") if side in self.tables else None
        if values is None:
            return self.seen[side].valid.tolist() if side in self.seen else []
        return [value == 1 for value in values]

    def origins(self) -> list[int | None]:
        """For each row after, the row before that it comes from: the one its ``parent`` names, or of the same id."""
        if len(self.tables) < 2:
            return [None] * len(self.tables["after"].smiles) if "after" in self.tables else []
        before, after = (self.tables[side].columns for side in SIDES)
        rows = {name: i for i, name in reversed(list(enumerate(before.get("id", []))))}
        parents = after.get("parent", after.get("parent_id", after.get("parent id", [""] * len(after["smiles"]))))
        ids = after.get("id", [""] * len(after["smiles"]))
        return [rows.get(parent, rows.get(own)) for parent, own in zip(parents, ids)]


def read_folder(path: Path, processes: int = 1, timeout: float = 10.0) -> Folder:
    """Everything of it that the report uses; raises ``ValueError`` where there is nothing to report on."""
    if not path.is_dir():
        raise ValueError(f"no folder {path}")
    found = Folder(path)
    there = [name for name in (*WANTED, *OPTIONAL) if (path / name).is_file()]
    found.missing = {name: why for name, why in WANTED.items() if name not in there}
    if not {"population_before.csv", "population_after.csv", "steps.csv"} & set(there):
        raise ValueError(
            f"{path} has nothing to report on: looked for population_before.csv, population_after.csv and steps.csv, "
            "which `gengrad molecules baseline`, `optimize` and `flow` write"
        )
    found.digests = {name: sha256_of(path / name) for name in there}
    with describers(PROPERTIES, processes, timeout) as workers:
        for side in SIDES:
            if f"population_{side}.csv" in there:
                found.tables[side] = read_population(path / f"population_{side}.csv")
                found.seen[side] = describe(found.tables[side].smiles, PROPERTIES, workers=workers)
    if "steps.csv" in there:
        found.steps = _table(path / "steps.csv")
    if "leads.csv" in there:
        leads = read_population(path / "leads.csv", "input").columns
        found.leads = [dict(zip(leads, values)) for values in zip(*leads.values())]
    if "objective.yaml" in there:
        _read_objective(found, path / "objective.yaml")
    for name in OPTIONAL:
        if name in there and name.endswith(".json"):
            value = read_json(path / name)
            if not isinstance(value, dict):
                raise ValueError(f"{path / name} holds a {type(value).__name__}, not named values")
            found.notes[name] = value
    found.metrics = _metrics(found)
    return found


def _read_objective(found: Folder, file: Path) -> None:
    """An objective that cannot be read any more, for a scorer is gone, is shown as text."""
    found.objective_text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found.objective = load_objective(file)
    except ValueError as error:
        found.missing["objective.yaml"] = f"it cannot be read, and is shown as it is: {error}"


def _table(path: Path) -> dict[str, list[float]]:
    """The columns of a table of numbers, NaN where a cell is none."""
    import csv

    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns: dict[str, list[float]] = {}
    for name in rows[0] if rows else ():
        values = []
        for row in rows:
            try:
                values.append(float(row[name]))
            except (TypeError, ValueError):
                values.append(float("nan"))
        columns[str(name)] = values
    return columns


def _metrics(found: Folder) -> dict:
    """metrics.json if it is of these very files, else the same figures computed now."""
    stored = found.notes.get("metrics.json", {})
    files = stored.get("protocol", {}).get("files", {})
    same = all(files.get(side, {}).get("sha256") == found.digests.get(f"population_{side}.csv") for side in SIDES)
    if stored and same:
        return stored
    metrics: dict = {side: alone(found.seen[side], found.tables[side]) for side in found.tables if found.readable(side)}
    if len(metrics) == 2:
        metrics["after_against_before"] = compared(found.seen["after"], found.seen["before"])
    return metrics


def median(values) -> float:
    """Of what is not NaN; NaN of nothing."""
    known = torch.tensor([v for v in values if v == v], dtype=torch.float64)
    return known.quantile(0.5).item() if len(known) else float("nan")
