"""The image benchmarks run on a small subset: pieces go on where they were, and the tables are whole."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quick(folder, parts, methods, *more):
    """Arguments of the image benchmark at its smallest, everything written into ``folder``."""
    places = f"--out {folder}/r.json --runs {folder}/runs --pictures {folder}".split()
    return ["--quick", *places, "--seeds", "2", "--parts", parts, "--methods", methods, *more]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # a script finds its neighbours
    monkeypatch.setenv("GENGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GENGRAD_INCEPTION", raising=False)


def test_the_gpu_benchmark_runs_in_pieces_on_a_small_subset(tmp_path, monkeypatch, capsys):
    module = script("cifar10_gpu")
    monkeypatch.setattr(module, "TRIAL", 2)
    monkeypatch.setattr(module, "steps_for", lambda method, given: 6)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (120, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(120) % 10)
    command = [
        "--data",
        str(tmp_path / "images.npz"),
        "--tiny",
        "--n",
        "20",
        "--nfe",
        "1,2",
        "--features",
        "identity",
        "--out",
        str(tmp_path / "out"),
    ]
    judged = module.judge
    monkeypatch.setattr(module, "judge", lambda *given: (_ for _ in ()).throw(module.PieceOver))
    assert module.main(command) == 75
    found = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert list(found) == ["nsgf_pp"] and found["nsgf_pp"]["finished"] and found["nsgf_pp"]["nfe"] == {}
    monkeypatch.setattr(module, "judge", judged)
    assert module.main(command) == 0
    told = capsys.readouterr().out
    assert "the same command goes on" in told and told.count("FD-pixels") == 3
    found = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert all(cells["images_seen"] == 6 * 32 and set(cells["nfe"]) == {"1", "2"} for cells in found.values())
    assert all((tmp_path / "out" / f"{method}.png").exists() for method in module.METHODS)
    with pytest.raises(SystemExit, match="--minutes 20"):
        module.main([*command, "--minutes", "3"])
    with pytest.raises(SystemExit, match="--n 20"):  # the NFE that are done were judged on so many
        module.main([*command, "--n", "30"])


def test_the_gpu_benchmark_saves_a_training_that_its_piece_cuts(tmp_path, monkeypatch):
    module = script("cifar10_gpu")
    monkeypatch.setattr(module, "steps_for", lambda method, given: 200)
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(80) % 10)
    command = ["--data", str(tmp_path / "images.npz"), "--tiny", "--out", str(tmp_path / "out"), "--piece", "0.05"]
    assert module.main(command) == 75
    found = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]["nsgf_pp"]
    assert "finished" not in found and found["steps"] == 200
    assert any((tmp_path / "out" / "run-nsgf_pp" / "checkpoints").iterdir())


def test_the_speed_of_a_trial_sets_the_steps(tmp_path, monkeypatch):
    module = script("cifar10_gpu")
    asked = []

    def fake(config, quiet):
        asked.append(config.train.steps)
        return type("Outcome", (), {"seconds": 5.0 + 0.1 * config.train.steps})()

    monkeypatch.setattr(module.gengrad, "train", fake, raising=False)
    given = type("Given", (), {"out": tmp_path, "minutes": 2.0, "data": "x.npz", "tiny": True})()
    assert module.steps_for("flow_matching", given) == pytest.approx(1200, abs=1) and asked == [20, 40]


def test_the_image_benchmark_writes_its_tables_and_computes_nothing_twice(tmp_path, monkeypatch, capsys):
    module = script("images")
    monkeypatch.setattr(module, "NFES", (2,))
    monkeypatch.setattr(module, "BATCHES", (32, 64))
    from gengrad.evaluation import classifier

    monkeypatch.setattr(classifier, "steps_for", lambda n: 5)
    command = quick(tmp_path, "methods,phase1", "nsgf_pp_shared,flow_matching", "--steps", "3", "--n", "20")
    module.main(command)
    first = capsys.readouterr().out
    assert "flow matching" in first and "NSGF++, shared network" in first and "effective_neighbours" in first
    monkeypatch.setattr(module, "train", None)
    monkeypatch.setattr(module, "judge", None)
    monkeypatch.setattr(module, "plan", None)
    module.main(command)
    assert capsys.readouterr().out == first


def test_processes_of_the_image_benchmark_share_one_json(tmp_path, monkeypatch, capsys):
    module = script("images")
    monkeypatch.setattr(module, "NFES", (2, 4))
    found = {"seconds": 2.0, "cpu_seconds": 2.0, "ot_seconds": 1.0, "images": 6, "floor": 0.5}
    scores = iter(range(1, 99))

    def judged(config, target, nfe, seed, n):
        if nfe == 4 and config.method["name"] == "flow_matching":  # meanwhile the other process has written
            there = json.loads((tmp_path / "r.json").read_text())
            cells = {"2/0": {"FD-classifier": 7.0}}
            there["methods"]["ot_flow_matching"] = {**found, "config": "other", "cells": cells}
            there["phase1"] = {"32": {"matched_cost": 0.5}}
            (tmp_path / "r.json").write_text(json.dumps(there))
        return {"FD-classifier": float(next(scores))}

    monkeypatch.setattr(module, "judge", judged)
    monkeypatch.setattr(module, "train", lambda config: {**found, "config": config.digest()})
    command = quick(tmp_path, "methods", "flow_matching")
    monkeypatch.setattr(module.plotting, "side_by_side", lambda grids: None)
    monkeypatch.setattr(module.plotting, "save", lambda figure, place: None)
    module.main(command)
    told, kept = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert "1.50 ± 0.71" in told and "7.00 (1 of 2 seeds)" in told and "OT flow matching" in told
    assert set(kept["methods"]["flow_matching"]["cells"]) == {"2/0", "2/1", "4/0", "4/1"} and kept["phase1"]
    with pytest.raises(SystemExit, match=r"unknown 'nsfg'; known: nsgf_pp, "):
        module.main([*command, "--methods", "nsfg"])
