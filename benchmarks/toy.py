"""NSGF against flow matching and OT flow matching on five two-dimensional transports.

    python benchmarks/toy.py [--quick] [--methods nsgf,flow_matching,ot_flow_matching] [--seeds 5] [--out FILE]

Same network (MLP 3 x 64, SELU), same number of updates, same optimiser, the same evaluation draws for all methods.
Quality after 5, 10 and 100 Euler steps: SW2^2 (128 directions, 100,000 points a side) and exact W2 (4,096 points),
beside the floor (data against data). CPU-seconds are of the training with its checkpoints, on one thread. Cells that
the JSON holds are not computed again, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path

import torch
import yaml

import gengrad
from gengrad.config import RunConfig, read_config
from gengrad.evaluation.transport import Reference, evaluate_transport
from gengrad.files import write_json
from gengrad.registry import DATASETS

CONFIGS = Path(__file__).parents[1] / "configs" / "toy"
# name -> (source, data); the NSGF config of each is configs/toy/NAME_nsgf.yaml
TRANSPORTS = {
    "8gaussians": ("normal", "8gaussians"),
    "moons_to_8gaussians": ("moons", "8gaussians"),
    "checkerboard": ("normal", "checkerboard"),
    "swissroll": ("normal", "swissroll"),
    "two_spirals": ("normal", "two_spirals"),
}
METHODS = {
    "nsgf": None,  # from the shipped config of the transport
    "flow_matching": {"name": "flow_matching", "coupling": "independent"},
    "ot_flow_matching": {"name": "flow_matching", "coupling": "minibatch_ot"},
    # not run by default: the flow as the paper has it (debiased mean targets, the plan solved anew at each of 5 steps);
    # the baseline with the training times of NSGF's config, which says how much they explain
    "nsgf_faithful": yaml.safe_load((CONFIGS / "8gaussians_nsgf_faithful.yaml").read_text())["method"],
    "ot_flow_matching_same_times": {"name": "flow_matching", "coupling": "minibatch_ot"},
}
DEFAULT = ("nsgf", "flow_matching", "ot_flow_matching")
NFES = (5, 10, 100)
METRICS = ("sw2_squared", "w2")
PAIR = ("nsgf", "ot_flow_matching")  # compared seed by seed


def config_of(transport: str, method: str, seed: int, steps: int) -> RunConfig:
    """The shipped NSGF config, or the baseline's method in its place: network and training are the same."""
    raw = yaml.safe_load((CONFIGS / f"{transport}_nsgf.yaml").read_text())
    if METHODS[method] is not None:
        times = {"time_exponent": raw["method"]["time_exponent"]} if method.endswith("same_times") else {}
        raw["method"] = METHODS[method] | times
    raw |= {"seed": seed, "device": "cpu"}
    raw["train"] |= {"steps": steps, "checkpoint_every": steps, "log_every": steps}
    return read_config(raw)


def cell(config: RunConfig, reference: Reference) -> dict:
    """Trains one flow and measures it: {"cpu_seconds", "wall_seconds", "sw2_squared": {nfe: .}, "w2": {nfe: .}}."""
    with tempfile.TemporaryDirectory() as folder:
        run = read_config({**config.resolved(), "out": folder})
        outcome = gengrad.train(run, quiet=True)
        found: dict = {"cpu_seconds": outcome.cpu_seconds, "wall_seconds": outcome.seconds}
        found["config"] = config.digest()
        flow = gengrad.load(folder)
    found |= {metric: {} for metric in METRICS}
    for nfe in NFES:
        result = evaluate_transport(
            lambda n, draw_seed, nfe=nfe: flow.sample(n, nfe=nfe, seed=draw_seed), reference.target, reference=reference
        )
        for metric in METRICS:
            found[metric][str(nfe)] = result[metric]["mean"]
    return found


def table(results: dict) -> str:
    """Markdown: one row per transport and method, mean over seeds; then the paired comparison at 10 steps."""
    head = "| transport | method | SW2^2 x 1e3 at 5 / 10 / 100 | W2 at 5 / 10 / 100 | CPU-s | seeds |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for transport in TRANSPORTS:
        base = results["floors"].get(transport)
        for method in METHODS:
            cells = seeds_of(results, transport, method)
            if not cells:
                continue
            sw2 = " / ".join(spread([1e3 * c["sw2_squared"][str(k)] for c in cells], 2) for k in NFES)
            w2 = " / ".join(f"{statistics.mean(c['w2'][str(k)] for c in cells):.3f}" for k in NFES)
            cpu = statistics.mean(c["cpu_seconds"] for c in cells)
            lines.append(f"| {transport} | {method} | {sw2} | {w2} | {cpu:.0f} | {len(cells)} |")
        if base:
            lines.append(f"| {transport} | floor | {1e3 * base['sw2_squared']:.2f} | {base['w2']:.3f} | | |")
    return "\n".join([*lines, "", *comparison(results)])


def comparison(results: dict) -> list[str]:
    """NSGF minus OT flow matching at 10 steps, paired over seeds, with the standard error of the mean difference."""
    head = "| transport | SW2^2 x 1e3: NSGF - OT-FM | W2: NSGF - OT-FM | CPU ratio | verdict |"
    lines = [head, "| --- " * 5 + "|"]
    for transport in TRANSPORTS:
        seeds = [s for s in range(99) if all(f"{transport}/{m}/{s}" in results["cells"] for m in PAIR)]
        ours, theirs = ([results["cells"][f"{transport}/{m}/{s}"] for s in seeds] for m in PAIR)
        if len(seeds) < 2:
            continue
        sw2, w2 = ([a[key]["10"] - b[key]["10"] for a, b in zip(ours, theirs)] for key in ("sw2_squared", "w2"))
        (mean, error), (mean_w2, error_w2) = mean_and_error(sw2), mean_and_error(w2)
        verdict = "better" if mean < -2 * error else "worse" if mean > 2 * error else "equal within two errors"
        ratio = statistics.mean(a["cpu_seconds"] for a in ours) / statistics.mean(b["cpu_seconds"] for b in theirs)
        lines.append(
            f"| {transport} | {1e3 * mean:+.2f} +- {1e3 * error:.2f} | {mean_w2:+.4f} +- {error_w2:.4f} "
            f"| {ratio:.2f} | {verdict} |"
        )
    return lines


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def spread(values: list[float], digits: int) -> str:
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def seeds_of(results: dict, transport: str, method: str) -> list[dict]:
    found = [(key, value) for key, value in results["cells"].items() if key.startswith(f"{transport}/{method}/")]
    return [value for _, value in sorted(found)]


def warm_up() -> None:
    """Imports and compiles what a first run would, so that no cell pays for it."""
    for method in METHODS:
        config = config_of("8gaussians", method, 0, 3)
        with tempfile.TemporaryDirectory() as folder:
            gengrad.train(read_config({**config.resolved(), "out": folder}), quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(DEFAULT), help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--transports", default=",".join(TRANSPORTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="500 updates, 1 seed: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "toy.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    points, exact = 100_000, 4096
    if given.quick:
        given.steps, given.seeds, points, exact = 500, 1, 5_000, 512
        given.out = Path(tempfile.mkdtemp()) / "toy_quick.json"
    results = json.loads(given.out.read_text()) if given.out.exists() else {"cells": {}, "floors": {}}
    results["machine"] = f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}"
    results["date"], results["steps"] = date.today().isoformat(), given.steps
    given.out.parent.mkdir(parents=True, exist_ok=True)
    warm_up()
    for seed in range(given.seeds):
        for transport in given.transports.split(","):
            target = DATASETS.build({"name": TRANSPORTS[transport][1]})
            reference = Reference(target, n=exact, draws=1, sliced_n=points)
            if transport not in results["floors"]:
                results["floors"][transport] = {metric: reference.floor[metric][0] for metric in METRICS}
            for method in given.methods.split(","):
                key = f"{transport}/{method}/{seed}"
                config = config_of(transport, method, seed, given.steps)
                # a cell of another config or number of updates is measured again
                if results["cells"].get(key, {}).get("config") != config.digest():
                    results["cells"][key] = cell(config, reference)
                    # another process may be at work on other methods: what it wrote stays
                    if given.out.exists():
                        results["cells"] = {**json.loads(given.out.read_text())["cells"], **results["cells"]}
                    write_json(given.out, results)
                    print(key, results["cells"][key], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
