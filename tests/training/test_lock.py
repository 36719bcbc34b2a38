"""A run directory has one writer, and its lock dies with it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_cases import in_ranks

from gengrad.files import SaveError
from gengrad.training import lock as locks
from gengrad.training.lock import RunLock, RunLocked


def holder(directory: Path, with_worker: bool = False) -> tuple[int, int]:
    """A child that holds the lock until it is killed, and the worker that it forked (or 0)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with RunLock(directory):
                worker = os.fork() if with_worker else -1
                if worker != 0:
                    os.write(writing, b"%d\n" % max(worker, 0))
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as pipe:
        return child, int(pipe.readline())


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_writer_gets_one_message_that_names_the_first(tmp_path):
    child, _ = holder(tmp_path / "run")
    try:
        with pytest.raises(RunLocked, match=f"is being written by process {child} on .* since 20") as caught:
            RunLock(tmp_path / "run").__enter__()
        assert str(tmp_path / "run") in str(caught.value) and "another directory" in str(caught.value)
    finally:
        kill(child)


def test_a_kill_frees_the_lock(tmp_path):
    for _ in range(3):
        child, _ = holder(tmp_path)
        kill(child)
    with RunLock(tmp_path):
        pass


def test_a_forked_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    child, worker = holder(tmp_path, with_worker=True)
    kill(child)
    try:
        os.kill(worker, 0)  # it is alive
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_worker_that_ends_does_not_free_the_parents_lock(tmp_path):
    with RunLock(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(RunLocked):
            RunLock(tmp_path).__enter__()


def test_leaving_frees_the_lock_also_after_an_exception(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path) as lock:
        with pytest.raises(RunLocked, match="by this very object"):
            lock.__enter__()
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "):
            RunLock(tmp_path).__enter__()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00", b'{"pid": 1}', b"x" * 10_000])
def test_a_lock_file_with_any_content_still_locks_and_still_frees(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with RunLock(tmp_path):
        (tmp_path / "run.lock").write_bytes(content)
        with pytest.raises(RunLocked, match="is being written by another process"):
            RunLock(tmp_path).__enter__()


def test_all_ranks_are_told_when_the_directory_is_locked(tmp_path):
    def enter(ranks):
        with RunLock(tmp_path, ranks):
            return os.path.getsize(tmp_path / "run.lock") > 0

    with RunLock(tmp_path):
        first, second = in_ranks(2, enter)
    assert type(first) is type(second) is RunLocked and str(first) == str(second)


def test_a_directory_that_cannot_be_made_is_a_save_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot write .*run\.lock.*Nothing was written"):
        RunLock(tmp_path / "file" / "run").__enter__()


def test_a_lock_file_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(SaveError):
        RunLock(tmp_path).__enter__()
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_file_system_without_locks_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    def unsupported(handle, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"), RunLock(tmp_path):
        pass
