"""Scorers of one's own that raise, hang, crash or answer nonsense: reported, and the others have their value."""

import sys

import pytest

import gengrad.molecules.scorers  # noqa: F401 - registers them
from gengrad.molecules.standard import Standard
from gengrad.molecules.workers import Workers
from gengrad.registry import SCORERS

BAD = """
import math, os, time
print("a scorer may print")
def score(smiles):
    n = len(smiles)
    if n == 2: raise KeyError("two")
    if n == 3: return math.nan
    if n == 4: return "four"
    if n == 5: os._exit(3)
    if n == 6: time.sleep(1000)
    if n == 7: return None
    return n
"""
# a program that reads all, then answers, as one that forgets to flush does; it dies of N, says nothing for O
PROGRAM = """
import json, os, sys
for line in sys.stdin.read().split():
    if line == "N": os._exit(4)
    if line == "O": continue
    print({"F": "NaN", "S": "no number", "P": json.dumps({"smiles": "C", "score": 1}), "Cl": '{"error": "none"}',
           "B": '{"score": 2.5}'}.get(line, len(line)))
"""


def build(name, **settings):
    return SCORERS.build({"name": name, **settings})


def test_a_python_file_that_raises_hangs_or_crashes_costs_only_the_molecules_it_does_so_for(tmp_path):
    (tmp_path / "mine.py").write_text(BAD)
    smiles = ["C" * n for n in range(1, 10)]
    # 8 s: a molecule of this test takes microseconds, also on a machine that is busy
    answers = build("python", path=str(tmp_path / "mine.py"), timeout=8.0).answers(smiles)
    assert [a.value for a in answers] == [1, None, None, None, None, None, None, 8, 9]
    says = ["KeyError: 'two'", "nan, which is no", "'four', which is no", "ended with code 3", "more than 8 s", "null"]
    for said, answer in zip(says, answers[1:7]):
        assert said in answer.problem


@pytest.mark.parametrize(
    ("text", "says"), [("x = 1", "no function score"), ("1 / 0", "ZeroDivisionError"), (None, "no file")]
)
def test_a_python_file_without_a_scorer_is_refused_with_the_reason(text, says, tmp_path):
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=says):
        build("python", path=str(tmp_path / "mine.py")).answers(["C"])


def test_no_answer_of_a_program_ever_goes_to_another_molecule(tmp_path):
    (tmp_path / "mine.py").write_text(PROGRAM)
    program = build("program", command=f"{sys.executable} -S {tmp_path / 'mine.py'}", timeout=120.0)
    smiles = ["CC", "F", "S", "P", "N", "CCC", "Cl", "B", "O", "CCCC"]
    answers = program.answers(smiles)
    assert [a.value for a in answers] == [2, None, None, None, None, 3, None, 2.5, None, 4]
    problems = {text: answer.problem for text, answer in zip(smiles, answers) if answer.problem}
    says = {
        "F": "nan",
        "S": "no JSON",
        "P": "another molecule",
        "N": "ended with code 4",
        "Cl": "none",
        "O": "answered 0",
    }
    assert problems.keys() == says.keys() and all(said in problems[text] for text, said in says.items())


def test_a_program_that_hangs_or_is_not_there_or_answers_too_much_is_reported():
    hanging = build("program", command="sleep 1000", timeout=0.2, give_up=3).answers(["C", "CC", "CCC", "O"])
    assert "took more than 0.2 s and was killed" in hanging[0].problem and "not tried" in hanging[-1].problem
    assert "more lines" in build("program", command="yes 1").answers(["C"])[0].problem
    with pytest.raises(ValueError, match="cannot start /none"):
        build("program", command="/none").answers(["C"])


def test_a_chain_of_100000_carbons_is_killed_and_reported_and_the_run_goes_on():
    settings = Standard(max_length=10**6, max_atoms=10**6).model_dump()
    chain = "C" * 100_000  # canonicalisation takes minutes, or all of the stack
    answers = Workers("standardise", settings, timeout=5.0).map([("smiles", text) for text in ("OC", chain, "CC")])
    assert [answer.value and answer.value[0] for answer in answers] == ["CO", None, "CC"]
    assert "was killed" in answers[1].problem or "ended" in answers[1].problem


def test_after_many_failures_in_a_row_the_rest_is_not_tried(tmp_path):
    (tmp_path / "mine.py").write_text("import os\ndef score(smiles): os._exit(1)")
    answers = Workers("python", {"path": str(tmp_path / "mine.py")}, timeout=60.0, give_up=2).map(["C"] * 5)
    assert ["not tried" in answer.problem for answer in answers] == [False, False, True, True, True]
