"""The store commits whole checkpoints on all ranks or on none, and keeps the right ones."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from any_states import plain, states
from checkpoint_cases import (
    POINTS,
    fits,
    flip,
    in_ranks,
    load_in_ranks,
    names,
    rank_state,
    same,
    save_steps,
    shared_state,
)

from gengrad.files import SaveError
from gengrad.training import checkpoint as checkpoints
from gengrad.training import manifest as manifests
from gengrad.training.checkpoint import CheckpointError, CheckpointStore


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
