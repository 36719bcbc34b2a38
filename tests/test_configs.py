"""Every shipped config runs, and its first line says what it does."""

from pathlib import Path

import pytest

import gengrad
from gengrad.cli import main
from gengrad.config import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_config_says_what_it_does_and_trains_two_steps(path, tmp_path):
    assert path.read_text().startswith("# ")
    keys = ("ot_batch", "target_batch", "pool", "particles")
    sizes = [f"method.{key}=32" for key in keys if isinstance(load_config(path).method.get(key), int)]
    run = [f"out={tmp_path / 'run'}", "train.steps=2", "train.batch_size=16", "train.warmup=0", *sizes]
    assert main(["train", str(path), *run]) == 0
    flow = gengrad.load(tmp_path / "run")
    assert flow.sample(2, nfe=max(4, len(flow.transports))).isfinite().all()


def test_there_are_configs():
    assert len(CONFIGS) >= 6
