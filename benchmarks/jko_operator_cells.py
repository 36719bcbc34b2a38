"""The runs that benchmarks/jko_operator.py trains: configs of configs/operator, and changes of them."""

from __future__ import annotations

from pathlib import Path

import yaml

import gengrad
from gengrad.config import read_config

CONFIGS = Path(__file__).parents[1] / "configs" / "operator"
QUADRATIC = {"name": "potential", "potential": {"name": "quadratic"}}
WELLS = {"name": "potential", "potential": {"name": "double_well", "height": 0.5}}
ENTROPY = {"name": "entropy"}
PLANE = {"name": "space", "dimension": 2}
BOUND, FREE = ({"translation_equivariant": free} for free in (False, True))
WIDER = ["gaussians", {"name": "mixtures", "reach": 1.0, "smallest": 0.4}, {"name": "mixtures", "smallest": 0.3}]
# case -> (config, changes of its sections)
CASES: dict[str, tuple[str, dict]] = {
    "heat_1": ("heat", {}),
    "fokker_planck_1": ("double_well", {"method": {"functional": [QUADRATIC, ENTROPY], "initial": WIDER}}),
    "double_well_1": ("double_well", {}),
    "fokker_planck_2": ("fokker_planck", {}),
    "double_well_2": (
        "fokker_planck",
        {"method": {"functional": [WELLS, {**ENTROPY, "weight": 0.5}]}},
    ),
    "heat_2": ("fokker_planck", {"network": FREE, "method": {"functional": "entropy"}, "train": {"steps": 2000}}),
    "porous_medium_1": ("porous_medium", {}),
    "porous_medium_2": ("porous_medium", {"source": {"dimension": 2}, "data": PLANE}),
    "aggregation_1": ("aggregation", {}),
    "aggregation_2": (
        "aggregation",
        # as many particles of the loss as of the clouds that are judged: fewer have another energy, W is singular
        {
            "source": {"name": "ball", "dimension": 2},
            "data": PLANE,
            "method": {"particles": 512},
        },
    ),
    "attraction_repulsion_2": ("attraction_repulsion", {}),
    "sinkhorn_2": ("sinkhorn", {}),
}
SEVERAL = "diffusions_1"  # for a range of weights of its energy
CASES[SEVERAL] = ("diffusions", {})
ABLATED = "double_well_by_points_1"  # of which parts of the training are left out
CASES[ABLATED] = ("heat", {"network": BOUND, "method": {"functional": [WELLS, {**ENTROPY, "weight": 0.5}]}})
ABLATIONS: dict[str, dict] = {
    "full": {},
    "initial densities only": {"rollout": False},
    "without average": {"average": False},
    "without fresh": {"fresh": 0.0},
    "without curriculum": {"curriculum": 0.0},
}


def config_of(case: str, seed: int, steps: int | None = None, **method) -> dict:
    """The raw config of a case; ``steps`` of training instead of its own, other settings of the ``method``."""
    name, changes = CASES[case]
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | {"seed": seed, "device": "cpu"}
    for section, values in changes.items():
        raw[section] = {**raw[section], **values}
    raw["method"] |= method
    if steps:
        raw["train"] |= {"steps": steps, "warmup": min(100, steps // 4), "checkpoint_every": steps}
    return raw


def trained(raw: dict, folder: Path) -> tuple:
    """(flow, CPU-seconds of its training), from ``folder`` where it has been trained before."""
    told = folder / "cpu_seconds.txt"
    if not told.exists():
        outcome = gengrad.train(read_config({**raw, "out": str(folder)}), quiet=True)
        if not outcome.finished:  # a signal: it goes on next time, and is not judged before
            raise SystemExit(128 + outcome.signal)
        told.write_text(str(outcome.cpu_seconds))
    return gengrad.load(folder), float(told.read_text())
