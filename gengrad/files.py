"""Files that are whole or absent: atomic writes, checksums, strict JSON, names that lead nowhere else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

Content = bytes | Callable[[BinaryIO], None]

MEND = {
    errno.ENOSPC: "Free space on that disk, or choose a directory on another one.",
    errno.EDQUOT: "Your quota is used up: delete files, or choose a directory on another disk.",
    errno.EFBIG: "The file is larger than this process may write (see `ulimit -f`).",
    errno.EACCES: "Choose a directory you may write to, or change its permissions.",
    errno.EPERM: "Choose a directory you may write to, or change its permissions.",
    errno.EROFS: "That disk is mounted read-only: choose a directory on another one.",
    errno.ENOTDIR: "A part of that path is a file: choose another path.",
    errno.EEXIST: "A part of that path is a file: choose another path.",
    errno.EISDIR: "That path is a directory: choose a file name inside it.",
}


class SaveError(OSError):
    """A file could not be written; the message has path, bytes, how to mend it and what was kept."""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message)
        self.errno = code


def save_error(path: str | Path, size: int | None, cause: OSError, kept: str) -> SaveError:
    """The ``SaveError`` for ``cause``; when the disk is full it tells the free space beside ``size``."""
    needed = "" if size is None else f" ({size:,} bytes)"
    reason = cause.strerror or str(cause)
    parts = [f"cannot write {path}{needed}: {reason}."]
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = shutil.disk_usage(_existing_parent(Path(path))).free
            parts.append(f"Free on that disk: {free:,} bytes.")
    parts += [MEND.get(cause.errno, ""), kept]
    return SaveError(" ".join(part for part in parts if part), cause.errno)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def write_atomically(path: str | Path, content: Content) -> None:
    """Write ``content``, bytes or a function of an open file, so that ``path`` is old or new, never between.

    Missing parent directories are made. Raises ``SaveError`` when the disk refuses; an older file stays as it
    was. A process killed midway can leave a ``.tmp-*`` file beside ``path``; nothing reads it.
    """
    path = Path(path)
    # the random name keeps two writers of one path apart: the last rename wins, and no file mixes both
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
    size = len(content) if isinstance(content, bytes) else None
    kept = "The older file is unchanged." if path.is_file() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_through(temporary, content)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise save_error(path, size, error, kept) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def writable(path: Path, endings: tuple[str, ...]) -> Path:
    """``path`` if a file can be written there; raises ``ValueError`` for a wrong ending, ``OSError`` otherwise.

    Asked before the work starts, so that none is lost.
    """
    if path.suffix.lower() not in endings:
        raise ValueError(f"cannot tell the format of {path}: its name must end in {', '.join(endings)}")
    parent = path.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"no folder {parent} to write {path.name} in; make it first")
    if path.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: it is a folder or not writable")
    return path


def write_through(path: str | Path, content: Content) -> None:
    """Write a new file and wait until the disk has it; raises ``OSError``, also when it is there already.

    Not atomic: for files in a temporary directory that is renamed as a whole, or by ``write_atomically``.
    """
    with open(path, "xb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: str | Path) -> None:
    """Wait until the disk has the directory's names: without it a rename can be undone by a power cut."""
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in pieces; raises ``OSError`` when it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_json(value: Any, what: str, indent: int | None = None) -> bytes:
    """``value`` as JSON in ASCII; raises ``ValueError`` naming ``what`` and the entry that is not JSON."""
    found = _not_json(value, "")
    if found is not None:
        where, problem = found
        raise ValueError(
            f"{what}: {where or 'the value'} is {problem}, which JSON cannot hold. "
            "Give a finite number, a string, a bool, None, a list, or a dict with string keys."
        )
    try:
        return (json.dumps(value, allow_nan=False, indent=indent) + "\n").encode("ascii")
    except ValueError as error:  # integers of more than 4,300 digits
        raise ValueError(f"{what}: {error}") from error


def _not_json(value: Any, where: str) -> tuple[str, str] | None:
    """The first entry that JSON has no exact form for, as (where, problem)."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return None
    if isinstance(value, float):
        return None if value - value == 0 else (where, repr(value))
    if isinstance(value, (list, tuple)):
        found = (_not_json(item, f"{where}[{i}]") for i, item in enumerate(value))
        return next((f for f in found if f), None)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"{where} key {key!r}".strip(), f"a {type(key).__name__}"
        found = (_not_json(item, f"{where}.{key}" if where else key) for key, item in value.items())
        return next((f for f in found if f), None)
    return where, f"a {type(value).__name__}"


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON; tuples come back as lists.

    Raises ``ValueError`` naming the entry that is NaN, infinite or of a foreign type, ``SaveError`` as above.
    """
    write_atomically(path, encode_json(value, str(path), indent=1))


def decode_json(data: bytes, what: str) -> Any:
    """The value in JSON bytes; raises ``ValueError`` naming ``what`` for NaN, doubled keys or broken text."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON number")

    def once(pairs: list[tuple[str, Any]]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
        return result

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError(f"{what} is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; raises ``OSError``, or ``ValueError`` naming the file when it is not JSON."""
    return decode_json(Path(path).read_bytes(), str(path))


def safe_relative(name: object) -> PurePosixPath:
    """``name`` as a relative path that stays where it is put; raises ``ValueError`` for any other name.

    Says nothing about symbolic links: a reader of files it does not trust checks those itself.
    """
    text = name if isinstance(name, str) else ""
    parts = text.split("/")
    odd = not text.isprintable() or "\\" in text or ":" in text
    if not text or odd or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"unsafe file name {name!r}: allowed are relative names with '/' between their parts, "
            "without '..', '.', ':', backslashes or unprintable characters."
        )
    return PurePosixPath(text)
