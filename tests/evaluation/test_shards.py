"""Sampling in shards: a restart repeats nothing, processes share the work, the command writes the scores."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gengrad
from gengrad.cli import main
from gengrad.data import Digits
from gengrad.data.images import as_bytes
from gengrad.evaluation import shards as module
from gengrad.evaluation.features import IdentityFeatures
from gengrad.evaluation.shards import Shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GENGRAD_INCEPTION", raising=False)


@pytest.fixture(scope="module")
def run(phased, tmp_path_factory):
    """A copy of a hardly trained run, to evaluate in; tests must not change its weights."""
    return Path(shutil.copytree(phased.parent, tmp_path_factory.mktemp("images") / "copy")) / "run"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SIZE", 10)


def test_the_shards_of_any_number_of_processes_hold_the_same_samples(run, tmp_path, small_shards):
    flow, n = gengrad.load(run), 33
    whole = as_bytes(flow.sample(n, 3, seed=5))
    for world in (1, 2, 3):
        parts = [Shards(flow, tmp_path / str(world), n, rank=r, world=world, nfe=3, seed=5) for r in range(world)]
        assert sum(part.draw() for part in parts) == 4
        found = parts[0].images()
        assert found.shape == whole.shape
        # other shapes of matrix products round differently, which can tip a byte
        assert (found.int() - whole.int()).abs().max() <= 1
        assert parts[0].bill == {"nfe": 3.0, "time predictor": 1.0}


def test_a_restart_draws_only_what_is_missing_or_damaged(run, tmp_path, small_shards, monkeypatch):
    flow, extract = gengrad.load(run), IdentityFeatures()
    make = lambda n=33: Shards(flow, tmp_path / "s", n, nfe=2, seed=0)  # noqa: E731
    with monkeypatch.context() as patch:
        calls = []

        def dying(*arguments, **options):
            calls.append(options)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return type(flow).draw_samples(flow, *arguments, **options)

        patch.setattr(flow, "draw_samples", dying, raising=False)
        with pytest.raises(KeyboardInterrupt):
            make().draw()
    assert make().draw() == 2 and make().draw() == 0
    before = make().images()
    (tmp_path / "s" / "000001.safetensors").write_bytes(b"damaged")
    assert make().draw() == 1 and torch.equal(make().images(), before)
    assert make().extract(extract) == 4 and make().extract(extract) == 0
    assert make(40).draw() == 1  # the last shard was not full


def test_evaluate_writes_scores_that_are_not_called_fid(run, tmp_path, capsys):
    base = ["evaluate", str(run), "--features", "identity"]
    assert main(base) == 0
    told = capsys.readouterr().out
    assert "FD-pixels" in told and "FID" not in told.replace("FD-", "")
    report = json.loads((run / "metrics.json").read_text())
    assert [r["nfe"] for r in report["results"]] == [2, 3]
    result = report["results"][0]
    assert result["FD-pixels"]["std"] is not None and result["FD-pixels"]["floor"]["mean"] > 0
    assert result["others"] == {"time predictor": 1.0}
    assert result["protocol"]["reference"] == "300 images of digits (held_out)" and result["protocol"]["n"] == 90
    assert not (run / "samples").exists()
    assert main([*base, "--keep-samples", "--reference", "train", "--nfe", "2"]) == 0
    assert "1,497 images of digits (train)" in capsys.readouterr().out
    assert len(list((run / "samples").rglob("0*.safetensors"))) == 4  # two seeds, samples and features


def test_a_long_evaluation_says_how_far_it_is(run, small_shards, monkeypatch, capsys):
    from gengrad import sampling

    command = ["evaluate", str(run), "--features", "identity", "--nfe", "2,3", "--n", "15", "--draws", "1"]
    monkeypatch.setattr(sampling, "SILENCE", 1e9)
    assert main(command) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(sampling, "SILENCE", 0.0)
    assert main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8 and lines[0].startswith("1 of 2: NFE 2, seed ") and lines[0].endswith("samples 10 of 15")
    assert lines[-1].startswith("2 of 2: NFE 3, seed ") and lines[-1].endswith("features 15 of 15")


def test_evaluate_says_which_weights_are_missing(run, capsys):
    assert main(["evaluate", str(run)]) == 2
    told = capsys.readouterr().err
    assert "--features classifier" in told and "weights-inception" in told


def test_several_nfe_give_a_table_a_plot_and_a_strip_of_the_same_seeds(run, capsys, monkeypatch):
    from gengrad.evaluation import classifier

    monkeypatch.setattr(classifier, "steps_for", lambda n: 20)
    assert main(["sample", str(run), "--n", "60", "--nfe", "1,2,4"]) == 0
    told = capsys.readouterr().out
    assert "FD-classifier" in told and "time predictor" in told
    assert all((run / name).stat().st_size > 1000 for name in ("quality.png", "strip.png"))
    assert [r["nfe"] for r in json.loads((run / "quality.json").read_text())["results"]] == [1, 2, 4]


def test_pictures_show_the_phases_and_the_way(run):
    assert {"samples.png", "phases.png", "on_the_way.png", "loss.png"} <= {p.name for p in (run / "pictures").iterdir()}


def test_two_processes_evaluate_together(run, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["evaluate", str(run), "--features", "identity", "--nfe", "2", "--samples", "1003", "--draws", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gengrad"]
    result = subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("FD-pixels") == 1
    together = json.loads((run / "metrics.json").read_text())["results"][0]["FD-pixels"]["mean"]
    assert main(words) == 0
    alone = json.loads((run / "metrics.json").read_text())["results"][0]["FD-pixels"]["mean"]
    assert together == pytest.approx(alone, rel=1e-6)


def test_a_curve_of_the_score_and_pictures_are_drawn_while_it_trains(run, tmp_path, monkeypatch):
    from gengrad import previews
    from gengrad.evaluation import classifier, proxy

    monkeypatch.setattr(classifier, "steps_for", lambda n: 20)
    monkeypatch.setattr(proxy, "SAMPLES", 30)
    out, seen = tmp_path / "watched", set()
    last, curves, curve = previews.last_pictures, [], previews.plotting.loss_curve
    monkeypatch.setattr(previews.plotting, "loss_curve", lambda *a, **k: (curves.append(curve(*a, **k)), curves[-1])[1])
    monkeypatch.setattr(
        "gengrad.run.last_pictures",
        lambda *given: (seen.update(p.name for p in (out / "pictures").iterdir()), last(*given))[1],
    )
    assert main(["train", str(run.parent / "run.yaml"), f"out={out}", "train.preview_every=2"]) == 0
    rows = [json.loads(line) for line in (out / "proxy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 7]  # of 4 + 1 + 4 steps: in the first stage and in the third
    assert all(row["FD-classifier"] > 0 for row in rows) and (out / "pictures" / "proxy.png").exists()
    strong = curves[1].axes[0].lines[-1]  # of the second glimpse: through the values themselves
    assert strong.get_ydata().tolist() == [row["FD-classifier"] for row in rows]
    # three kinds of pictures: the same seeds at both steps, the phases, the way; all of them before the end
    assert {"over_time.png", "phases.png", "on_the_way.png"} <= seen
    again = proxy.note(out, gengrad.load(out), Digits(), 2, 7)  # as after a kill
    assert [row["step"] for row in again] == [2, 7] and again[0] == rows[0]
