"""The house's arrows: imports point one way, and a test fails when one runs back."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gengrad"

# room -> rooms that it may import from; everybody may use the leaves below
ALLOWED = {
    "registry": set(),
    "strict_yaml": {"registry"},
    "files": set(),
    "machine": set(),
    "kernel_moments": set(),
    "data": set(),
    "ot": set(),
    "networks": set(),
    "functionals": {"ot"},
    "molecules": {"data", "evaluation", "plotting"},
    "flows": {"functionals", "networks", "data", "ot"},
    "methods": {"data", "ot", "networks", "functionals", "flows"},
    "training": {"data", "flows", "methods"},
    "evaluation": {"data", "ot", "flows"},
    "plotting": set(),
    "latent": {"data", "functionals", "molecules", "flows", "training"},  # the bridge; the chain over it is chain.py
}
LEAVES = {"registry", "files", "strict_yaml", "machine", "kernel_moments"}


def imported(path: Path) -> set[str]:
    """Full names of the gengrad modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        # a relative import may reach its own room only
        assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"{path}: relative import out of its room"
    return {name for name in found if name.startswith("gengrad.")}


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_from_the_rooms_below_it(room):
    for path in files(room):
        rooms = {name.split(".")[1] for name in imported(path)} - {"__version__", room}
        assert rooms <= ALLOWED[room] | LEAVES, f"{path.name} reaches {rooms - ALLOWED[room] - LEAVES}"


def test_training_knows_no_concrete_method():
    for path in files("training"):
        reached = {name for name in imported(path) if name.startswith("gengrad.methods")}
        assert all(name.startswith("gengrad.methods.base.") for name in reached), f"{path.name}: {reached}"


def test_the_arrow_check_sees_an_import_that_runs_back(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from gengrad.cli import main\n    return main\n")
    assert imported(bad) == {"gengrad.cli.main"}


def test_importing_gengrad_does_no_work_and_sets_no_global():
    import subprocess
    import sys

    code = "import gengrad, sys; assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


def test_no_script_hides_a_module_of_the_standard_library():
    import sys

    scripts = [path.stem for folder in ("benchmarks", ".") for path in (PACKAGE.parent / folder).glob("*.py")]
    assert scripts and not set(scripts) & sys.stdlib_module_names  # a script's own folder comes first on its path
