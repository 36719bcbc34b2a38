"""What users get wrong with JKO flows: one message with the reason and what to do, exit code 2, good steps kept."""

import numpy as np
import pytest
import yaml

import gengrad
from gengrad.cli import main
from gengrad.methods.jko_stage import JKOStage
from gengrad.registry import POTENTIALS, Configured

BASE = {
    "source": {"name": "normal"},
    "data": {"name": "space", "dimension": 2},
    "network": {"name": "icnn", "width": 8},
    "method": {"name": "jko_icnn", "functional": "entropy", "jko_steps": 2, "tau": 0.2, "cloud": 256},
    "train": {"steps": 8, "batch_size": 32, "checkpoint_every": 4},
    "evaluate": {"nfe": [2]},
}
DIRAC = {"name": "diracs", "points": [[0.0, 0.0]]}
HILL = [{"name": "potential", "potential": "quadratic", "weight": -1.0}]  # concave: no minimum from tau = 1 on
TABLE = np.c_[np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2]

CASES = {
    "an entropy of a Dirac": (
        {"source": DIRAC}, {}, ["needs a density", "source 'diracs' has none", "normal, gaussian"],
    ),
    "a singular interaction of a Dirac": (
        {"source": DIRAC}, {"functional": "interaction"}, ["coincide", "source without atoms"],
    ),
    "a concave energy and a long step": ({}, {"functional": HILL, "tau": 2.0}, ["step_1", "smaller tau", "now 2"]),
    "a negative entropy": (
        {}, {"functional": [{"name": "entropy", "weight": -1.0}]}, ["entropy of weight -1", "positive weight"],
    ),
    "kl to no data": ({}, {"functional": "kl"}, ["needs the log density of the data", "'space'"]),
    "outposts where particles meet": (
        {}, {"functional": ["entropy", "interaction"], "outposts": 32}, ["outposts=32", "particles do not meet"],
    ),
    "samples of no data": ({}, {"functional": "energy_distance"}, ["samples of the data", "'space' has none"]),
    "a misspelt functional": ({}, {"functional": "entorpy"}, ["method.functional", "Did you mean 'entropy'"]),
    "a misspelt potential": (
        {}, {"functional": {"name": "potential", "potential": "double_wall"}}, ["Did you mean 'double_well'"],
    ),
    "a matrix that is not positive": (
        {}, {"functional": {"name": "potential", "potential": {"name": "quadratic", "matrix": [[1, 2], [2, 1]]}}},
        ["symmetric and positive definite"],
    ),
    "a weight of nothing": ({}, {"functional": {"name": "entropy", "weight": 0}}, ["weight", "other than 0"]),
    "no steps": ({}, {"jko_steps": 0}, ["method.jko_steps", "greater than or equal to 1"]),
    "a table that is not there": (
        {"data": {"name": "logistic_posterior", "path": "{tmp}/none.csv"}}, {"functional": "kl"}, ["none.csv"],
    ),
    "text in a feature column": (
        {"data": {"name": "logistic_posterior", "path": "{tmp}/text.csv"}}, {"functional": "kl"},
        ["text.csv", "line 3", "not a row of numbers"],
    ),
    "labels of one kind": (
        {"data": {"name": "logistic_posterior", "path": "{tmp}/one.csv"}}, {"functional": "kl"},
        ["of two kinds; found 1"],
    ),
    "an array that the .npz does not hold": (
        {"data": {"name": "logistic_posterior", "path": "{tmp}/t.npz", "features": "x", "labels": "z"}},
        {"functional": "kl"}, ["t.npz", "z"],
    ),
    "observations between two steps": (
        {"data": {"name": "space", "dimension": 1}},
        {"name": "jko_filter", "functional": "entropy", "observations": [[0.1, 1.0]]}, ["not where one of the 2 steps"],
    ),
}  # fmt: skip


class Cliff(Configured):
    """A bowl around a point where a logarithm has no value: the first step gets there, the next cannot begin."""

    def __call__(self, x):
        return (x - 6).square().sum(1) / 2 + 0 * (5 - x.mean(0)).log().sum()


class Coordinates(Configured):
    """As many numbers a point as it has coordinates, where one is asked for."""

    def __call__(self, x):
        return x.square()


@pytest.fixture
def own_potentials(monkeypatch):
    monkeypatch.setattr(POTENTIALS, "_classes", dict(POTENTIALS._classes))
    POTENTIALS.register("cliff")(Cliff)
    POTENTIALS.register("coordinates")(Coordinates)


def run(tmp_path, changes, method):
    raw = {key: dict(value) for key, value in BASE.items()} | {"out": str(tmp_path / "run")}
    for key, value in changes.items():
        raw[key] = {**(raw[key] if key == "train" else {}), **value}
    raw["method"] |= method
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw).replace("{tmp}", str(tmp_path)))
    return main(["train", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_with_a_jko_flow_gives_one_message_and_exit_code_2(name, tmp_path, capsys):
    np.savez(tmp_path / "t.npz", x=TABLE[:, :2], y=TABLE[:, 2])
    lines = [",".join(map(str, row)) for row in TABLE.tolist()]
    (tmp_path / "text.csv").write_text("\n".join(["a,b,y", lines[0], "red,1,0", *lines[1:]]))
    (tmp_path / "one.csv").write_text("\n".join(["a,b,y", *(f"{i},{i * i},1" for i in range(20))]))
    changes, method, says = CASES[name]
    assert run(tmp_path, changes, method) == 2
    told = capsys.readouterr().err
    assert all(words in told for words in says) and "Traceback" not in told, told


def test_where_the_energy_rises_the_run_ends_and_the_good_steps_stay(tmp_path, capsys, monkeypatch):
    judge = JKOStage._judge

    def worse(self, network):
        found = judge(self, network)
        return found | {"energy": found["energy"] + 1.0} if self.k == 1 and network is not None else found

    monkeypatch.setattr(JKOStage, "_judge", worse)
    assert run(tmp_path, {}, {}) == 2
    told = capsys.readouterr().err
    assert "step_2: the energy rose" in told and "the flow of the 1 steps before is kept" in told
    assert len(gengrad.load(tmp_path / "run").transports) == 1


@pytest.mark.filterwarnings("error:Converting a tensor")
def test_a_potential_of_one_s_own_that_fails_on_the_way_says_so_and_the_good_steps_stay(
    tmp_path, capsys, own_potentials
):
    terms = [{"name": "potential", "potential": "cliff"}, "entropy"]
    assert run(tmp_path, {}, {"functional": terms, "tau": 2.0, "jko_steps": 2}) == 2
    told = capsys.readouterr().err
    assert "the potential is nan at the point" in told and "finite wherever mass can go" in told, told
    assert f"stage 2; the flow of the 1 before is kept in {tmp_path / 'run'}" in told
    assert len(gengrad.load(tmp_path / "run").transports) == 1


def test_a_potential_of_one_s_own_that_gives_the_wrong_shape_says_which(tmp_path, capsys, own_potentials):
    assert run(tmp_path, {}, {"functional": {"name": "potential", "potential": "coordinates"}}) == 2
    told = capsys.readouterr().err
    assert "one number a point" in told and "x.square().sum(1)" in told and "is kept" not in told
