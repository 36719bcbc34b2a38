"""What a run says of itself: ``metrics.jsonl``, one line per logged step, and a line for the reader now and then."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tqdm import tqdm


class Tracker:
    """Appends rows to ``metrics.jsonl``; ``position`` is its length in bytes, to which a resumed run cuts it back.

    Only the main process writes (``active``). On a terminal a bar shows progress, in a log plain lines do.
    """

    def __init__(self, directory: Path, active: bool = True, quiet: bool = False):
        self.path, self.active, self.quiet = directory / "metrics.jsonl", active, quiet
        self._bar: tqdm | None = None
        if active:
            directory.mkdir(parents=True, exist_ok=True)

    @property
    def position(self) -> int:
        return self.path.stat().st_size if self.active and self.path.exists() else 0

    def cut(self, position: int) -> None:
        """Drops the rows that came after the checkpoint from which the run goes on."""
        if self.active and self.position > position:
            os.truncate(self.path, position)

    def log(self, row: dict) -> None:
        if self.active:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def say(self, text: str) -> None:
        """A line for the reader, above the bar if there is one."""
        if self.active and not self.quiet:
            tqdm.write(text, file=sys.stdout) if self._bar is not None else print(text, flush=True)

    def start(self, stage: str, steps: int, done: int) -> None:
        self.finish()
        if self.active and not self.quiet and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=done, desc=stage, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def read_metrics(directory: str | os.PathLike, seconds: bool = True) -> list[dict]:
    """The rows of a run's ``metrics.jsonl``; an unfinished last line (of a killed run) is left out.

    Without ``seconds``: without what a clock measured, which no other run repeats.
    """
    rows = []
    for line in (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        rows.append({key: value for key, value in row.items() if seconds or not key.endswith("_seconds")})
    return rows
