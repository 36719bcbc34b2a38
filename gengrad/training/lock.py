"""One writer per run directory: a lock that the operating system frees however the process ends."""

from __future__ import annotations

import os
import socket
import time
import warnings
import weakref
from pathlib import Path

from gengrad.files import SaveError, decode_json, encode_json, save_error
from gengrad.training.ranks import Ranks, together

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "run.lock"


class RunLocked(OSError):
    """Another process is writing in the run directory."""


class RunLock:
    """``with RunLock(directory): ...`` keeps every second writer out of ``directory`` (made if missing).

    Raises ``RunLocked`` on all ``ranks`` alike when a process holds it, ``SaveError`` when the lock file
    cannot be written. The file stays; its lock dies with its holder, also on ``kill -9``. Where the file
    system cannot lock (some network disks), a warning says so and the run goes on.
    """

    def __init__(self, directory: str | Path, ranks: Ranks | None = None):
        self.directory, self.ranks = Path(directory), ranks or Ranks()
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        acquire = self._acquire if self.ranks.first else lambda: None
        together(self.ranks, acquire, (RunLocked, SaveError, OSError))
        return self

    def __exit__(self, *exception) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)  # no stale owner is left to read
            os.close(self._handle)
            self._handle = None

    def _acquire(self) -> None:
        if self._handle is not None:
            raise RunLocked(f"{self.directory} is locked by this very object already")
        path = self.directory / NAME
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise save_error(path, None, error, "Nothing was written.") from error
        try:
            self._lock(handle, path)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            self._write(handle, path, encode_json(owner, str(path)))
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        _HELD.add(self)

    def _lock(self, handle: int, path: Path) -> None:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunLocked(
                f"{self.directory} is being written by {_owner(handle)}. Two writers would mix their states: "
                "wait for it, stop it, or choose another directory. Nothing was changed there."
            ) from error
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked ({error}): make sure that no second run writes there.", stacklevel=4
            )

    @staticmethod
    def _write(handle: int, path: Path, data: bytes) -> None:
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, data, 0)
        except OSError as error:
            raise save_error(path, len(data), error, "Nothing was written.") from error


def _owner(handle: int) -> str:
    """The holder as the lock file tells it; what cannot be read there is left out."""
    try:
        owner = decode_json(os.pread(handle, 4096, 0), NAME)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


_HELD: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A forked worker shares its parent's lock and could outlive it: it drops its copy."""
    for lock in list(_HELD):
        if lock._handle is not None:
            os.close(lock._handle)
            lock._handle = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
