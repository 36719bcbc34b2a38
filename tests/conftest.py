"""What several test files share: a config small enough to train in a second, and a trained run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# a busy machine must not turn a property red
settings.register_profile("gengrad", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gengrad")

ROOT = Path(__file__).parents[1]
SMALL = {
    "data": {"name": "8gaussians"},
    "network": {"name": "mlp", "width": 16, "depth": 2},
    "method": {"name": "nsgf", "ot_batch": 64, "flow_steps": 2},
    "train": {"steps": 20, "batch_size": 32, "checkpoint_every": 10, "log_every": 5},
    "evaluate": {"nfe": [5], "n": 64, "draws": 2},
}


LONG = ("test_resume", "test_processes", "test_shards", "test_readme", "test_image_benchmarks", "test_kills")


def pytest_collection_modifyitems(items):
    """Long tests first: two workers then end together, instead of one waiting for the other's last half minute."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def small(tmp_path):
    """A function that writes the small config, changed as asked (dotted keys), and returns its path."""
    import yaml

    def write(name: str = "run", **changes) -> Path:
        raw = {key: dict(value) for key, value in SMALL.items()}
        raw["out"] = str(tmp_path / name)
        for key, value in changes.items():
            place, parts = raw, key.split("__")
            for part in parts[:-1]:
                place = place.setdefault(part, {})
            place[parts[-1]] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished small run; tests must not change it."""
    import yaml

    from gengrad.cli import main

    folder = tmp_path_factory.mktemp("trained")
    raw = {**SMALL, "out": str(folder / "run")}
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def phased(tmp_path_factory):
    """The folder of a run of NSGF++ on the digits, without classes and hardly trained; tests must not change it."""
    import yaml

    from gengrad.cli import main

    folder = tmp_path_factory.mktemp("phased")
    raw = {
        "out": str(folder / "run"),
        "data": {"name": "digits"},
        "network": {"name": "unet", "channels": 4, "multipliers": [1], "attention": False},
        "method": {"name": "nsgf_pp", "ot_batch": 64},
        "train": {"steps": 9, "batch_size": 32},
        "evaluate": {"nfe": [2, 3], "n": 90, "draws": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder / "run"
