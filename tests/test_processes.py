"""Several processes give what one gives: the same batch, the same Sinkhorn problem, the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gengrad.cli import main
from gengrad.training.tracking import read_metrics

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# the launcher that `accelerate launch` takes where there are several GPUs; its settings, or it asks or warns
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def train_on_two(*arguments: str, launcher: list[str] = TORCHRUN) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *launcher, str(ROOT / "tests" / "two_processes.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600)


@pytest.mark.parametrize("method", ["nsgf", "flow_matching"])
def test_two_processes_end_where_one_ends_after_100_steps(method, small, tmp_path):
    train = {"steps": 100, "batch_size": 32, "checkpoint_every": 50, "log_every": 10}
    settings = {"name": method, "ot_batch": 64, "flow_steps": 2} if method == "nsgf" else {"name": method}
    one, two = small("one", train=train, method=settings), small("two", train=train, method=settings)
    assert main(["train", str(one)]) == 0
    result = train_on_two(str(two))
    assert result.returncode == 0, result.stderr[-2000:]
    a, b = (load_file(tmp_path / name / "flow.safetensors") for name in ("one", "two"))
    # the sums over the batch are taken in another order; Adam makes 1e-5 of that in 100 steps (5-reliability.md)
    for key in a:
        assert (a[key] - b[key]).norm() <= 1e-5 * a[key].norm(), key
    first, second = read_metrics(tmp_path / "one", seconds=False), read_metrics(tmp_path / "two", seconds=False)
    assert [row["step"] for row in first] == [row["step"] for row in second] == list(range(10, 101, 10))
    assert all(abs(x["loss"] - y["loss"]) <= 1e-5 * x["loss"] for x, y in zip(first, second))


def test_the_gradient_of_a_potential_inside_its_forward_is_that_of_one_process(small, tmp_path):
    """The map is a gradient and its log det a Hessian's, both taken inside of the wrapped module: nothing is lost."""
    settings = {
        "train": {"steps": 20, "batch_size": 32, "checkpoint_every": 20, "log_every": 1, "lr": 0.01},
        "data": {"name": "gaussian_mixture", "means": [[-2.0, 0.0], [2.0, 0.0]], "scales": [0.8, 0.8]},
        "network": {"name": "icnn", "width": 8},
        "method": {"name": "jko_icnn", "jko_steps": 2, "tau": 0.2, "cloud": 512, "tol": 0.0},
    }
    one, two = small("one", **settings), small("two", **settings)
    assert main(["train", str(one)]) == 0
    result = train_on_two(str(two))
    assert result.returncode == 0, result.stderr[-2000:]
    first, second = ([row for row in read_metrics(tmp_path / name) if "grad_norm" in row] for name in ("one", "two"))
    assert len(first) == len(second) == 20
    # rounding alone: it grows from 1e-7 over 20 steps of Adam
    assert all(abs(x["loss"] - y["loss"]) <= 1e-4 * abs(x["loss"]) for x, y in zip(first, second))
    assert all(abs(x["grad_norm"] - y["grad_norm"]) <= 1e-3 * x["grad_norm"] for x, y in zip(first, second))
    a, b = (load_file(tmp_path / name / "flow.safetensors") for name in ("one", "two"))
    for key in a:
        assert (a[key] - b[key]).norm() <= 1e-3 * a[key].norm().clamp_min(1e-3), key


@pytest.mark.slow  # four more starts of torch; the launcher ends where torchrun does
def test_accelerate_launch_starts_the_same_two_processes(small, tmp_path):
    train = {"steps": 4, "batch_size": 32, "checkpoint_every": 4}
    for name, launcher in (("torchrun", TORCHRUN), ("accelerate", ACCELERATE)):
        result = train_on_two(str(small(name, train=train)), launcher=launcher)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "2 processes" in result.stdout and result.stdout.count("done: 4 steps") == 1
    a, b = (load_file(tmp_path / name / "flow.safetensors") for name in ("torchrun", "accelerate"))
    assert all((a[key] == b[key]).all() for key in a)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused_once(small):
    result = train_on_two(str(small("odd", train__batch_size=33)))
    assert result.returncode != 0
    assert result.stderr.count("does not divide by the 2 processes") == 1


def test_two_processes_resume_bit_for_bit(small, tmp_path):
    train = {"steps": 12, "batch_size": 32, "checkpoint_every": 4, "log_every": 1}
    whole, half = small("whole", train=train), small("half", train=train)
    first = train_on_two(str(whole))
    assert first.returncode == 0, first.stderr[-2000:]
    # the newest checkpoint is the finished run's: without it the run goes on from the one before
    second = train_on_two(str(half))
    assert second.returncode == 0, second.stderr[-2000:]
    newest = sorted((tmp_path / "half" / "checkpoints").glob("step_*"))[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    again = train_on_two(str(half))
    assert again.returncode == 0, again.stderr[-2000:]
    assert "goes on   at step 8" in again.stdout
    assert read_metrics(tmp_path / "whole", seconds=False) == read_metrics(tmp_path / "half", seconds=False)
    a, b = (load_file(tmp_path / name / "flow.safetensors") for name in ("whole", "half"))
    assert all((a[key] == b[key]).all() for key in a)


def test_a_process_of_several_ends_before_python_tears_down():
    """With gloo's threads alive the teardown aborts now and then (``cli.leave``); here it always would."""
    code = "import atexit, os; from gengrad.cli import leave; atexit.register(os.abort); print('told'); leave(3)"
    ended = {}
    for world in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**ENV, "WORLD_SIZE": world}
        )
        ended[world] = done.returncode, done.stdout.strip()
    assert ended["2"] == (3, "told") and ended["1"][0] != 3


def test_it_ends_with_its_code_after_a_broken_pipe():
    """``guarded`` closes the error stream then, and a closed one cannot be flushed."""
    code = "import sys; from gengrad.cli import leave; sys.stderr.close(); leave(3)"
    assert subprocess.run([sys.executable, "-c", code], env={**ENV, "WORLD_SIZE": "2"}).returncode == 3
