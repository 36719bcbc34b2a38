"""The README's commands exist, its Python runs, its links lead somewhere, and its example of a data set works."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from gengrad.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0] for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = ["train.steps=40", "network.width=16", "evaluate.n=200", "evaluate.draws=1"]
    ran = []
    for command in COMMANDS:
        words = shlex.split(command)
        if not words or words[0] not in ("python", "gengrad"):
            continue
        arguments = [Path(words[1]).stem, *words[2:]] if words[0] == "python" else words[1:]
        if arguments[0] == "train":
            arguments += small
        if arguments[0] == "sample" and "--n" in arguments:  # as the README has it, with fewer points
            arguments[arguments.index("--n") + 1] = "64"
        assert main(arguments) == 0, command
        ran.append(arguments[0])
    assert {"train", "sample", "evaluate"} <= set(ran)
    assert len(list((tmp_path / "runs").rglob("*.gif"))) == 1 and (tmp_path / "samples.npy").exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_a_make_target_of_the_readme_exists(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_python_of_the_readme_runs(trained):
    code = PYTHON[0].replace('"quickstart/8gaussians"', repr(str(trained)))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].converged and names["path"].shape == (11, 1000, 2) and names["samples"].shape == (64, 2)
    assert len([line for line in PYTHON[0].splitlines() if line.strip() and not line.startswith("import")]) <= 10


def test_the_example_data_set_of_the_readme_can_be_trained_on(small, tmp_path):
    from gengrad.registry import DATASETS

    exec(compile(PYTHON[1], "README.md", "exec"), {})
    try:
        assert main(["train", str(small("ring", data={"name": "ring", "radius": 2.0}, train__steps=2))]) == 0
    finally:
        del DATASETS._classes["ring"]


def test_the_example_energy_of_the_readme_is_the_integral_it_names():
    from gengrad.functionals.base import Density
    from gengrad.registry import FUNCTIONALS

    exec(compile(PYTHON[2], "README.md", "exec"), {})
    try:
        energy = FUNCTIONALS.build({"name": "crowding"})
        x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
        log_density = -x.square() / 2 - 0.5 * math.log(2 * math.pi)
        rows = torch.multinomial(log_density.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))
        integral = float(torch.trapezoid((2 * log_density).exp() * log_density, x))
        # 200,000 draws of a standard deviation of 0.1
        assert float(energy.value(x[rows, None], Density(log_density[rows]))) == pytest.approx(integral, abs=1e-3)
    finally:
        del FUNCTIONALS._classes["crowding"]


def test_every_link_of_the_readme_leads_to_a_file():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
