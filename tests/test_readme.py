"""The README's commands exist, its Python runs, its links lead somewhere, and its example of a data set works."""

import math
import re
import shlex
import subprocess
import sys
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


def test_make_lint_checks_the_format_and_every_marked_test_has_a_command():
    def steps(target: str) -> str:
        return subprocess.run(
            ["make", "--no-print-directory", "-n", target], cwd=ROOT, capture_output=True, text=True
        ).stdout

    for target in ("lint", "test"):
        assert "ruff check ." in steps(target) and "ruff format --check ." in steps(target)
    assert '-m "not slow"' in steps("test") and steps("test-slow").rstrip().endswith("-m slow")


def test_the_python_of_the_readme_runs(trained):
    code = PYTHON[0].replace('"quickstart/8gaussians"', repr(str(trained)))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].converged and names["path"].shape == (11, 1000, 2) and names["samples"].shape == (64, 2)
    assert len([line for line in PYTHON[0].splitlines() if line.strip() and not line.startswith("import")]) <= 10


@pytest.fixture
def added(tmp_path):
    """A function that puts an example of the README into its file and imports its folder as gengrad does."""
    import importlib

    from gengrad.registry import import_all

    undo = []

    def add(code: str, table) -> None:
        file = Path(re.match(r"# (gengrad/\w+/\w+\.py)\n", code)[1])
        name = ".".join(file.parent.parts)
        (tmp_path / file.name).write_text(code)
        package, known = importlib.import_module(name), set(table)
        package.__path__.append(str(tmp_path))
        undo.append((package, f"{name}.{file.stem}", table, known))
        import_all(package.__name__, package.__path__)
        assert len(set(table) - known) == 1

    yield add
    for package, module, table, known in undo:
        package.__path__.remove(str(tmp_path))
        sys.modules.pop(module)
        for name in set(table) - known:
            del table._classes[name]


@pytest.mark.parametrize("code", PYTHON[1:], ids=lambda code: code.splitlines()[0])
def test_an_example_file_of_the_readme_passes_the_linter_as_it_stands(code):
    name = code.splitlines()[0].removeprefix("# ")
    for command in (["check"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(ROOT / name), "-"]
        result = subprocess.run(words, input=code, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("room", ["data", "functionals", "methods", "networks"])
def test_a_folder_imports_every_file_in_it(room):
    """What the example's one file is enough for: no list of names is kept."""
    source = (ROOT / "gengrad" / room / "__init__.py").read_text(encoding="utf-8")
    assert "\nimport_all(__name__, __path__)" in source


def test_the_example_data_set_of_the_readme_can_be_trained_on(small, added):
    from gengrad.registry import DATASETS

    added(PYTHON[1], DATASETS)
    assert main(["train", str(small("ring", data={"name": "ring", "radius": 2.0}, train__steps=2))]) == 0


def test_the_example_method_of_the_readme_trains_and_samples(small, added, tmp_path):
    import gengrad
    from gengrad.registry import METHODS

    added(PYTHON[3], METHODS)
    path = small("own", method={"name": "trigonometric"}, train__steps=400, train__lr=1e-2, network__width=32)
    assert main(["train", str(path)]) == 0
    x = gengrad.load(tmp_path / "own").sample(2000, nfe=20, seed=0)
    # the 8 Gaussians lie on a circle of radius 5, the noise it starts from at 1.25 on average
    assert x.norm(dim=1).mean() > 3 and x.mean(0).norm() < 1.5


def test_the_objective_of_the_example_method_is_the_mean_square_of_its_velocity(added):
    from gengrad.data.draws import generator_for
    from gengrad.methods import Part, Problem
    from gengrad.registry import DATASETS, METHODS

    added(PYTHON[3], METHODS)
    source = target = DATASETS.build({"name": "normal"}, event_shape=(2,))

    class Still(torch.nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    problem = Problem(source, target, Still, seed=0, steps=1, batch_size=50_000, device=torch.device("cpu"))
    stage = next(iter(METHODS.build({"name": "trigonometric"}).stages(problem, None)))
    loss, _ = stage.objective(stage.networks, Part(0, 50_000), generator_for(0, "test"))
    # between two independent standard normals v_t = pi/2 times a standard normal, at every t; 100,000 numbers
    assert float(loss) == pytest.approx((math.pi / 2) ** 2, rel=0.03)


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
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("http") or (ROOT / target).exists(), target
