"""Files are whole or absent, and their errors say what to do."""

import errno
import hashlib
import math
import os
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengrad import files
from gengrad.files import SaveError, read_json, safe_relative, sha256_of, write_atomically, write_json

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=20)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def small_files():
    """The kernel refuses files of more than 4,096 bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@given(value=values)
def test_json_comes_back_exactly(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_a_written_file_has_its_bytes_and_leaves_no_other(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    write_atomically(path, b"first")
    write_atomically(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second"
    assert names(path.parent) == {"a.bin"}


def test_a_refused_write_keeps_the_older_file_and_tells_path_and_bytes(tmp_path, small_files):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    with pytest.raises(SaveError) as caught:
        write_atomically(path, bytes(100_000))
    assert str(path) in str(caught.value) and "100,000 bytes" in str(caught.value)
    assert caught.value.errno == errno.EFBIG and "unchanged" in str(caught.value)
    assert path.read_bytes() == b"old" and names(tmp_path) == {"a.bin"}


def test_a_full_disk_tells_how_much_is_free(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=r"a\.bin \(3 bytes\): No space left on device\. Free on that disk: [\d,]+ b"):
        write_atomically(tmp_path / "a.bin", b"abc")
    assert names(tmp_path) == set()


def test_a_path_through_a_file_is_a_save_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="choose another path"):
        write_json(tmp_path / "file" / "below.json", {})


def test_a_writer_that_fails_keeps_the_older_file(tmp_path):
    def half(file):
        file.write(b"half")
        raise RuntimeError("stop")

    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(RuntimeError, match="stop"):
        write_atomically(tmp_path / "a", half)
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == {"a"}


@pytest.mark.parametrize("atomic", [True, False])
def test_a_killed_write_keeps_the_older_file_and_a_plain_one_does_not(tmp_path, atomic):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def die_halfway(file):
        file.write(b"half of the n")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        if atomic:
            write_atomically(path, die_halfway)
        else:
            die_halfway(open(path, "wb"))  # noqa: SIM115  (the process ends in it)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (path.read_bytes() == b"old") is atomic


def test_the_file_reaches_the_disk_before_its_name_and_the_name_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle):
        events.append("directory" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def noted_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "a", b"x")
    assert events == ["file", "rename", "directory"]


def test_write_through_never_writes_over_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        files.write_through(tmp_path / "a", b"new")


def test_the_checksum_is_the_standard_one(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "b").write_bytes(bytes(3_000_001))
    assert sha256_of(tmp_path / "b") == hashlib.sha256(bytes(3_000_001)).hexdigest()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"loss": {"last": [1.0, math.nan]}}, r"loss\.last\[1\] is nan"),
        ([math.inf], r"\[0\] is inf"),
        ({"a": {3: "x"}}, "a key 3 is a int"),
        ({"a": {1, 2}}, "a is a set"),
        ({"a": b"x"}, "a is a bytes"),
        (math.nan, "the value is nan"),
    ],
)
def test_what_json_cannot_hold_is_named_and_nothing_is_written(tmp_path, value, named):
    with pytest.raises(ValueError, match=named):
        write_json(tmp_path / "a.json", value)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": NaN}', b"[-Infinity]", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000, b"\x80\x04N."],
    ids=["empty", "cut", "NaN", "infinity", "doubled key", "not UTF-8", "too deep", "a pickle"],
)
def test_what_is_not_json_is_refused_by_file_name(tmp_path, data):
    (tmp_path / "broken.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"broken\.json is not valid JSON"):
        read_json(tmp_path / "broken.json")


@pytest.mark.parametrize("name", ["a", "a.json", "shards/00001.safetensors", "..a", "a..", "größe"])
def test_plain_names_are_safe(name):
    assert str(safe_relative(name)) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../b", "/a", "a//b", "a/", "a\\..\\b", "C:a", "a\0b", "a\nb", None, 3, b"a"]
)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="unsafe file name"):
        safe_relative(name)


@given(name=st.text(alphabet="a./\\:\0~ ", max_size=12))
def test_no_safe_name_leaves_its_directory(name):
    try:
        relative = safe_relative(name)
    except ValueError:
        return
    assert os.path.normpath(f"/run/{relative}").startswith("/run/")
