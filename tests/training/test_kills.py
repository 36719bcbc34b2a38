"""Kills, signals and full disks lose nothing that a save acknowledged; what happens is in killing.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_cases import POINTS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
LOSSES = {"unloadable": 0, "lost": 0, "wrong": 0, "damaged": 0}


def figures(mode: str, directory: Path, *arguments, prefix=(), launcher=(), timeout=90) -> dict:
    """The figures of one run of killing.py."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = [str(HERE / "killing.py"), mode, str(directory), *map(str, arguments)]
    done = subprocess.run(
        [*prefix, sys.executable, *launcher, *script], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def torchrun(directory: Path, deaths: list[str], timeout: int) -> dict:
    options = ["--standalone", "--nproc_per_node", "2", "--max-restarts", str(len(deaths)), "--monitor-interval", "0.1"]
    launcher = ["-m", "torch.distributed.run", *options]
    return figures("torchrun", directory, ",".join(deaths), launcher=launcher, timeout=timeout)


@pytest.mark.parametrize("kills", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_a_kill_of_one_process_loses_nothing(tmp_path, kills):
    counts = figures("one", tmp_path, kills, timeout=600)
    assert counts["kills"] == kills + 2 * len(POINTS[0])  # every planned death came
    assert counts["in_a_save"] >= 10  # and many hit a save
    assert {key: counts[key] for key in LOSSES} == LOSSES
    assert counts["newest"] >= kills  # each life saved at least once


@pytest.mark.parametrize("kills", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_of_either_of_two_processes_loses_nothing(tmp_path, kills):
    counts = figures("two", tmp_path, kills, timeout=900)
    assert counts["kills"] == kills + sum(map(len, POINTS.values()))
    assert counts["in_a_save"] >= 5
    assert {key: counts[key] for key in LOSSES} == LOSSES


def test_the_same_kills_ruin_a_plain_save(tmp_path):
    counts = figures("plain", tmp_path, 16)
    assert counts["unloadable"] + counts["wrong"] >= 1  # measured: two of three


def check_torchrun(tmp_path, deaths: list[str], timeout: int) -> None:
    result = torchrun(tmp_path, deaths, timeout)
    assert result["world"] == 2 and result["attempts"] == len(deaths) + 1
    assert not result["bad"]  # every start found the newest acknowledged state, whole
    (message, *_), (other, *_) = result["outcome"]
    assert message == other and message.startswith("SaveError: rank 1 of 2: cannot write")
    assert "rank_0001.safetensors (400,080 bytes)" in message and "Kept: " in message
    assert [outcome[1:] for outcome in result["outcome"]] == [[True, True]] * 2  # the old one stood; then it went on


def test_under_torchrun_a_killed_rank_resumes_and_one_full_disk_aborts_both(tmp_path):
    check_torchrun(tmp_path, ["1:rank_written"], timeout=90)


@pytest.mark.slow
def test_under_torchrun_every_point_of_a_save_survives_its_kill(tmp_path):
    check_torchrun(tmp_path, [f"{rank}:{p}" for rank, points in POINTS.items() for p in points], timeout=600)


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_saves_and_leaves_with_its_code(tmp_path, times):
    counts = figures("signals", tmp_path, times, timeout=300)
    assert counts["143"] == times - times // 4 and counts["130"] == times // 4 and counts["other"] == 0
    assert counts["saved"] == times
    assert counts["longest"] < 20


def test_a_full_disk_keeps_the_last_checkpoint_and_tells_path_and_bytes(tmp_path):
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    script = f'mount -t tmpfs -o size=3m tmpfs "{tmp_path}" && exec "$@"'
    if subprocess.run([*mount, "sh", "-c", f"{script}", "sh", "true"], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    result = figures("full", tmp_path, prefix=[*mount, "sh", "-c", script, "sh"])
    assert result["error"] == "SaveError" and result["errno"] == 28
    assert "shared.safetensors (1,600,184 bytes): No space left on device. Free on that disk: " in result["message"]
    assert result["names"] == ["step_00000001", "step_00000002"]  # and no temporary directory fills the disk
    assert result["kept"] and result["goes_on"]
