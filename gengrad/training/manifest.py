"""What makes a checkpoint valid: a manifest with the size and SHA-256 of every file, and of itself."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from gengrad.files import decode_json, encode_json, safe_relative, save_error, sha256_of, write_through
from gengrad.training.state import CheckpointError, join, split

NAME = "manifest.json"
FORMAT = 1
KEYS = {"format", "step", "repeat", "world", "files", "sha256"}
PART = re.compile(r"(shared|rank_\d{4,})\.(json|safetensors)")
# what a damaged or deleted file says; other errors (no permission, no memory) say nothing of the checkpoint
DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}


class Damaged(Exception):
    """A checkpoint is not what its manifest says; the message says in what."""


def rank_part(rank: int) -> str:
    """The name of a rank's part: its files are ``rank_0003.json`` and ``rank_0003.safetensors``."""
    return f"rank_{rank:04d}"


def write_part(directory: Path, part: str, state: dict[str, Any], kept: str) -> dict[str, dict]:
    """Write a state as two files; gives ``{file name: {"size", "sha256"}}`` of what was meant to be written.

    The sums are taken from memory, so that what a disk garbles on the way is found as well. Raises
    ``SaveError`` and ``CheckpointError`` (a state that has no exact form).
    """
    tree, tensors = split(state)
    contents = {
        f"{part}.json": encode_json(tree, f"state of {part}"),
        f"{part}.safetensors": safetensors.torch.save(tensors),
    }
    for name, data in contents.items():
        write_new(directory / name, data, kept)
    return {name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in contents.items()}


def write_new(path: Path, data: bytes, kept: str) -> None:
    """``write_through`` whose error has the bytes and what was ``kept``."""
    try:
        write_through(path, data)
    except OSError as error:
        raise save_error(path, len(data), error, kept) from error


def encode_manifest(step: int, repeat: int, world: int, files: dict[str, dict]) -> bytes:
    """The bytes of a manifest, its own SHA-256 last."""
    body = {"format": FORMAT, "step": step, "repeat": repeat, "world": world, "files": files}
    return _seal(body)


def _seal(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(encode_json(body, NAME)).hexdigest()
    return encode_json({**body, "sha256": digest}, NAME, indent=1)


def read_manifest(directory: Path, step: int, repeat: int) -> dict[str, Any]:
    """The manifest of a checkpoint; raises ``Damaged``, or ``CheckpointError`` for a newer format."""
    with _plain_file(directory, NAME) as path:
        data = path.read_bytes()
    try:
        manifest = decode_json(data, NAME)
        if not isinstance(manifest, dict) or manifest.keys() != KEYS:
            raise ValueError(f"{NAME} has other entries than {', '.join(sorted(KEYS))}")
        # byte for byte: a changed digit, a changed order and a doubled key are all seen
        if data != _seal({key: value for key, value in manifest.items() if key != "sha256"}):
            raise ValueError(f"{NAME} does not have the SHA-256 that it names")
    except ValueError as error:
        raise Damaged(str(error)) from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{directory} has format {manifest['format']!r}, this gengrad reads format {FORMAT}: "
            "resume with the version that wrote it. Nothing was changed."
        )
    if (manifest["step"], manifest["repeat"]) != (step, repeat):
        raise Damaged(f"{NAME} is of step {manifest['step']!r}, repeat {manifest['repeat']!r}: a swapped checkpoint")
    _check_entries(manifest)
    return manifest


def _check_entries(manifest: dict[str, Any]) -> None:
    files = manifest["files"]
    if type(manifest["world"]) is not int or manifest["world"] < 1 or not isinstance(files, dict):
        raise Damaged(f"{NAME} has an entry of a wrong type")
    for name, entry in files.items():
        try:
            safe_relative(name)
        except ValueError as error:
            raise Damaged(f"{NAME}: {error}") from error
        if not PART.fullmatch(name):
            raise Damaged(f"{NAME} names the file {name!r}, which no checkpoint has")
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            raise Damaged(f"{NAME}: the entry of {name} has not exactly a size and a sha256")
    if "shared.json" not in files:
        raise Damaged(f"{NAME} names no shared state")


@contextmanager
def _plain_file(directory: Path, name: str) -> Iterator[Path]:
    """The path of a file in ``directory``; raises ``Damaged``, also for a link, pipe or device."""
    path = directory / name
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Damaged(f"{name} is not a regular file")
        yield path
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) in DAMAGE:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from error
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}). The checkpoint may be good: "
            "mend that and try again. Nothing was changed."
        ) from error


def _compare(name: str, manifest: dict[str, Any], size: int, digest: Callable[[], str]) -> None:
    entry = manifest["files"].get(name)
    if entry is None:
        raise Damaged(f"{NAME} does not name {name}")
    if size != entry["size"]:
        raise Damaged(f"{name} has {size:,} bytes, the manifest says {entry['size']!r}")
    if digest() != entry["sha256"]:
        raise Damaged(f"{name} does not have the SHA-256 of the manifest")


def verify_file(directory: Path, name: str, manifest: dict[str, Any]) -> None:
    """Raise ``Damaged`` unless the file is what the manifest says; reads it in pieces."""
    with _plain_file(directory, name) as path:
        _compare(name, manifest, path.stat().st_size, lambda: sha256_of(path))


def read_verified(directory: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """The bytes of one file, verified: what is checked is what is used. Raises ``Damaged``."""
    with _plain_file(directory, name) as path:
        data = path.read_bytes()
    _compare(name, manifest, len(data), lambda: hashlib.sha256(data).hexdigest())
    return data


def read_part(directory: Path, part: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """A verified state, by name; raises ``Damaged``."""
    data = read_verified(directory, f"{part}.safetensors", manifest)
    try:
        tree = decode_json(read_verified(directory, f"{part}.json", manifest), f"{part}.json")
        state = join(tree, safetensors.torch.load(data))
    except (ValueError, SafetensorError) as error:
        raise Damaged(f"{part}: {error}") from error
    if not isinstance(state, dict):
        raise Damaged(f"{part}.json is not a dict")
    return state


def verify(directory: Path, step: int, repeat: int) -> dict[str, Any]:
    """The manifest, once every file was read and is what it says; raises ``Damaged``."""
    manifest = read_manifest(directory, step, repeat)
    for name in manifest["files"]:
        verify_file(directory, name, manifest)
    return manifest
