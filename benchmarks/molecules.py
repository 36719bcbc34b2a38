"""Molecules per second: preparing a file, and scoring by QED, SA, logP and alerts, on 1 and 2 processes.

    python benchmarks/molecules.py [--parts prepare,score] [--data FILE] [--n 20000] [--processes 1,2] [--out FILE]

Without --data the enumerated library stands in, which is cleaner than a real set. Seconds are of the wall clock and
hold the start of the worker processes; CPU-seconds are of all processes. Parts that the JSON holds at
the same n, data and processes are not measured again.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from datetime import date
from pathlib import Path

import rdkit

from gengrad.files import read_json, write_json
from gengrad.molecules.library import library
from gengrad.molecules.objective import read_objective
from gengrad.molecules.prepare import prepare
from gengrad.molecules.reading import Row, read_molecules
from gengrad.molecules.scoring import score

WINDOW = {"name": "linear", "low": 0.0, "high": 10.0}
OBJECTIVE = {
    "components": [{"scorer": "qed"}, *({"scorer": name, "transform": WINDOW} for name in ("sa", "logp"))],
    "filters": [{"scorer": "alerts", "at_most": 0}],
}


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(part: str, rows: list[Row], processes: int) -> dict:
    """One cell: {"n", "wall_seconds", "cpu_seconds", "per_second", "per_cpu_second", and what came of it}."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    if part == "prepare":
        found = {"kept": len(prepare(rows, processes=processes).kept)}
    else:
        scores = score(read_objective(OBJECTIVE), [row.text for row in rows], processes)
        found = {
            "scored": scores.calls,
            "passed": int(scores.passed.sum()),
            "median_qed": scores.properties[:, 0].nanmedian().item(),
        }
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return {
        "n": len(rows),
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "per_second": len(rows) / wall,
        "per_cpu_second": len(rows) / cpu,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default="prepare,score")
    parser.add_argument("--data", type=Path, default=None, help="a file of molecules (default: the library)")
    parser.add_argument("--n", type=int, default=20_000, help="the first n molecules")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "molecules.json")
    given = parser.parse_args()
    report = read_json(given.out) if given.out.exists() else {}
    name = given.data.name if given.data else "library"
    rows = None
    print("| part | data | processes | molecules | per second | per CPU-second |", "| --- " * 6 + "|", sep="\n")
    for part in given.parts.split(","):
        if part not in ("prepare", "score"):
            raise SystemExit(f"--parts {part}: allowed are prepare, score")
        for processes in map(int, given.processes.split(",")):
            key = f"{part}/{name}/{given.n}/{processes}"
            if key not in report:
                if rows is None:
                    every = (
                        read_molecules(given.data).rows
                        if given.data
                        else [Row(i, str(i), text) for i, text in enumerate(library(given.n), 1)]
                    )
                    rows = every[: given.n]
                load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
                where = {"load": load, "cpus": cpus, "machine": platform.machine(), "date": date.today().isoformat()}
                report[key] = {**measure(part, rows, processes), **where, "rdkit": rdkit.__version__}
                write_json(given.out, report)
            cell = report[key]
            print(
                f"| {part} | {name} | {processes} | {cell['n']:,} | {cell['per_second']:,.0f} | "
                f"{cell['per_cpu_second']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
