"""Every damage is seen, no damaged or foreign state is loaded, and no file is executed or followed elsewhere."""

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

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_cases import (
    bits,
    fits,
    flip,
    load_in_ranks,
    names,
    save_steps,
    shared_state,
)

from gengrad.files import read_json
from gengrad.training import manifest as manifests
from gengrad.training.checkpoint import CheckpointError, CheckpointStore


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
