"""Scorers of one's own: a Python file, or any program that reads SMILES and writes JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import Field

from gengrad.molecules.properties import Scorer
from gengrad.molecules.workers import Answer, Child, Workers
from gengrad.registry import SCORERS, Settings


def number(answer: object) -> float:
    """An answer as a finite float; raises ``ValueError`` that says what it is instead."""
    if isinstance(answer, bool):
        return float(answer)
    if isinstance(answer, (int, float)) and math.isfinite(answer):
        return float(answer)
    shown = repr(answer) if isinstance(answer, (str, float)) else json.dumps(answer)
    raise ValueError(f"answered {shown[:100]}, which is no finite number")


def checked(answer: Answer) -> Answer:
    """The answer with a float, or with the problem that it is none."""
    if answer.problem is not None:
        return answer
    try:
        return Answer(number(answer.value))
    except ValueError as error:
        return Answer(problem=str(error))


class Outside(Scorer):
    """A scorer that runs in processes of its own: ``answers`` gives a number or a problem for each SMILES.

    ``with scorer.kept(processes):`` keeps them from one call to the next, where the scorer can.
    """

    outside = True

    def kept(self, processes: int):
        """A context in which the processes stay; here there are none to keep."""
        return contextlib.nullcontext()

    def answers(self, smiles: Sequence[str], processes: int = 1) -> list[Answer]:
        raise NotImplementedError

    def __call__(self, smiles):
        return [math.nan if a.problem is not None else a.value for a in self.answers(smiles)]


@SCORERS.register("python")
class PythonFile(Outside):
    """The function ``score(smiles) -> float`` of a Python file, one molecule at a time.

    An exception, text or NaN leaves that molecule without a value; more than ``timeout`` seconds or a crash ends the
    process, and a new one goes on after that molecule. Raises ``ValueError`` when the file cannot be loaded.
    """

    class Config(Settings):
        path: str = Field(min_length=1)
        timeout: float = Field(10.0, gt=0)

    _workers: Workers | None = None

    def _started(self, processes: int) -> Workers:
        path = Path(self.config.path)
        if not path.is_file():
            raise ValueError(f"scorer python: no file {path}; give the path of a Python file with score(smiles)")
        return Workers("python", {"path": str(path.absolute())}, processes, self.config.timeout)

    @contextlib.contextmanager
    def kept(self, processes):
        with self._started(processes) as self._workers:
            try:
                yield
            finally:
                self._workers = None

    def answers(self, smiles, processes=1):
        workers = self._workers or self._started(processes)
        return [checked(answer) for answer in workers.map(list(smiles))]


@SCORERS.register("program")
class Program(Outside):
    """A command that reads one SMILES per line from standard input until its end, and writes one JSON line for each.

    A line is a number, null (no value), or an object with ``score`` or ``error``, and with ``smiles`` if it likes,
    which is then compared. It is started anew for every ``batch`` molecules and may take ``timeout`` seconds for them.
    When it crashes, hangs or answers another number of lines, the batch is halved until the molecule is found, so no
    answer is ever given to another molecule. After ``give_up`` failures in a row the rest is not tried.
    """

    class Config(Settings):
        command: str = Field(min_length=1)
        batch: int = Field(256, ge=1)
        timeout: float = Field(60.0, gt=0)
        give_up: int = Field(20, ge=1)

    def answers(self, smiles, processes=1):
        command = shlex.split(self.config.command)
        self._failures = 0
        batches = [list(smiles[i : i + self.config.batch]) for i in range(0, len(smiles), self.config.batch)]
        with ThreadPoolExecutor(processes) as threads:
            found = threads.map(lambda batch: self._batch(command, batch), batches)
            return [checked(answer) for answers in found for answer in answers]

    def _batch(self, command: list[str], smiles: list[str]) -> list[Answer]:
        if self._failures >= self.config.give_up:
            return [Answer(problem=f"not tried: {self.config.give_up} runs in a row had failed")] * len(smiles)
        lines, problem = run(command, smiles, self.config.timeout)
        if problem is None:
            self._failures = 0
            return [_answer(line, text) for line, text in zip(lines, smiles)]
        self._failures += 1
        if len(smiles) == 1:
            return [Answer(problem=problem)]
        half = len(smiles) // 2
        return self._batch(command, smiles[:half]) + self._batch(command, smiles[half:])


def run(command: list[str], smiles: list[str], timeout: float) -> tuple[list[bytes], str | None]:
    """The lines that the program answers, one per SMILES, or the problem."""
    child = Child(command)
    writing = ThreadPoolExecutor(1)
    try:
        # in a thread: a program that reads nothing would block the writer, and killing it ends that
        writing.submit(_write, child, "".join(f"{text}\n" for text in smiles).encode())
        until, lines = time.monotonic() + timeout, []
        while len(lines) <= len(smiles):
            line = child.line(until - time.monotonic())
            if line is None:
                break
            if line.strip():
                lines.append(line)
        if len(lines) == len(smiles):
            return lines, None
        count = "more" if len(lines) > len(smiles) else str(len(lines))
        ended = f"; {child.ended()}" if len(lines) < len(smiles) else ""
        return [], f"answered {count} lines for {len(smiles)} molecules{ended}"
    except TimeoutError:
        return [], f"took more than {timeout:g} s and was killed"
    except OverflowError as error:
        return [], str(error)
    finally:
        child.kill()
        writing.shutdown()


def _write(child: Child, data: bytes) -> None:
    try:
        while data:
            data = data[child.process.stdin.write(data) :]
        child.process.stdin.close()
    except (OSError, ValueError, subprocess.SubprocessError):
        return  # the program has ended: what it answered tells


def _answer(line: bytes, smiles: str) -> Answer:
    """One line of a program, read strictly: NaN and text are no numbers, null is no value."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return Answer(problem=f"answered {line.decode('utf-8', 'replace')[:100]!r}, which is no JSON")
    if isinstance(value, dict):
        if "smiles" in value and value["smiles"] != smiles:
            return Answer(problem=f"answered for {str(value['smiles'])[:100]}, another molecule")
        if value.get("error"):
            return Answer(problem=str(value["error"])[:200])
        value = value.get("score")
    return Answer(problem="gave no value") if value is None else Answer(value)
