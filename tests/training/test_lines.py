"""A run in a log says where it is: a few times however short it is, and every twenty seconds however slow."""

import re

import pytest

from gengrad.cli import main
from gengrad.training import loop

LINE = re.compile(r"^nsgf (\d+)/\d+  loss [\d.e+-]+  [\d.e+-]+ steps/s$", re.MULTILINE)


def spoken(text: str) -> list[int]:
    return [int(step) for step in LINE.findall(text)]


@pytest.mark.parametrize(("steps", "said"), [(20, [5, 10, 15, 20]), (2, [1, 2]), (7, [2, 4, 6, 7])])
def test_a_short_run_speaks_at_each_quarter(steps, said, small, capsys):
    train = {"steps": steps, "batch_size": 32, "log_every": 50}
    assert main(["train", str(small("short", train=train))]) == 0
    assert spoken(capsys.readouterr().out) == said


def test_a_slow_run_speaks_when_it_has_been_silent_for_long(small, capsys, monkeypatch):
    monkeypatch.setattr(loop, "SILENCE", 0.0)
    train = {"steps": 10, "batch_size": 32, "log_every": 50}
    assert main(["train", str(small("slow", train=train))]) == 0
    assert spoken(capsys.readouterr().out) == list(range(1, 11))


def test_a_long_run_speaks_every_ten_rows_of_its_log(small, capsys):
    train = {"steps": 60, "batch_size": 32, "log_every": 1}
    assert main(["train", str(small("long", train=train))]) == 0
    assert spoken(capsys.readouterr().out) == [10, 15, 20, 30, 40, 45, 50, 60]
