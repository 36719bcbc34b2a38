"""Sampling a run: the same seed gives the same samples, the files hold them, the table judges them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import gengrad
from gengrad.cli import main
from gengrad.config import read_config
from gengrad.sampling import judge, target_of


def test_the_same_seed_gives_the_same_samples_whatever_the_chunk_size(trained):
    flow = gengrad.load(trained)
    whole = flow.sample(700, nfe=5, seed=3)
    for chunk in (1000, 256, 100, 7):
        # other shapes of matrix products round differently: fp32, values of size 5, five steps
        assert torch.allclose(flow.sample(700, nfe=5, seed=3, chunk=chunk), whole, atol=2e-5)
    assert torch.equal(flow.sample(700, nfe=5, seed=3), whole)
    assert not torch.allclose(flow.sample(700, nfe=5, seed=4), whole)


def test_a_sample_keeps_its_number_in_any_range(trained):
    flow = gengrad.load(trained)
    whole = flow.sample(700, nfe=5)
    assert torch.allclose(flow.sample(200, nfe=5, first=300), whole[300:500], atol=2e-5)


def test_the_bill_is_counted_in_the_network(trained):
    flow = gengrad.load(trained)
    for nfe, solver in ((1, "euler"), (7, "euler"), (8, "rk4"), (6, "heun")):
        assert flow.draw_samples(10, nfe, solver=solver, chunk=4).nfe == nfe


def test_a_trajectory_starts_at_the_source_and_ends_at_the_samples(trained):
    flow = gengrad.load(trained)
    path = flow.trajectory(50, nfe=5, seed=2)
    assert path.shape == (6, 50, 2)
    assert torch.equal(path[-1], flow.sample(50, nfe=5, seed=2))


def test_the_command_writes_arrays_tensors_pictures_and_films(trained, tmp_path, capsys):
    base = ["sample", str(trained), "--n", "50", "--nfe", "5", "--seed", "2"]
    assert main([*base, "--out", str(tmp_path / "x.npy"), "--trajectory", str(tmp_path / "x.gif")]) == 0
    assert "5 network evaluations each (counted)" in capsys.readouterr().out
    assert main([*base, "--out", str(tmp_path / "x.pt"), "--chunk", "7"]) == 0
    assert main([*base, "--out", str(tmp_path / "x.png")]) == 0
    expected = gengrad.load(trained).sample(50, nfe=5, seed=2)
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected.numpy())
    assert torch.allclose(torch.load(tmp_path / "x.pt", weights_only=True), expected, atol=2e-5)
    assert min(Image.open(tmp_path / "x.png").size) > 100
    assert Image.open(tmp_path / "x.gif").n_frames > 5


def test_what_the_commands_name_is_what_the_flows_and_the_config_have():
    """The help does not wait for torch, so that it has the solvers' names of its own; defaults come from the schema."""
    from gengrad.cli import _settings
    from gengrad.cli_arguments import SOLVERS
    from gengrad.config import EvaluateSettings
    from gengrad.flows import solvers

    assert list(SOLVERS) == list(solvers.SOLVERS)
    unsaid, said = gengrad.Flow(None), gengrad.Flow(None, info={"config": {"evaluate": {"n": 7}}})
    assert _settings(unsaid) == EvaluateSettings().model_dump()
    assert _settings(said) == {**EvaluateSettings().model_dump(), "n": 7}


def test_an_ending_in_capitals_is_the_same_format(trained, tmp_path):
    base = ["sample", str(trained), "--n", "5", "--nfe", "2"]
    for name in ("X.NPY", "X.PT", "X.PNG"):
        assert main([*base, "--out", str(tmp_path / name)]) == 0
    assert main([*base, "--trajectory", str(tmp_path / "X.GIF")]) == 0
    assert np.load(tmp_path / "X.NPY").shape == torch.load(tmp_path / "X.PT", weights_only=True).shape == (5, 2)
    assert [Image.open(tmp_path / name).format for name in ("X.PNG", "X.GIF")] == ["PNG", "GIF"]


@pytest.mark.parametrize(
    "wrong",
    [{"n": "4"}, {"n": 4.0}, {"n": 0}, {"nfe": 5.5}, {"nfe": [5]}, {"nfe": 0}, {"seed": -1}, {"seed": "a"},
     {"seed": 2**63}, {"chunk": None}, {"first": -1}],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_a_value_error_that_names_it(trained, wrong):
    flow, name = gengrad.load(trained), next(iter(wrong))
    with pytest.raises(ValueError, match=rf"^{name} is "):
        flow.draw_samples(**{"n": 4, "nfe": 5, **wrong})
    if name in ("n", "nfe", "seed"):
        with pytest.raises(ValueError, match=rf"^{name} is "):
            flow.trajectory(**{"n": 4, "nfe": 5, **wrong})


def test_numbers_of_numpy_are_numbers(trained):
    flow = gengrad.load(trained)
    assert torch.equal(flow.sample(np.int64(4), nfe=np.int32(5), seed=np.uint8(1)), flow.sample(4, nfe=5, seed=1))


def test_the_largest_seed_can_be_sampled_with_and_judged_with(trained):
    from gengrad.evaluation.transport import sampling_seeds

    flow, largest = gengrad.load(trained), 2**63 - 1
    assert flow.sample(2, nfe=1, seed=largest).isfinite().all()
    for seed in sampling_seeds(largest, draws=3):
        assert flow.sample(2, nfe=1, seed=seed).isfinite().all()
    assert sampling_seeds(1, 2) == [1_001_000, 1_001_001]


@pytest.mark.parametrize("wrong", [None, 3, ["runs/a"]])
def test_loading_what_is_no_path_says_what_is_wanted(wrong):
    with pytest.raises(ValueError, match="the folder of a run"):
        gengrad.load(wrong)


def test_the_users_folder_stands_for_its_sign(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(trained.parent))
    assert torch.equal(gengrad.load(f"~/{trained.name}").sample(2, nfe=1), gengrad.load(trained).sample(2, nfe=1))
    monkeypatch.chdir(tmp_path)
    assert main(["sample", f"~/{trained.name}", "--n", "2", "--out=~/x.npy"]) == 0
    assert (trained.parent / "x.npy").exists() and not list(tmp_path.iterdir())


def copied(trained, tmp_path):
    import shutil

    return shutil.copytree(trained, tmp_path / "copy")


def test_several_nfe_give_a_table_a_plot_and_the_protocol(trained, tmp_path, capsys):
    run = copied(trained, tmp_path)
    assert main(["sample", str(run), "--n", "70", "--nfe", "1,2,10"]) == 0
    table = capsys.readouterr().out
    report = json.loads((run / "quality.json").read_text())
    assert [result["nfe"] for result in report["results"]] == [1, 2, 10]
    assert report["results"][0]["protocol"]["n"] == 70
    assert all(row["NFE"] in table for row in report["table"])
    assert (run / "quality.png").exists() and (run / "quality.md").read_text().strip() in table
    floors = {result["w2"]["floor"]["mean"] for result in report["results"]}
    assert len(floors) == 1  # all meet the same points of the target


def test_evaluate_writes_the_metrics_with_their_protocol(trained, tmp_path):
    run = copied(trained, tmp_path)
    assert main(["evaluate", str(run), "--n", "128", "--draws", "2"]) == 0
    report = json.loads((run / "metrics.json").read_text())
    result = report["results"][0]
    assert result["protocol"]["n"] == 128 and result["protocol"]["draws"] == 2
    assert result["w2"]["std"] is not None and result["w2"]["floor"]["mean"] > 0
    assert {"modes_hit", "energy_distance", "sw2_squared"} <= set(result)
    assert report["versions"]["gengrad"] == gengrad.__version__ and report["run"]["config"]["seed"] == 0


def test_a_trial_with_fewer_points_leaves_the_metrics_of_the_run_as_they_are(trained, tmp_path, capsys):
    run = copied(trained, tmp_path)
    assert main(["evaluate", str(run)]) == 0
    before = (run / "metrics.json").read_bytes()
    for few, name in ((["--n", "32"], "metrics_n32_draws2"), (["--draws", "1"], "metrics_n64_draws1")):
        assert main(["evaluate", str(run), *few]) == 0
        assert f"{name}.json, metrics.json is left as it is" in capsys.readouterr().out
        assert json.loads((run / f"{name}.json").read_text())["results"] and (run / f"{name}.md").exists()
    assert (run / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("n", [1, 2, 300])
def test_any_number_of_samples_can_be_drawn(trained, n):
    assert gengrad.load(trained).sample(n, nfe=1).shape == (n, 2)


def test_a_killed_save_leaves_a_flow_that_loads(trained, tmp_path):
    """Between the description and the last rename the new weights lie under their waiting name."""
    run = copied(trained, tmp_path)
    (run / "flow.safetensors").rename(run / "flow.safetensors.next")
    (run / "flow.safetensors").write_bytes(b"the weights of before")
    assert torch.equal(gengrad.load(run).sample(5, nfe=2), gengrad.load(trained).sample(5, nfe=2))


def test_two_killed_saves_in_a_row_leave_a_flow_that_loads(trained, tmp_path, monkeypatch):
    """The first dies before its last rename, the second before its description."""
    from gengrad.flows import stored as module

    run, new = copied(trained, tmp_path), gengrad.load(trained)
    with torch.no_grad():
        next(new.parameters()).add_(1.0)

    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", kill)
        patch.setattr(module, "write_atomically", lambda path, content: path.write_bytes(content))
        patch.setattr(module, "write_json", lambda path, value: path.write_text(json.dumps(value)))
        with pytest.raises(Killed):
            new.save(run)
    expected = new.sample(5, nfe=2)
    assert torch.equal(gengrad.load(run).sample(5, nfe=2), expected)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", kill)
        with pytest.raises(Killed):
            gengrad.load(trained).save(run)
    assert torch.equal(gengrad.load(run).sample(5, nfe=2), expected)


def test_weights_that_are_not_finite_are_never_published(trained, tmp_path):
    flow = gengrad.load(trained)
    with torch.no_grad():
        next(flow.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        flow.save(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_run_on_normalised_data_samples_and_is_judged_in_the_units_of_the_file(tmp_path):
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 40 + torch.tensor([1000.0, -200.0])
    np.save(tmp_path / "points.npy", points.numpy())
    raw = {
        "out": str(tmp_path / "run"),
        "data": {"name": "array", "path": str(tmp_path / "points.npy"), "normalise": True},
        "network": {"name": "mlp", "width": 16, "depth": 2},
        "method": {"name": "nsgf", "ot_batch": 64},
        "train": {"steps": 60, "batch_size": 64, "lr": 1e-2},
    }
    gengrad.train(read_config(raw), quiet=True)
    flow = gengrad.load(tmp_path / "run")
    samples, path = flow.sample(400, nfe=5, seed=0), flow.trajectory(400, nfe=5, seed=0)
    # a crudely trained flow is within a standard deviation; normalised units would be 25 of them away
    assert (samples.mean(0) - points.mean(0)).abs().max() < 40
    assert torch.equal(path[-1], samples)
    report = judge(flow, target_of(flow), [5], n=300, draws=1, seed=0)
    assert 0.5 < report["results"][0]["w2"]["mean"] < 60


def test_a_second_run_in_one_process_may_have_another_precision(tmp_path):
    for number, precision in enumerate(("no", "bf16", "no")):
        raw = {
            "out": str(tmp_path / str(number)),
            "data": "moons",
            "network": {"name": "mlp", "width": 8, "depth": 1},
            "method": {"name": "flow_matching"},
            "train": {"steps": 2, "batch_size": 8, "precision": precision},
        }
        gengrad.train(read_config(raw), quiet=True)
    plain, _, again = (gengrad.load(tmp_path / str(number)).state_dict() for number in range(3))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
