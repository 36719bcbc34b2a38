"""Transforms by their closed forms, means by hand, the YAML's mistakes, and a whole file scored."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from gengrad.cli import main
from gengrad.molecules.desirability import arithmetic_mean, geometric_mean
from gengrad.molecules.objective import read_objective
from gengrad.molecules.scoring import _limit_scaffolds
from gengrad.registry import TRANSFORMS
from gengrad.strict_yaml import parse_yaml

SETTINGS = {
    "sigmoid": {"low": 1.0, "high": 3.0},
    "reverse_sigmoid": {"low": 1.0, "high": 3.0},
    "double_sigmoid": {"low": 1.0, "high": 3.0},
    "step": {"low": 1.0, "high": 3.0},
    "linear": {"low": 1.0, "high": 3.0},
    "reverse_linear": {"low": 1.0, "high": 3.0},
    "gaussian": {"mean": 2.0, "deviation": 0.5},
    "identity": {},
}


def at(name, *x, **more):
    transform = TRANSFORMS.build({"name": name, **SETTINGS[name], **more})
    return transform(torch.tensor(x, dtype=torch.float64)).tolist()


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_a_transform_stays_in_the_unit_interval_and_passes_nan_on(name):
    x = [0.0, 0.3, 1.0] if name == "identity" else [-1e6, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 1e6]
    assert all(0 <= s <= 1 for s in at(name, *x))
    assert math.isnan(at(name, math.nan)[0])


def test_the_transforms_have_their_closed_forms():
    end = 1 / (1 + 10**-2.5)  # of the sigmoid at high, with k = 0.5
    assert at("sigmoid", 2.0, 3.0, 1.0) == pytest.approx([0.5, end, 1 - end])
    assert at("reverse_sigmoid", 2.0, 3.0, 1.0) == pytest.approx([0.5, 1 - end, end])
    assert at("sigmoid", 3.0, k=1.0) == pytest.approx([1 / (1 + 10**-5)])
    # at low the rising one is 1/2 and the falling one 1 / (1 + 10^3), by (low - high) 150 / 100 = -3
    half = 0.5 - 1 / (1 + 10**3)
    assert at("double_sigmoid", 1.0, 3.0) == pytest.approx([half, half])
    assert at("double_sigmoid", 2.0) == pytest.approx([1 / (1 + 10**-1.5) - 1 / (1 + 10**1.5)])
    assert at("step", 0.9, 1.0, 3.0, 3.1) == [0, 1, 1, 0]
    assert at("linear", 0.0, 1.5, 9.0) == [0, 0.25, 1] and at("reverse_linear", 1.5) == [0.75]
    assert at("gaussian", 2.0, 2.5) == pytest.approx([1, math.exp(-0.5)])


def test_the_means_are_weighted_floored_and_leave_out_what_is_not_known():
    s = torch.tensor([[0.25, 1.0], [0.0, 1.0], [math.nan, 0.5], [math.nan, math.nan]], dtype=torch.float64)
    w = torch.tensor([1.0, 3.0], dtype=torch.float64)
    geometric, arithmetic = geometric_mean(s, w).tolist(), arithmetic_mean(s, w).tolist()
    assert geometric[:3] == pytest.approx([0.25**0.25, 1e-2, 0.5]) and math.isnan(geometric[3])
    assert arithmetic[:3] == pytest.approx([3.25 / 4, 0.75, 0.5]) and math.isnan(arithmetic[3])


def test_the_total_has_a_gradient_also_where_a_component_is_not_known():
    x = torch.tensor([[2.0, math.nan], [1.5, 2.5]], dtype=torch.float64, requires_grad=True)
    window = {"name": "sigmoid", "low": 1.0, "high": 3.0}
    objective = read_objective({"components": [{"scorer": n, "transform": window} for n in ("logp", "sa")]})
    objective.totals(objective.desirabilities(x)).sum().backward()
    assert x.grad.isfinite().all() and x.grad[0, 0] > 0 and x.grad[0, 1] == 0


def test_a_bare_name_is_a_component():
    objective = read_objective({"components": ["qed", {"scorer": "qed"}]})
    assert [c.label for c in objective.components] == ["qed", "qed_2"] and objective.labels == ["qed"]


def test_a_scorer_named_twice_is_one_and_equal_names_get_numbers():
    one = {"scorer": {"name": "similarity", "to": ["CC"]}}
    objective = read_objective(
        {"components": [one, {"scorer": {"name": "similarity", "to": ["CO"]}}], "filters": [{**one, "at_least": 0.4}]}
    )
    assert objective.labels == ["similarity", "similarity_2"] and objective.filters[0].column == 0


QED = [{"scorer": "qed"}]
DOWNWARDS = {"name": "sigmoid", "low": 2.0, "high": 1.0}
NO_PATTERN = {"name": "substructure", "smarts": "(("}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({}, ["components", "missing"]),
        ({"components": []}, ["at least 1"]),
        ({"components": [{"scorer": "qde"}]}, ["components.0.scorer.name", "Did you mean 'qed'"]),
        ({"components": [{"scorer": "logp"}]}, ["components.0.transform", "do not lie in [0, 1]", "double_sigmoid"]),
        ({"components": [{"scorer": "qed", "wieght": 1.0}]}, ["components.0.wieght", "unknown key"]),
        ({"components": [{"scorer": "qed", "weight": 0.0}]}, ["components.0.weight", "greater than 0"]),
        ({"components": [{"scorer": "qed", "transform": DOWNWARDS}]}, ["must lie below"]),
        ({"components": QED, "filters": [{"scorer": "weight"}]}, ["filters.0", "at_least, at_most or both"]),
        (
            {"components": QED, "filters": [{"scorer": NO_PATTERN, "at_least": 1}]},
            ["filters.0.scorer.smarts", "a SMARTS"],
        ),
        ({"components": QED, "per_scaffold": 0}, ["per_scaffold"]),
        ({"components": [{"scorer": "logp"}, {"scorer": "qde"}]}, ["2 mistakes"]),
    ],
)
def test_the_mistakes_of_an_objective_are_named_all_at_once(raw, says):
    with pytest.raises(ValueError) as told:
        read_objective(raw)
    assert all(said in str(told.value) for said in says), told.value


def test_the_objective_of_the_docs_can_be_read():
    text = (Path(__file__).parents[2] / "docs" / "molecules.md").read_text()
    objective = read_objective(parse_yaml(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1], "docs/molecules.md"))
    assert objective.labels == ["qed", "logp", "similarity", "program", "substructure", "alerts", "weight"]


def test_of_each_scaffold_the_best_pass():
    total = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.3])
    passed, notes = torch.tensor([True, True, True, True, False]), [[] for _ in range(5)]
    _limit_scaffolds(2, total, passed, ["a", "a", "a", "b", "a"], notes)
    assert passed.tolist() == [False, True, True, True, False] and "2 better ones" in notes[0][0] and not notes[4]


OBJECTIVE = {
    "components": [
        {"scorer": "qed", "weight": 2.0},
        {"scorer": "logp", "transform": {"name": "double_sigmoid", "low": 1, "high": 3}, "label": "lipophilicity"},
        {"scorer": {"name": "python", "path": "mine.py"}, "transform": {"name": "linear", "low": 0, "high": 20}},
    ],
    "filters": [{"scorer": {"name": "substructure", "smarts": "c1ccccc1"}, "at_least": 1}],
    "per_scaffold": 1,
}


def test_a_file_is_scored_row_by_row_and_nothing_is_lost(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # toluene is too much for it
    (tmp_path / "mine.py").write_text("def score(smiles):\n    return 10 / (smiles != 'Cc1ccccc1')")
    (tmp_path / "objective.yaml").write_text(yaml.safe_dump(OBJECTIVE))
    (tmp_path / "a.smi").write_text("Cc1ccccc1 toluene\nhello x\nCCO ethanol\nc1ccccc1O phenol\nOc1ccccc1 again\n\n")
    given = ["molecules", "score", "a.smi", "--objective", "objective.yaml", "--out", "scores.csv", "--timeout", "60"]
    assert main([*given, "--processes", "1"]) == 0
    assert "6 rows, 4 valid, 3 scored" in capsys.readouterr().out
    with open("scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["row"], r["id"], r["valid"]) for r in rows] == [
        ("1", "toluene", "1"),
        ("2", "x", "0"),
        ("3", "ethanol", "1"),
        ("4", "phenol", "1"),
        ("5", "again", "1"),
        ("6", "6", "0"),
    ]
    toluene, hello, ethanol, phenol, again, empty = rows
    assert hello["notes"] == "not a SMILES" and empty["notes"] == "empty" and hello["total"] == ""
    assert toluene["python"] == "" and "python: ZeroDivisionError" in toluene["notes"]
    assert (ethanol["total"], ethanol["passed"]) == ("0.0", "0")
    assert "filter: substructure at least 1" in ethanol["notes"]
    known = {"qed": 2, "lipophilicity": 1}
    for row, weights in ((toluene, known), (phenol, {**known, "python": 1})):
        logs = sum(w * math.log(float(row[f"{name}.s"])) for name, w in weights.items())
        assert float(row["total"]) == pytest.approx(math.exp(logs / sum(weights.values())))
    own = ("id", "row", "input")
    assert {k: v for k, v in phenol.items() if k not in own} == {k: v for k, v in again.items() if k not in own}
    best = "1" if float(toluene["total"]) > float(phenol["total"]) else "0"  # of the one scaffold
    assert (toluene["passed"], phenol["passed"], toluene["scaffold"]) == (best, str(1 - int(best)), "c1ccccc1")
