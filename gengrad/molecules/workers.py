"""Work on single items in child processes: one that hangs or crashes is killed and reported, the rest goes on."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

PIECE = 64  # items sent to a worker at once
START = 300.0  # seconds that a worker may take to start: imports on a busy machine
LONGEST = 1 << 20  # bytes that one answer may have


@dataclass(frozen=True)
class Answer:
    """What came of one item: a ``value``, or the ``problem`` in words."""

    value: object = None
    problem: str | None = None


class Child:
    """A process with pipes, in a session of its own so that everything it starts is killed with it."""

    def __init__(self, command: Sequence[str], environment: dict | None = None):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            self.errors.close()
            reason = error.strerror or error
            raise ValueError(f"cannot start {command[0]}: {reason}. Give an executable file.") from None
        self._read = b""
        self.stopped = False

    def line(self, seconds: float) -> bytes | None:
        """The next line of its output, None where the output ends; raises ``TimeoutError``, ``OverflowError``."""
        until = time.monotonic() + seconds
        while b"\n" not in self._read:
            if len(self._read) > LONGEST:
                raise OverflowError(f"answered with more than {LONGEST:,} bytes on one line")
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                rest, self._read = self._read, b""
                return rest or None
            self._read += part
        line, self._read = self._read.split(b"\n", 1)
        return line

    def ended(self) -> str:
        """How the process ended, with the last line that it wrote to standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        code = self.process.poll()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 4000))
        said = [line.strip() for line in self.errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return f"its process {how}" + (f": {said[-1][:200]}" if said else "")

    def stop(self) -> None:
        """Kills it and everything it started; another thread may still be reading."""
        self.stopped = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kills it and everything it started, and closes its pipes."""
        self.stop()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                pipe.close()


class Workers:
    """``processes`` copies of gengrad's worker, each doing one task (``gengrad.molecules.worker``) on single items.

    ``map`` gives one ``Answer`` per item, in their order, whatever the number of processes. An item that takes more
    than ``timeout`` seconds, or at which the worker dies, is reported; the others go to a new worker. After
    ``give_up`` such items in a row the rest is not tried, and says so. ``with Workers(...) as workers`` keeps the
    processes from one ``map`` to the next, for starting one takes longer than many items do.
    """

    def __init__(self, task: str, settings: dict, processes: int = 1, timeout: float = 10.0, give_up: int = 20):
        self.head = json.dumps({"task": task, "settings": settings}).encode() + b"\n"
        self.processes, self.timeout, self.give_up = processes, timeout, give_up
        self._children: set[Child] = set()
        self._idle: list[Child] = []  # that wait for the next map
        self._kept = False
        self._stopped = False
        self._failures = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Workers:
        self._kept = True
        return self

    def __exit__(self, *error) -> None:
        self._kept = False
        while self._idle:
            self._idle.pop().kill()

    def map(self, items: Sequence) -> list[Answer]:
        """One answer per item; raises ``ValueError`` when the worker cannot take up the task at all."""
        answers: list[Answer | None] = [None] * len(items)
        queue = deque(range(start, min(start + PIECE, len(items))) for start in range(0, len(items), PIECE))
        self._stopped, self._failures = False, 0
        with ThreadPoolExecutor(self.processes) as threads:
            count = min(self.processes, len(queue))
            running = [threads.submit(self._serve, queue, items, answers) for _ in range(count)]
            try:
                wait(running, return_when="FIRST_EXCEPTION")
            finally:
                self._stop()
        for thread in running:
            thread.result()
        return answers

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.stop()

    def _start(self) -> Child:
        here = str(Path(__file__).parents[2])
        paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        changed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}  # the parallelism is in the processes
        child = Child([sys.executable, "-m", "gengrad.molecules.worker"], {**os.environ, **changed})
        with self._lock:
            self._children.add(child)
            if self._stopped:
                child.stop()
        try:
            child.process.stdin.write(self.head)
            line = child.line(START)
        except TimeoutError:
            child.kill()
            raise RuntimeError(f"a worker process did not start within {START:.0f} s") from None
        except BrokenPipeError:
            line = None
        problem = f"a worker did not start: {child.ended()}" if line is None else json.loads(line).get("problem")
        if problem:
            child.kill()
            raise ValueError(problem)
        return child

    def _serve(self, queue: deque, items: Sequence, answers: list) -> None:
        """Takes pieces from the queue until it is empty; starts a new worker after each one that failed."""
        piece: deque = deque()
        while not self._stopped:
            try:
                piece = piece or deque(queue.popleft())
            except IndexError:
                break
            if self._failures >= self.give_up:
                while piece:
                    answers[piece.popleft()] = Answer(problem=f"not tried: {self.give_up} in a row had failed")
                continue
            with self._worker() as child:
                problem = None
                while problem is None and not self._stopped:
                    problem = self._ask(child, piece, items, answers)
                    if problem is None:
                        try:
                            piece = deque(queue.popleft())
                        except IndexError:
                            break
                if problem is not None:
                    child.stop()
                    answers[piece.popleft()] = Answer(problem=problem)
                    self._failures += 1

    @contextlib.contextmanager
    def _worker(self):
        """A worker that has taken up the task; killed at the end, unless it is kept and well."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
            if child is not None:
                self._children.add(child)
        if child is not None and child.process.poll() is not None:  # it died while it had nothing to do
            with self._lock:
                self._children.discard(child)
            child.kill()
            child = None
        child = child or self._start()
        well = False
        try:
            yield child
            well = self._kept and not self._stopped and not child.stopped
        finally:
            with self._lock:
                self._children.discard(child)
                if well:
                    self._idle.append(child)
            if not well:
                child.kill()

    def _ask(self, child: Child, piece: deque, items: Sequence, answers: list) -> str | None:
        """Answers the items of ``piece`` from the left; the problem of the first one left, None when all is done."""
        try:
            child.process.stdin.write(json.dumps([items[i] for i in piece]).encode() + b"\n")
            while piece:
                line = child.line(self.timeout)
                if line is None:
                    return child.ended()
                answers[piece.popleft()] = Answer(**json.loads(line))
                self._failures = 0
        except TimeoutError:
            return f"took more than {self.timeout:g} s and was killed"
        except OverflowError as error:
            return str(error)
        except (OSError, ValueError) as error:
            return f"{child.ended()} ({error})"
        return None
