"""The checkpoint store: a directory per step, state by name, committed by one rename, verified when read."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from gengrad.files import SaveError, save_error, sync_directory
from gengrad.training import manifest as manifests
from gengrad.training.manifest import Damaged, rank_part
from gengrad.training.optimizer_state import load_optimizer_state_by_name, optimizer_state_by_name
from gengrad.training.ranks import Ranks, together
from gengrad.training.state import (
    CheckpointError,
    generator_state,
    load_generator_state,
    load_module_state,
    load_random_state,
    module_state,
    random_state,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "Ranks",
    "SaveError",
    "generator_state",
    "load_generator_state",
    "load_module_state",
    "load_optimizer_state_by_name",
    "load_random_state",
    "module_state",
    "optimizer_state_by_name",
    "random_state",
]

COMMITTED = re.compile(r"step_(\d{8,})(?:_(\d+))?")
TEMPORARY, QUARANTINED = "tmp_", "corrupt_"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What ``load_latest`` found; ``rank`` is None when none was saved or the world size differs (Tier B)."""

    step: int
    path: Path
    shared: dict[str, Any]
    rank: dict[str, Any] | None
    world: int  # processes of the run that saved it
    same_world: bool
    quarantined: tuple[str, ...] = ()  # messages about newer checkpoints that were damaged


class Entry(NamedTuple):
    """A committed directory; ``repeat`` counts saves of one step. Entries sort from oldest to newest."""

    step: int
    repeat: int
    name: str


class CheckpointStore:
    """The checkpoints of one run in ``directory``, of which the ``keep`` newest stay.

    Every rank builds it and calls its methods in the same order. All ranks see one file system, and one run
    at a time uses it (hold a ``RunLock``). A damaged checkpoint is renamed ``corrupt_...``, never deleted.
    """

    def __init__(self, directory: str | Path, keep: int = 2, ranks: Ranks | None = None):
        if keep < 2:
            raise ValueError(f"keep is {keep}: at least 2 checkpoints stay, so that one damaged file loses no run")
        self.directory, self.keep, self.ranks = Path(directory), keep, ranks or Ranks()

    def save(self, step: int, shared_state: Mapping[str, Any], rank_state: Mapping[str, Any] | None = None) -> Path:
        """Commit the state of ``step``: ``shared_state`` as rank 0 has it, ``rank_state`` of each rank.

        Returns when it is on the disk; until then the older checkpoints stand. Raises on all ranks alike
        ``SaveError`` when any rank's disk refuses and ``CheckpointError`` for a state with no exact form.
        """
        entry, temporary = self._begin(step)
        ranks, final = self.ranks, self.directory / entry.name

        def write() -> dict[str, dict]:
            files = {}
            if ranks.first:
                files |= manifests.write_part(temporary, "shared", dict(shared_state), self._kept())
                self._point("shared_written")
            if rank_state is not None:
                part = rank_part(ranks.rank)
                files |= manifests.write_part(temporary, part, dict(rank_state), self._kept())
            self._point("rank_written")
            return files

        def commit() -> None:
            if ranks.first:
                data = manifests.encode_manifest(entry.step, entry.repeat, ranks.world, files)
                self._commit(temporary, final, data, files)

        try:
            parts = together(ranks, write, (SaveError, CheckpointError))
            self._point("gathered")
            files = {name: sums for part in parts for name, sums in part.items()}
            together(ranks, commit, (SaveError, CheckpointError))
        except (SaveError, CheckpointError):
            if ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._point("committed")
        if ranks.first:
            self._prune()
        return final

    def _begin(self, step: int) -> tuple[Entry, Path]:
        """Rank 0 makes the temporary directory; all ranks get its name, or the same exception."""

        def begin() -> tuple[Entry, str] | None:
            if not self.ranks.first:
                return None
            entry = self._next(step)
            self._point("begun")
            temporary = self.directory / f"{TEMPORARY}{entry.name}"
            try:
                self._clean()
                new = not self.directory.exists()
                temporary.mkdir(parents=True)
                if new:
                    sync_directory(self.directory.parent)
            except OSError as error:
                raise save_error(temporary, None, error, self._kept()) from error
            self._point("directory_made")
            return entry, temporary.name

        # barrier included: nobody writes before the directory is there
        entry, name = together(self.ranks, begin, (SaveError, CheckpointError))[0]
        return Entry(*entry), self.directory / name

    def _next(self, step: int) -> Entry:
        if type(step) is not int or step < 0:
            raise CheckpointError(f"step is {step!r}: a step is a whole number from 0 on")
        newest = max(self._entries(), default=None)
        if newest is not None and step < newest.step:
            raise CheckpointError(
                f"step {step} is older than the newest checkpoint {self.directory / newest.name}: a run only "
                "goes forward. Resume from it, or choose another directory. Nothing was written."
            )
        # a second save of one step is a new directory: the first stands until the second is committed
        repeat = newest.repeat + 1 if newest is not None and newest.step == step else 0
        return Entry(step, repeat, f"step_{step:08d}" + (f"_{repeat}" if repeat else ""))

    def _commit(self, temporary: Path, final: Path, manifest: bytes, files: dict[str, dict]) -> None:
        unseen = sorted(name for name in files if not (temporary / name).is_file())
        if unseen:
            raise CheckpointError(
                f"rank 0 does not see {', '.join(unseen)} in {temporary}: all processes must write to one "
                f"file system. Choose a directory on a shared disk. {self._kept()}"
            )
        manifests.write_new(temporary / manifests.NAME, manifest, self._kept())
        self._point("manifest_written")
        try:
            sync_directory(temporary)
            self._point("synced")
            os.rename(temporary, final)
            self._point("renamed")
            sync_directory(self.directory)
        except OSError as error:
            raise save_error(final, None, error, self._kept()) from error

    def _prune(self) -> None:
        """Delete what is older than the ``keep`` newest, once two valid ones are among those that stay.

        The disk is read for it: counting directories would count damaged ones. A failure is only logged.
        """
        entries, valid, kept = sorted(self._entries(), reverse=True), 0, 0
        for entry in entries:
            if kept >= self.keep and valid >= 2:
                self._delete(entry)
                continue
            kept += 1
            if valid < 2:
                valid += kept == 1 or self._valid(entry)  # the newest was written a moment ago
        self._point("pruned")

    def _valid(self, entry: Entry) -> bool:
        try:
            manifests.verify(self.directory / entry.name, entry.step, entry.repeat)
            return True
        except (Damaged, CheckpointError):
            return False

    def _delete(self, entry: Entry) -> None:
        doomed = self.directory / f"{TEMPORARY}old_{entry.name}"
        try:
            # renamed first: a half deleted directory must not look like a damaged checkpoint
            os.rename(self.directory / entry.name, doomed)
            self._point("doomed")
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("the old checkpoint %s could not be deleted: %s", doomed, error)

    def _clean(self) -> None:
        """Delete what killed saves left behind."""
        if self.directory.is_dir():
            for path in self.directory.glob(f"{TEMPORARY}*"):
                shutil.rmtree(path)

    def _entries(self) -> list[Entry]:
        if not self.directory.is_dir():
            return []
        matches = (COMMITTED.fullmatch(name) for name in os.listdir(self.directory))
        return [Entry(int(m[1]), int(m[2] or 0), m[0]) for m in matches if m]

    def _kept(self) -> str:
        newest = max(self._entries(), default=None)
        return f"Kept: {self.directory / newest.name}." if newest else "There was no checkpoint yet."

    def _point(self, name: str) -> None:
        """Called at every named point of a save; tests kill the process here."""

    def load_latest(self) -> Checkpoint | None:
        """The newest valid checkpoint, the same on all ranks; None when none was ever committed.

        Damaged ones are renamed ``corrupt_...`` with a message and the next older is tried. Raises
        ``CheckpointError`` when there are some but none is valid, or when one is of a newer format or cannot
        be read for a reason outside of it (permissions, memory).
        """
        ranks, notes = self.ranks, []
        entries, aside = together(ranks, self._listing if ranks.first else lambda: None, (CheckpointError,))[0]
        for entry in (Entry(*entry) for entry in entries):
            read: list[Checkpoint] = []
            damage = together(ranks, lambda e=entry, r=read: self._try(e, r), (CheckpointError,))
            if not any(damage):
                return replace(read[0], quarantined=tuple(notes))
            what = next(text for text in damage if text)
            quarantine = (lambda e=entry, w=what: self._quarantine(e, w)) if ranks.first else lambda: None
            notes.append(together(ranks, quarantine, (CheckpointError,))[0])
        if not notes and not aside:
            return None
        raise CheckpointError(
            "\n  ".join([f"{self.directory} has checkpoints, and none is valid:", *notes, *aside])
            + "\nRestore one from a copy, or start afresh in another directory. Nothing was deleted."
        )

    def _listing(self) -> tuple[list[Entry], list[str]]:
        """The committed entries, newest first, and what earlier loads put aside."""
        with suppress(OSError):
            self._clean()
        aside = sorted(self.directory.glob(f"{QUARANTINED}*")) if self.directory.is_dir() else []
        return sorted(self._entries(), reverse=True), [f"{path}: put aside earlier" for path in aside]

    def _try(self, entry: Entry, read: list[Checkpoint]) -> str | None:
        """Read this rank's states into ``read``; gives what is damaged. Rank 0 verifies every file."""
        path, own = self.directory / entry.name, rank_part(self.ranks.rank)
        try:
            if path.is_symlink():
                raise Damaged("it is a symbolic link")
            manifest = manifests.read_manifest(path, entry.step, entry.repeat)
            same = manifest["world"] == self.ranks.world
            parts = ["shared", own] if same and f"{own}.json" in manifest["files"] else ["shared"]
            states = [manifests.read_part(path, part, manifest) for part in parts]
            for name in manifest["files"] if self.ranks.first else ():
                if name.split(".")[0] not in parts:
                    manifests.verify_file(path, name, manifest)
        except Damaged as error:
            return str(error)
        shared, rank = [*states, None][:2]
        read.append(Checkpoint(entry.step, path, shared, rank, manifest["world"], same))
        return None

    def _quarantine(self, entry: Entry, what: str) -> str:
        """Rename a damaged checkpoint so that no load tries it again; gives the message about it."""
        path = self.directory / entry.name
        names = (f"{QUARANTINED}{entry.name}" + (f"_{i}" if i else "") for i in range(10_000))
        target = next(self.directory / name for name in names if not (self.directory / name).exists())
        try:
            os.rename(path, target)
            sync_directory(self.directory)
            message = f"{path} is damaged: {what}. Kept as {target.name}."
        except OSError as error:
            message = f"{path} is damaged: {what}. It could not be renamed: {error}."
        log.warning("%s Trying the next older checkpoint.", message)
        return message
