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
SHORT = {"one": 30, "two": 16, "plain": 16, "signals": 20}  # how many kills or signals; all in 30 seconds
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


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    """The figures of the short runs; they share one process."""
    names, amounts = zip(*SHORT.items())
    return dict(zip(names, figures("together", tmp_path_factory.mktemp("kills"), *amounts, timeout=300).values()))


@pytest.fixture
def count(request, tmp_path):
    """A function that gives a mode's figures for an amount: those counted, or those of a longer run."""

    def figures_of(mode: str, amount: int) -> dict:
        if amount == SHORT[mode]:
            return request.getfixturevalue("counted")[mode]
        return figures(mode, tmp_path, amount, timeout=900)

    return figures_of


def short_and(mode: str, longer: int):
    return pytest.mark.parametrize("times", [SHORT[mode], pytest.param(longer, marks=pytest.mark.slow)])


@short_and("one", 300)
def test_a_kill_of_one_process_loses_nothing(count, times):
    counts = count("one", times)
    assert counts["kills"] == times + 2 * len(POINTS[0])  # every planned death came
    assert counts["in_a_save"] >= 10  # and many hit a save
    assert {key: counts[key] for key in LOSSES} == LOSSES
    assert counts["newest"] >= times  # each life saved at least once


@short_and("two", 200)
def test_a_kill_of_either_of_two_processes_loses_nothing(count, times):
    counts = count("two", times)
    assert counts["kills"] == times + sum(map(len, POINTS.values()))
    assert counts["in_a_save"] >= 5
    assert {key: counts[key] for key in LOSSES} == LOSSES


@short_and("plain", 100)
def test_the_same_kills_ruin_a_plain_save(count, times):
    counts = count("plain", times)
    assert counts["unloadable"] + counts["wrong"] >= 1  # measured: two of three


@short_and("signals", 200)
def test_a_signal_at_any_moment_saves_and_leaves_with_its_code(count, times):
    counts = count("signals", times)
    assert counts["143"] == times - times // 4 and counts["130"] == times // 4 and counts["other"] == 0
    assert counts["saved"] == times
    assert counts["longest"] < 20


def check_torchrun(tmp_path, deaths: list[str], timeout: int) -> None:
    result = torchrun(tmp_path, deaths, timeout)
    assert result["world"] == 2 and result["attempts"] == len(deaths) + 1
    assert not result["bad"]  # every start found the newest acknowledged state, whole
    (message, *_), (other, *_) = result["outcome"]
    assert message == other and message.startswith("SaveError: rank 1 of 2: cannot write")
    assert "rank_0001.safetensors (400,080 bytes)" in message and "Kept: " in message
    assert [outcome[1:] for outcome in result["outcome"]] == [[True, True]] * 2  # the old one stood; then it went on


@pytest.mark.slow  # torchrun itself ends in an abort now and then on a busy machine
def test_under_torchrun_one_full_disk_aborts_the_save_of_both_ranks(tmp_path):
    check_torchrun(tmp_path, [], timeout=90)


@pytest.mark.slow
def test_under_torchrun_every_point_of_a_save_survives_its_kill(tmp_path):
    check_torchrun(tmp_path, [f"{rank}:{p}" for rank, points in POINTS.items() for p in points], timeout=600)


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
