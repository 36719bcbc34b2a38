"""What benchmarks/images.py trains and judges: the methods on one UNet, and the distance of their samples."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

import gengrad
from gengrad.config import RunConfig, read_config
from gengrad.data.base import FiniteData
from gengrad.data.draws import generator_for
from gengrad.data.images import as_bytes
from gengrad.evaluation.features import ClassifierFeatures
from gengrad.evaluation.fid import Statistics, frechet_distance, reference_statistics
from gengrad.evaluation.shards import Shards
from gengrad.training.tracking import read_metrics

ROOT = Path(__file__).parents[1]
PLANS = {  # those of the shipped NSGF++
    "pool": "geodesic",
    "target": "match",
    "epsilon_rel": 0.01,
    "tol": 0.1,
    "ot_batch": 2048,
    "uses": 2,
    "ot_dims": 10,
}
METHODS = {
    "nsgf_pp": {"shared_network": False},
    "nsgf_pp_shared": {"shared_network": True},
    "flow_matching": {"name": "flow_matching", "coupling": "independent"},
    "ot_flow_matching": {"name": "flow_matching", "coupling": "minibatch_ot"},
    # not by default: straight lines between the pairs of these plans all the way, which is what they are worth alone
    "nsgf": {"name": "nsgf", **PLANS},
    # not by default either: the flow of an MMD, learned from particles
    "mmd": yaml.safe_load((ROOT / "configs" / "riesz" / "mnist_mmd.yaml").read_text())["method"],
}
TITLES = {
    "nsgf_pp": "NSGF++, two networks",
    "nsgf_pp_shared": "NSGF++, shared network",
    "flow_matching": "flow matching",
    "ot_flow_matching": "OT flow matching",
    "nsgf": "OT flow matching with the plans of NSGF++",
    "mmd": "MMD flow, distilled",
}
DEFAULT = ("nsgf_pp", "nsgf_pp_shared", "flow_matching", "ot_flow_matching")


def config_of(method: str, given: argparse.Namespace) -> RunConfig:
    """The shipped NSGF++ config with the method in its place: network, images and training are the same."""
    name = "digits" if given.quick else "mnist"
    raw = yaml.safe_load((ROOT / "configs" / "images" / f"{name}_nsgf_pp.yaml").read_text())
    change = METHODS[method]
    raw["method"] = change if "name" in change else raw["method"] | change
    raw["train"] |= {"steps": given.steps, "warmup": min(raw["train"]["warmup"], given.steps // 10)}
    raw["train"].pop("preview_every", None)  # its pictures come at the end
    if not given.quick:
        raw["data"]["root"] = given.data
    raw |= {"out": str(given.runs / f"{name}-{method}-{given.steps}"), "device": given.device}
    return read_config(raw)


def config_on(classes: range, steps: int, start: str | None, given: argparse.Namespace) -> RunConfig:
    """NSGF++ with a shared network on some classes, from the weights of the run ``start`` or from nothing."""
    raw = config_of("nsgf_pp_shared", given).resolved()
    raw["data"]["classes"] = list(classes)
    raw["train"] |= {"steps": steps, "warmup": steps // 10, "checkpoint_every": steps}
    out = given.runs / f"classes-{classes[0]}-{classes[-1]}-{'started' if start else 'fresh'}-{steps}"
    return read_config(raw | {"out": str(out), "init_from": start})


def train(config: RunConfig) -> dict:
    """Trains the run, or goes on with it; CPU-seconds of its steps, of them on transport problems, and images seen."""
    outcome = gengrad.train(config, quiet=True)
    if not outcome.finished:
        raise SystemExit("interrupted; the same command goes on")
    rows = read_metrics(config.general.out)
    return {
        **{key: sum(row.get(key, 0.0) for row in rows) for key in ("cpu_seconds", "ot_seconds")},
        "images": config.train.steps * config.train.batch_size,
        "config": config.digest(),
    }


def judge(config: RunConfig, target: FiniteData, nfe: int, seed: int, n: int) -> dict:
    """FD-classifier of ``n`` samples at one NFE and seed against the test images; shards go on where they were."""
    flow, extract = gengrad.load(config.general.out), ClassifierFeatures(target)
    truth = reference_statistics(as_bytes(target.held_out), extract)
    shards = Shards(flow, Path(config.general.out) / "samples" / f"{nfe}-{seed}-{n}", n, nfe=nfe, seed=seed)
    shards.draw()
    shards.extract(extract)
    found = {"FD-classifier": frechet_distance(Statistics.of(shards.features(extract)), truth), **shards.bill, "n": n}
    shards.remove()
    return found


def floor_of(target: FiniteData, n: int) -> float:
    """FD-classifier of ``n`` training images against the test images."""
    extract = ClassifierFeatures(target)
    rows = torch.randperm(len(target.points), generator=generator_for(0, "image floor"))[:n].sort().values
    some = reference_statistics(as_bytes(target.points[rows]), extract)
    return frechet_distance(some, reference_statistics(as_bytes(target.held_out), extract))


def scores_at(cells: dict, nfe: int) -> list[float]:
    return [cell["FD-classifier"] for key, cell in cells["cells"].items() if key.split("/")[0] == str(nfe)]
