"""The store commits whole checkpoints, sees every damage, and never loads the wrong state or runs code."""

import errno
import logging
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from any_states import plain, states
from checkpoint_cases import (
    POINTS,
    bits,
    fits,
    in_ranks,
    load_in_ranks,
    rank_state,
    same,
    shared_state,
)

from gengrad.files import SaveError, read_json
from gengrad.training import checkpoint as checkpoints
from gengrad.training import manifest as manifests
from gengrad.training.checkpoint import CheckpointError, CheckpointStore


def save_steps(directory: Path, steps, world: int = 1, size: int = 4096, keep: int = 2) -> None:
    def save(ranks):
        store = CheckpointStore(directory, keep, ranks)
        for step in steps:
            store.save(step, shared_state(step, size), rank_state(step, ranks.rank))

    for result in in_ranks(world, save):
        assert result is None, result


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@settings(max_examples=25, deadline=None)
@given(shared=states, rank=st.none() | states)
def test_any_state_comes_back_bit_by_bit_from_the_disk(tmp_path_factory, shared, rank):
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    store.save(3, shared, rank)
    found = store.load_latest()
    assert found.step == 3 and same(found.shared, plain(shared)) and same(found.rank, plain(rank) if rank else rank)


def test_nothing_is_found_where_nothing_was_saved(tmp_path):
    assert CheckpointStore(tmp_path / "never").load_latest() is None
    (tmp_path / "tmp_step_00000001").mkdir()  # killed in its very first save
    assert CheckpointStore(tmp_path).load_latest() is None
    assert names(tmp_path) == []


def test_each_rank_finds_the_shared_state_and_its_own(tmp_path):
    save_steps(tmp_path, [1, 2], world=3)
    for rank, found in enumerate(load_in_ranks(tmp_path, 3)):
        assert found.step == 2 and found.world == 3 and found.same_world and fits(found, rank)


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_processes_gets_the_shared_state_and_no_rank_state(tmp_path, saved, loaded):
    save_steps(tmp_path, [1], world=saved)
    for found in load_in_ranks(tmp_path, loaded):
        assert fits(found, None) and not found.same_world and found.world == saved


def test_old_checkpoints_go_and_as_many_as_asked_stay(tmp_path):
    save_steps(tmp_path, range(5), keep=3)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    with pytest.raises(ValueError, match="keep is 1"):
        CheckpointStore(tmp_path, keep=1)


def test_two_valid_checkpoints_stay_when_one_that_stays_is_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    flip(tmp_path / "step_00000002" / "shared.safetensors", 9001)
    save_steps(tmp_path, [3])
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    save_steps(tmp_path, [4])  # 3 and 4 are valid
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_a_step_saved_twice_gives_the_second_and_keeps_the_first_until_then(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(4, {"stage": "one"})
    store.save(4, {"stage": "two"})
    assert store.load_latest().shared == {"stage": "two"}
    assert names(tmp_path) == ["step_00000004", "step_00000004_1"]


def test_a_run_that_goes_back_is_refused(tmp_path):
    save_steps(tmp_path, [7])
    with pytest.raises(CheckpointError, match=r"step 6 is older than the newest checkpoint .*step_00000007"):
        CheckpointStore(tmp_path).save(6, {})
    assert names(tmp_path) == ["step_00000007"]


@pytest.mark.parametrize("step", [-1, 1.0, True, "3", None])
def test_a_step_that_is_no_count_is_refused(tmp_path, step):
    with pytest.raises(CheckpointError, match="a whole number from 0 on"):
        CheckpointStore(tmp_path).save(step, {})


def test_a_state_with_no_exact_form_aborts_the_save_on_every_rank(tmp_path):
    save_steps(tmp_path, [1], world=2)

    def save(ranks):
        own = {"x": (1, 2)} if ranks.rank == 1 else {"x": [1, 2]}
        CheckpointStore(tmp_path, ranks=ranks).save(2, shared_state(2), own)

    first, second = in_ranks(2, save)
    assert type(first) is type(second) is CheckpointError and str(first) == str(second)
    assert "rank 1 of 2: state entry /x is a tuple" in str(first)
    assert names(tmp_path) == ["step_00000001"] and fits(load_in_ranks(tmp_path, 2)[1], 1)


class FailingDisk:
    """Makes the ``n``-th of the calls that touch the disk in a save fail as a full disk does."""

    def __init__(self, monkeypatch, only=lambda path: True):
        self.left, self.only = 10**9, only
        for module, name in [
            *((manifests, "write_through"), (checkpoints, "sync_directory")),
            *((checkpoints.os, "rename"), (Path, "mkdir"), (shutil, "rmtree")),
        ]:
            monkeypatch.setattr(module, name, self.failing(getattr(module, name)))

    def failing(self, call):
        def attempt(path, *arguments, **options):
            if self.only(Path(path)):
                self.left -= 1
                if self.left == -1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(path, *arguments, **options)

        return attempt


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_is_full_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, world):
    save_steps(tmp_path, [1, 2, 3], world)
    disk, refused = FailingDisk(monkeypatch), 0

    def save(ranks):
        CheckpointStore(tmp_path, ranks=ranks).save(step, shared_state(step), rank_state(step, ranks.rank))

    for moment in range(100):
        step, before = 4 + moment, max(names(tmp_path))
        disk.left = moment
        results = in_ranks(world, save)
        untouched, disk.left = disk.left >= 0, 10**9
        for rank, found in enumerate(load_in_ranks(tmp_path, world)):
            assert fits(found, rank) and not found.quarantined
            # the rename itself may have happened before the failure: then the new state is there, and whole
            assert found.step == step if results[0] is None else found.path.name >= before
        if results[0] is not None:
            refused += 1
            assert {type(result) for result in results} == {SaveError}
            assert len({str(result) for result in results}) == 1 and "No space left" in str(results[0])
        if untouched:
            break
    assert untouched and refused >= 5 + 2 * world


def test_one_rank_with_a_full_disk_aborts_the_save_on_both_and_the_old_one_stands(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2], world=2)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    disk = FailingDisk(monkeypatch, only=lambda path: path.name == "rank_0001.safetensors")
    disk.left = 0

    def save(ranks):
        CheckpointStore(tmp_path, ranks=ranks).save(3, shared_state(3), rank_state(3, ranks.rank))

    first, second = in_ranks(2, save)
    assert type(first) is type(second) is SaveError and str(first) == str(second)
    assert "rank 1 of 2: cannot write" in str(first) and "bytes): No space left on device" in str(first)
    assert f"Kept: {tmp_path / 'step_00000002'}" in str(first)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before


def test_everything_is_on_the_disk_before_the_rename_that_commits_it(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def noted_fsync(handle):
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        fsync(handle)

    def noted_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    CheckpointStore(tmp_path / "run").save(5, {"x": torch.zeros(1)}, {"y": 1})
    parts = ["shared.json", "shared.safetensors", "rank_0000.json", "rank_0000.safetensors", "manifest.json"]
    new = "run/tmp_step_00000005"
    assert events == [".", *(f"{new}/{part}" for part in parts), new, "rename", "run"]


def test_what_a_killed_save_left_is_cleaned_at_the_next_start(tmp_path):
    save_steps(tmp_path, [1])
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "tmp_step_00000002")
    assert CheckpointStore(tmp_path).load_latest().step == 1
    assert names(tmp_path) == ["step_00000001"]


# ---------------------------------------------------------------- damage


def damage(chance: random.Random, directory: Path) -> tuple[str, bool]:
    """Damage the newest checkpoint (step 20) at random; tells how, and whether the older one (10) is damaged too."""
    new, old = directory / "step_00000020", directory / "step_00000010"
    path = new / chance.choice(names(new))
    kind = chance.choices(["flip", "cut", "append", "delete", "swap", "mix", "rename"], [110, 30, 5, 20, 15, 15, 5])[0]
    if kind == "flip":
        flip(path, chance.randrange(8 * path.stat().st_size))
    elif kind == "cut":
        os.truncate(path, chance.randrange(path.stat().st_size))
    elif kind == "append":
        path.write_bytes(path.read_bytes() + b"\0")
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":  # two files of the same checkpoint
        exchange(path, new / chance.choice([name for name in names(new) if name != path.name]))
    elif kind == "mix":  # the same file of two checkpoints
        exchange(path, old / path.name)
    else:
        exchange(new, old)
    return kind, kind in ("mix", "rename")


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def check_damage(saved: Path, work: Path, seed: int) -> tuple[str, bool]:
    shutil.copytree(saved, work)
    kind, both = damage(random.Random(seed), work)
    results = load_in_ranks(work, 2)
    if both:
        detected = all(isinstance(result, CheckpointError) for result in results)
        detected = detected and names(work) == ["corrupt_step_00000010", "corrupt_step_00000020"]
    else:
        detected = all(not isinstance(r, Exception) and r.step == 10 and fits(r, i, 64) for i, r in enumerate(results))
        detected = detected and names(work) == ["corrupt_step_00000020", "step_00000010"]
    shutil.rmtree(work)
    return kind, detected


@pytest.mark.parametrize("cases", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_every_flipped_bit_cut_lost_or_swapped_file_is_seen_and_never_loaded(tmp_path, caplog, cases):
    caplog.set_level(logging.CRITICAL)
    save_steps(tmp_path / "saved", [10, 20], world=2, size=64)
    seen = [check_damage(tmp_path / "saved", tmp_path / "work", seed) for seed in range(cases)]
    assert {kind for kind, _ in seen} == {"flip", "cut", "append", "delete", "swap", "mix", "rename"}
    assert [seed for seed, (_, detected) in enumerate(seen) if not detected] == []


def test_damage_to_the_file_of_a_rank_that_is_not_there_is_seen_as_well(tmp_path):
    save_steps(tmp_path, [10, 20], world=3)
    flip(tmp_path / "step_00000020" / "rank_0002.safetensors", 2000)
    (found,) = load_in_ranks(tmp_path, 1)
    assert found.step == 10 and "rank_0002.safetensors does not have the SHA-256" in found.quarantined[0]


def test_a_flipped_bit_of_a_weight_is_not_seen_by_safetensors_alone(tmp_path):
    """The control: without the checksums the wrong weights would load."""
    save_steps(tmp_path, [10])
    path = tmp_path / "step_00000010" / "shared.safetensors"
    flip(path, 8 * path.stat().st_size - 1)
    assert bits(safetensors.torch.load(path.read_bytes())["/networks/velocity/weight"]) != bits(
        shared_state(10)["networks"]["velocity"]["weight"]
    )


def test_every_single_bit_of_a_manifest_is_covered(tmp_path):
    save_steps(tmp_path, [10], size=1)
    directory = tmp_path / "step_00000010"
    path, unseen = directory / "manifest.json", []
    for bit in range(8 * path.stat().st_size):
        flip(path, bit)
        try:
            manifests.read_manifest(directory, 10, 0)
            unseen.append(bit)
        except manifests.Damaged:
            pass
        flip(path, bit)
    assert unseen == []
    assert manifests.read_manifest(directory, 10, 0)["step"] == 10


def test_a_damaged_checkpoint_is_kept_named_and_told(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    os.truncate(tmp_path / "step_00000002" / "shared.safetensors", 100)
    found = CheckpointStore(tmp_path).load_latest()
    (note,) = found.quarantined
    assert found.step == 1 and "step_00000002 is damaged: shared.safetensors has 100 bytes, the manifest says" in note
    assert "Kept as corrupt_step_00000002" in note and note in caplog.text
    save_steps(tmp_path, [2])  # the run comes to that step again
    os.truncate(tmp_path / "step_00000002" / "shared.json", 0)
    assert CheckpointStore(tmp_path).load_latest().step == 1
    assert names(tmp_path) == ["corrupt_step_00000002", "corrupt_step_00000002_1", "step_00000001"]


def test_when_none_is_valid_the_run_never_starts_afresh_however_often_it_is_tried(tmp_path):
    save_steps(tmp_path, [1, 2])
    for path in tmp_path.glob("*/manifest.json"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none is valid") as caught:
            CheckpointStore(tmp_path).load_latest()
        assert "corrupt_step_00000001" in str(caught.value) and "corrupt_step_00000002" in str(caught.value)
    assert names(tmp_path) == ["corrupt_step_00000001", "corrupt_step_00000002"]


def test_a_checkpoint_that_may_not_be_read_is_no_damage_and_stays(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])

    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(CheckpointError, match=r"Permission denied.*may be good"):
        CheckpointStore(tmp_path).load_latest()
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_newer_format_is_told_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "FORMAT", 2)
    save_steps(tmp_path, [1])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2, this gengrad reads format 1"):
        CheckpointStore(tmp_path).load_latest()
    assert names(tmp_path) == ["step_00000001"]


# ---------------------------------------------------------------- no code from files


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def reseal(directory: Path, **changes) -> None:
    """A manifest with right checksums of whatever lies there now: damage cannot give it away, only its content."""
    files = {}
    for path in directory.iterdir():
        if path.name != "manifest.json":
            data = path.read_bytes()
            files[path.name] = {"size": len(data), "sha256": manifests.hashlib.sha256(data).hexdigest()}
    old = read_json(directory / "manifest.json")
    files = {**{name: files[name] for name in old["files"] if name in files}, **changes}
    (directory / "manifest.json").write_bytes(manifests.encode_manifest(old["step"], 0, old["world"], files))


@pytest.mark.parametrize("name", ["shared.safetensors", "shared.json", "rank_0000.safetensors", "rank_0000.json"])
def test_a_planted_pickle_with_right_checksums_is_never_executed(tmp_path, name):
    save_steps(tmp_path / "run", [1])
    evil = pickle.dumps(Evil(tmp_path / "executed"))
    (tmp_path / "run" / "step_00000001" / name).write_bytes(evil)
    reseal(tmp_path / "run" / "step_00000001")
    with pytest.raises(CheckpointError, match="none is valid"):
        CheckpointStore(tmp_path / "run").load_latest()
    assert not (tmp_path / "executed").exists()
    pickle.loads(evil)  # the control: it would have worked
    assert (tmp_path / "executed").exists()


def test_saving_and_loading_never_call_pickle(tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("pickle was called")

    for module, call in [(pickle, "loads"), (pickle, "load"), (pickle, "dumps"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, call, forbidden)
    save_steps(tmp_path, [1])
    assert fits(CheckpointStore(tmp_path).load_latest(), 0)


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/hostname", "a/../../outside.json", "shared.pkl", "x.json", "."]
)
def test_a_name_in_a_manifest_that_leads_elsewhere_is_not_followed(tmp_path, monkeypatch, name):
    save_steps(tmp_path / "run", [1])
    (tmp_path / "outside.json").write_text("{}")
    reseal(tmp_path / "run" / "step_00000001", **{name: {"size": 2, "sha256": "0" * 64}})
    opened, lstat = [], os.lstat

    def noted(path, *arguments, **options):
        opened.append(os.path.normpath(path))
        return lstat(path, *arguments, **options)

    monkeypatch.setattr(manifests.os, "lstat", noted)
    with pytest.raises(CheckpointError, match=r"unsafe file name|which no checkpoint has"):
        CheckpointStore(tmp_path / "run").load_latest()
    assert opened and all(Path(path).is_relative_to(tmp_path / "run") for path in opened)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "linked checkpoint"])
def test_links_pipes_and_directories_in_place_of_files_are_refused_without_hanging(tmp_path, kind):
    save_steps(tmp_path / "run", [1])
    directory = tmp_path / "run" / "step_00000001"
    path = directory / "shared.json"
    aside = path.rename(tmp_path / "elsewhere.json")
    if kind == "link":
        path.symlink_to(aside)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        aside.rename(path)
        directory.rename(tmp_path / "elsewhere")
        directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"not a regular file|is a symbolic link"):
        CheckpointStore(tmp_path / "run").load_latest()


@pytest.mark.parametrize(
    "change",
    [
        {"shared.json": {"size": 1}},
        {"shared.json": "abc"},
        {"rank_0000.json": {"size": -1, "sha256": None}},
    ],
)
def test_a_manifest_of_other_contents_is_damage_and_no_crash(tmp_path, change):
    save_steps(tmp_path, [1])
    reseal(tmp_path / "step_00000001", **change)
    with pytest.raises(CheckpointError, match="none is valid"):
        CheckpointStore(tmp_path).load_latest()


def test_the_named_points_of_the_kill_tests_are_all_there_are(tmp_path):
    passed = {0: [], 1: []}

    class Noting(CheckpointStore):
        def _point(self, name):
            passed[self.ranks.rank].append(name)

    def save(ranks):
        store = Noting(tmp_path, ranks=ranks)
        for step in range(3):
            passed[ranks.rank].clear()
            store.save(step, {}, {})

    assert in_ranks(2, save) == [None, None]
    assert passed == POINTS
