"""SIGTERM and Ctrl-C as a request: finish the step, save, leave with 143 or 130."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """``with Interrupts() as interrupts: ...``: a loop polls ``.signal`` or ``.agreed`` at every step.

    The first signal is noted in ``signal``; a second one, at least ``grace`` seconds later, ends the process
    at once (``KeyboardInterrupt``, or ``SystemExit`` with 143). Outside the main thread Python allows no
    handlers: signals keep the effect they had. A hanging kernel delays a handler until it returns.
    """

    def __init__(self, grace: float = 1.0, announce: bool = True):
        # Ctrl-C under torchrun arrives twice: from the terminal and, milliseconds later, from the launcher
        self.grace, self.announce = grace, announce
        self.signal: int | None = None
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            # None: the handler was not set from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, frame: object) -> None:
        if self.signal is None:
            self.signal, self._first = number, time.monotonic()
            if self.announce:
                name = signal.Signals(number).name
                self._say(f"{name}: finishing this step and saving; once more stops at once.\n")
        elif time.monotonic() - self._first >= self.grace:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)

    @staticmethod
    def _say(text: str) -> None:
        # not print: a handler may interrupt a print, whose buffer must not be entered twice
        with contextlib.suppress(OSError):
            os.write(2, text.encode())

    def agreed(self, largest: Callable[[int], int]) -> bool:
        """Whether any rank was signalled, the same answer on all: every rank calls it at the same step.

        ``largest`` gives every rank the largest of all ranks' numbers (an all-reduce, as
        ``Ranks.largest``); ``signal`` is then set on all.
        """
        number = largest(self.signal or 0)
        if number and self.signal != number:
            self.signal, self._first = number, self._first or time.monotonic()
        return number != 0

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after Ctrl-C, 0 when no signal came."""
        return 0 if self.signal is None else 128 + self.signal
