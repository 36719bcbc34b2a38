"""An interrupted run ends bit for bit where the uninterrupted one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gengrad.cli import main
from gengrad.training.checkpoint import CheckpointStore
from gengrad.training.tracking import read_metrics

ROOT = Path(__file__).parents[1]
METHODS = {
    "nsgf_euler": {"method": {"name": "nsgf", "ot_batch": 64, "flow_steps": 2, "pool_batches": 2}},
    "nsgf_sample": {"method": {"name": "nsgf", "ot_batch": 64, "pool": "geodesic", "target": "sample"}},
    "otfm_finite": {"method": {"name": "flow_matching", "coupling": "minibatch_ot"}, "data": {"name": "digits"}},
}
# the average over the whole run: with a short horizon it would soon forget what a resume did to it
TRAIN = {"steps": 37, "batch_size": 32, "checkpoint_every": 4, "log_every": 1, "ema_share": 1.0}


def same_runs(one: Path, two: Path) -> None:
    """Loss curve, published weights, and everything in the last checkpoint but its place."""
    assert read_metrics(one, seconds=False) == read_metrics(two, seconds=False)
    a, b = load_file(one / "flow.safetensors"), load_file(two / "flow.safetensors")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def killed(config: Path, most: int) -> dict:
    """What tests/killer.py tells of training ``config`` with at most so many kills; the run is finished after."""
    command = [sys.executable, str(ROOT / "tests" / "killer.py"), str(config), "1", str(most), "1.2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["code"] == 0, result.stderr
    return told


@pytest.mark.parametrize("case", METHODS)
def test_a_run_killed_at_random_moments_ends_bit_for_bit_like_one_never_killed(case, small, tmp_path):
    changes = {**METHODS[case], "train": TRAIN}
    whole, cut = small("whole", **changes), small("cut", **changes)
    assert killed(whole, 0)["kills"] == 0
    told = killed(cut, 10)
    assert told["kills"] >= 1  # otherwise nothing was interrupted and the test shows nothing
    same_runs(tmp_path / "whole", tmp_path / "cut")


def whole_and_half(small, monkeypatch) -> Path:
    """Trains the run ``whole`` to its end and ``half`` to its half; the config of the latter."""
    assert main(["train", str(small("whole", train=TRAIN))]) == 0
    half = small("half", train=TRAIN)
    with monkeypatch.context() as patch:
        _stop_after(patch, 21)
        assert main(["train", str(half)]) == 130
    return half


@pytest.mark.parametrize("dropped", ["networks", "average", "optimizer", "progress"])
def test_the_comparison_above_turns_red_when_a_piece_of_state_is_lost(dropped, small, tmp_path, monkeypatch):
    """Runs to half, spoils one piece of the saved state, goes on: the end must differ."""
    half, load = whole_and_half(small, monkeypatch), CheckpointStore.load_latest

    def spoiled(self):
        found = load(self)
        if dropped == "progress":
            found.shared["progress"]["step"] -= 1
        elif dropped == "optimizer":
            for entry in found.shared["fitter"]["optimizer"]["parameters"].values():
                entry["state"]["exp_avg"].zero_()
        else:
            for tensors in found.shared["fitter"][dropped].values():
                next(iter(tensors.values())).mul_(1.01)
        return found

    monkeypatch.setattr(CheckpointStore, "load_latest", spoiled)
    assert main(["train", str(half)]) == 0
    with pytest.raises(AssertionError):
        same_runs(tmp_path / "whole", tmp_path / "half")


def _stop_after(patch, steps: int) -> None:
    """Ctrl-C during optimiser step ``steps``."""
    from gengrad.training import loop

    step, taken = loop.Fitter.step, []

    def counted(self, progress):
        taken.append(1)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGINT)
        return step(self, progress)

    patch.setattr(loop.Fitter, "step", counted)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(small, tmp_path, monkeypatch, capsys):
    path = small("run", train=TRAIN)
    with monkeypatch.context() as patch:
        _stop_after(patch, 10)
        assert main(["train", str(path)]) == 130
    told = capsys.readouterr().out
    assert f"to go on: python train.py {path}" in told
    assert CheckpointStore(tmp_path / "run" / "checkpoints").load_latest().step == 10
    assert main(["train", str(path)]) == 0
    assert "goes on" in capsys.readouterr().out


def test_sigterm_ends_a_real_process_with_143_and_a_checkpoint(small, tmp_path):
    path = small("run", train={**TRAIN, "steps": 100_000})
    process = subprocess.Popen([sys.executable, "train.py", str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    until = time.monotonic() + 60
    while not list(store.directory.glob("step_*")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "to go on" in out
    assert store.load_latest().step > 0


def test_a_finished_run_is_left_alone_by_the_same_command(small, tmp_path, capsys):
    path = small("run")
    assert main(["train", str(path)]) == 0
    before = (tmp_path / "run" / "flow.safetensors").read_bytes()
    assert main(["train", str(path)]) == 0
    assert (tmp_path / "run" / "flow.safetensors").read_bytes() == before


def test_a_changed_config_does_not_go_on_with_the_old_run_but_may_start_from_its_weights(small, tmp_path, capsys):
    path = small("run")
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path), "train.lr=0.5"]) == 2
    assert "train.lr: 0.001 there, 0.5 here" in capsys.readouterr().err
    assert main(["train", str(path), f"init_from={tmp_path / 'run'}", f"out={tmp_path / 'next'}", "train.lr=1e-9"]) == 0
    a, b = (load_file(tmp_path / name / "flow.safetensors") for name in ("run", "next"))
    # a learning rate of 1e-9 leaves the weights where init_from put them, up to 20 steps of 1e-9 each
    assert all((a[k] - b[k]).abs().max() < 1e-7 for k in a)


def test_a_run_from_before_a_setting_came_goes_on_with_its_default(small, tmp_path, monkeypatch):
    half, load = whole_and_half(small, monkeypatch), CheckpointStore.load_latest

    def older(self):
        found = load(self)
        del found.shared["config"]["train"]["optimizer"], found.shared["config"]["method"]["pool"]
        return found

    monkeypatch.setattr(CheckpointStore, "load_latest", older)
    assert main(["train", str(half)]) == 0
    same_runs(tmp_path / "whole", tmp_path / "half")


def test_a_loss_that_stays_not_finite_stops_the_run_and_keeps_a_replay(small, tmp_path, monkeypatch, capsys):
    from gengrad.methods import nsgf

    objective = nsgf.SinkhornStage.objective

    def broken(self, networks, part, generator):
        loss, logs = objective(self, networks, part, generator)
        return (loss * float("nan") if part.step >= 12 else loss), logs

    monkeypatch.setattr(nsgf.SinkhornStage, "objective", broken)
    path = small("run", train={**TRAIN, "checkpoint_every": 10})
    assert main(["train", str(path)]) == 2
    told = capsys.readouterr()
    assert "10 times in a row" in told.err and "stage 'nsgf'" in told.err
    replay = CheckpointStore(tmp_path / "run" / "replay").load_latest()
    assert replay.shared["progress"]["skips"] == 10
    flow = load_file(tmp_path / "run" / "flow.safetensors")  # the last finite one is still published
    assert all(t.isfinite().all() for t in flow.values())


def test_a_kill_between_the_last_checkpoint_and_its_publication_is_made_good(small, tmp_path, monkeypatch, capsys):
    from gengrad import run as module

    publish = module._publish

    def dies_at_the_end(flow, progress, config):
        if progress.stage == 1:
            raise KeyboardInterrupt
        publish(flow, progress, config)

    whole, cut = small("whole", train=TRAIN), small("cut", train=TRAIN)
    assert main(["train", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "_publish", dies_at_the_end)
        assert main(["train", str(cut)]) == 130
    assert main(["train", str(cut)]) == 0
    same_runs(tmp_path / "whole", tmp_path / "cut")


def test_rows_of_a_run_killed_before_its_first_checkpoint_do_not_stay(small, tmp_path, monkeypatch):
    path = small("run", train={**TRAIN, "checkpoint_every": 100})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"st')  # cut in the middle of a line
    assert main(["train", str(path)]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 38))


def test_a_run_of_two_stages_resumes_in_either_and_repeats_none(small, tmp_path, monkeypatch):
    from gengrad.methods.flow_matching import FlowMatching, StraightStage
    from gengrad.registry import METHODS as REGISTRY
    from gengrad.training import loop

    class Noting(StraightStage):
        """A stage with state of its own: how many batches it has seen."""

        seen = 0

        def objective(self, networks, part, generator):
            self.seen += 1
            assert self.seen == part.step + 1  # taken back on resume, or this fails
            return super().objective(networks, part, generator)

        def state(self):
            return {"seen": self.seen}

        def load_state(self, state):
            self.seen = state["seen"]

    class Twice(FlowMatching):
        def stages(self, problem, flow):
            for number in range(2):
                assert len(flow.transports) >= number
                stage = Noting(problem, self.config)
                stage.name = f"part_{number}"
                yield stage

    monkeypatch.setitem(REGISTRY._classes, "twice", Twice)
    settings = {"method": {"name": "twice"}, "train": {**TRAIN, "steps": 12}}
    assert main(["train", str(small("whole", **settings))]) == 0
    assert len(gengrad_flow(tmp_path / "whole").transports) == 2
    cut = small("cut", **settings)
    taken, step = [], loop.Fitter.step
    # Ctrl-C in the first stage, in its last step (one step of the second is taken before it is seen), in the second
    for stop in (5, 7, 9):
        with monkeypatch.context() as patch:
            _stop_after(patch, stop)
            assert main(["train", str(cut)]) == 130

    def counted(self, progress):
        taken.append(progress.step)
        return step(self, progress)

    monkeypatch.setattr(loop.Fitter, "step", counted)
    assert main(["train", str(cut)]) == 0
    assert taken == [10, 11]  # 5 + 7 of the first stage, 1 + 9 of the second: two are left
    same_runs(tmp_path / "whole", tmp_path / "cut")


def gengrad_flow(folder: Path):
    import gengrad

    return gengrad.load(folder)
