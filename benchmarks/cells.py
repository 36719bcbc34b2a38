"""A benchmark's results, cell by cell in one JSON: the same command goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from gengrad.files import write_json


def fill(out: Path, cells: dict[str, Callable[[], dict]], only: str = "", keep: bool = True) -> dict[str, dict]:
    """Computes the ``cells`` whose name contains ``only`` and that ``out`` does not hold; all results, by name.

    ``keep``: ``out`` is read, and written after each cell; a trial run leaves it alone.
    """
    results: dict[str, dict] = yaml.safe_load(out.read_text()) if keep and out.exists() else {}
    for key, compute in cells.items():
        if key in results or only not in key:
            continue
        results[key] = compute()
        print(key, {k: float(f"{v:.4g}") for k, v in results[key].items() if k != "along"}, flush=True)
        if keep:
            write_json(out, results)
    return results
