"""Every shipped config runs, and its first line says what it does."""

from pathlib import Path

import numpy as np
import pytest

import gengrad
from gengrad.cli import main
from gengrad.config import RunConfig, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_config_says_what_it_does_and_trains_two_steps(path, tmp_path):
    assert path.read_text().startswith("# ")
    small = {"ot_batch": 32, "target_batch": 32, "pool": 32, "particles": 32, "cloud": 128, "jko_steps": 2}
    config = load_config(path)
    method = config.method
    small |= {"target_samples": 32} if config.data["name"] == "latents" else {}
    sizes = [f"method.{key}={value}" for key, value in small.items() if isinstance(method.get(key), int)]
    run = [f"out={tmp_path / 'run'}", "train.steps=2", "train.batch_size=16", "train.warmup=0", *sizes]
    run += small_images(config, tmp_path) + small_flow(config, tmp_path) + small_molecules(config)
    assert main(["train", str(path), *run]) == 0
    flow = gengrad.load(tmp_path / "run")
    assert flow.sample(2, nfe=max(4, len(flow.transports))).isfinite().all()


def small_flow(config: RunConfig, folder: Path) -> list[str]:
    """Overrides for flows of implicit steps: as many evaluations as steps, one observation, a table of forty rows."""
    run = ["evaluate.nfe=[4]"] if "jko_steps" in config.method else []
    if "observations" in config.method:
        run.append("method.observations=[[0.1,0.5]]")
    if config.data["name"] == "logistic_posterior":
        (folder / "table.csv").write_text("\n".join(f"{k % 7},{(3 * k) % 5},{k % 2}" for k in range(40)))
        run.append(f"data.path={folder / 'table.csv'}")
    return run


def small_images(config: RunConfig, folder: Path) -> list[str]:
    """Overrides that put a few random images in the place of data that would have to be downloaded."""
    shape = {"mnist": (28, 28), "fashion_mnist": (28, 28), "cifar10": (32, 32, 3)}.get(config.data["name"])
    if shape is None:
        return []
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60, *shape), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(60) % 10)
    data = ["name=image_array", f"path={folder / 'images.npz'}", "key=images", "labels=labels"]
    return [*(f"data.{setting}" for setting in data), "network.channels=8", "train.precision=no"]


def small_molecules(config: RunConfig) -> list[str]:
    """Overrides for runs on molecules: a few of the library, two steps of a small autoencoder, one of the surrogate."""
    if config.data["name"] != "latents":
        return []
    sizes = "{latent: 4, embedding: 4, channels: 4, width: 8, readout: 4}"
    small = {"library": 100, "at_least": "null", "at_most": "null", "autoencoder.steps": 2}
    small |= {"autoencoder.network": sizes, "surrogate.steps": 1, "surrogate.width": 4, "surrogate.explored": 8}
    return [*(f"data.{key}={value}" for key, value in small.items()), "source.at_most=null", "evaluate.n=8"]


def test_there_are_configs():
    assert len(CONFIGS) >= 6
