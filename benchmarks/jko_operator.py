"""The learned JKO operator against closed forms of the implicit step, a solver on the line, and the per-step solver.

    python benchmarks/jko_operator.py [--quick] [--parts accuracy,correction,weights,ablation,clouds,scores,speed,warm]
                                  [--only TEXT] [--seeds 1] [--steps N] [--runs FOLDER] [--out FILE.json]

One cell is one (part, case, seed); the JSON is written after each, and cells that it holds are not computed again.
Trained operators are kept in --runs and used by the parts after. --steps: optimiser steps instead of the configs' own
(recorded in each cell).

accuracy: trains an operator, rolls it out to the horizon and to twice it. ``gap``: F of the operator minus F of exact
implicit steps as a share of what these have fallen since the start, the largest of all steps; ``share``: root of
E|X - X_ref|^2 over the same points, at least W2, as a share of the way since the start, the largest of all steps. From
the run's Gaussian or profile, and from 32 held-out measures of the training families (16 for energies of particles), of
mixtures with twice as many components at the reach and sizes of the first family, from independent points of the
training families (1,024 of them, 512 for energies of particles), whose own implicit step differs from that of their law
by the noise of the cloud, and in the plane from products, mixtures with independent coordinates, even and independent
points of these; steps of energies with a density are corrected by log densities, and networks that take these are told
them, but for ``points_alone``: independent points, in the plane of products, of which no log density is given, and
whose steps nothing corrects. References
(``evaluation/references.py``): on the line all of them, for energies of particles the step of the very cloud, in the
plane Gaussians, profiles and products. ``fell``: share of all these rollouts in which the energy fell in every step.
correction: shares and gaps of 8 held-out rollouts of each kind with corrections of several degrees, 0 for none, and
CPU-seconds of one step of 1,024 points.
weights: held-out measures for the operator of a range of diffusions, at both ends of the range and at its own weight.
ablation: the same measures for operators trained without one part of the method at equal updates, their steps as the
networks make them, without correction; ``along``: the mean share and the mean gap over 32 held-out measures, step by
step up to twice the horizon.
speed: seconds of one step for a cloud of 1,024 points, alone, in batches of 16, and corrected by their log densities,
beside the per-step solver (jko_icnn) trained until it passes the operator's error, by the points alone and corrected
(the first of SOLVER_STEPS; the last where none does).
clouds: what a network learns of exact steps of measures in the plane that come as clouds made in four ways, without and
with log densities (jko_operator_clouds.py).
scores: how far off the scores of mixtures are, by kernel estimates of clouds of 1,024 points and by fits of log rho.
warm: the residual of the per-step solver after so many optimiser steps, started from the operator and not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cells import fill
from jko_operator_cells import ABLATED, ABLATIONS, CASES, SEVERAL, config_of, trained
from jko_operator_clouds import KINDS, clouds, scores

import gengrad
from gengrad.config import read_config
from gengrad.data.draws import draw
from gengrad.evaluation.operators import judge_held_out, judge_source
from gengrad.flows.implicit_steps import on_the_line
from gengrad.flows.operator import operator_of
from gengrad.flows.operator_transport import OperatorTransport
from gengrad.functionals.expression import has_pairs
from gengrad.rollouts import independent_coordinates, more_components

ROLLOUTS = 32
DEGREES = {"heat_1": (0, 3, 5, 7), "fokker_planck_2": (0, 3, 5)}  # in the plane 1,024 points allow no more
SOLVER_STEPS = (50, 100, 200, 300, 400, 500, 600, 800, 1200)
SOURCE = {"name": "gaussian_mixture", "means": [[-1.0], [1.0]], "scales": [0.5, 0.4]}  # of the parts speed and warm


def worst(rows: list[dict]) -> dict:
    """The largest gap and share of the rows, and the last, where there is a reference."""
    if "gap" not in rows[0]:
        return {}
    return {
        "gap": max(abs(row["gap"]) for row in rows), "share": max(row["share"] for row in rows),
        "end_gap": abs(rows[-1]["gap"]), "end_share": rows[-1]["share"],
    }  # fmt: skip


def accuracy(case: str, seed: int, given: argparse.Namespace) -> dict:
    raw = config_of(case, seed, given.steps)
    flow, cpu = trained(raw, given.runs / f"{case}_{seed}")
    config = flow.info["config"]
    horizon = config["method"]["jko_steps"]
    found = {"cpu_seconds": cpu, "train_steps": config["train"]["steps"]}
    pairs = has_pairs(operator_of(flow).functional())  # every particle meets every other, in every iteration of a step
    n, few = (512, 512) if pairs else (2048, 1024)
    count = 2 if given.quick else ROLLOUTS // 2 if pairs else ROLLOUTS
    rows = judge_source(flow, 2 * horizon, n=n, seed=seed + 1)[0]
    found |= {f"source_{key}": value for key, value in worst(rows[:horizon]).items()}
    found |= {f"source_twice_{key}": value for key, value in worst(rows).items() if not key.startswith("end")}
    found["source_fell"] = not any(row["rose"] for row in rows)
    initial = config["method"]["initial"]
    kinds = [("held_out", initial, {})]
    if not given.quick:
        kinds += [("more_components", more_components(config["method"]), {}), ("independent", initial, {"even": False})]
        if (products := independent_coordinates(flow)) is not None:
            kinds += [("products", products, {}), ("independent_products", products, {"even": False})]
        if operator_of(flow).functional().needs_density:
            kinds += [("points_alone", products or initial, {"even": False, "told": False})]
    for name, families, how in kinds:
        held = judge_held_out(flow, families, 2 * horizon, count=count, n=few, seed=seed + 1, **how)
        found |= {
            f"{name}_{key}": value
            for key, value in held.items()
            if key not in ("rollouts", "steps") and "along" not in key
        }
    return found


def correction(case: str, degree: int, seed: int, given: argparse.Namespace) -> dict:
    flow, _ = trained(config_of(case, seed, given.steps), given.runs / f"{case}_{seed}")
    method, found = flow.info["config"]["method"], {}
    operator_of(flow).correction = degree
    products = independent_coordinates(flow)
    kinds = [("held_out", method["initial"], True), ("independent", products or method["initial"], False)]
    kinds += [("products", products, True)] if products else []
    count, steps = 2 if given.quick else 8, 2 * method["jko_steps"]
    for name, families, even in kinds:
        held = judge_held_out(flow, families, steps, count=count, n=1024, seed=seed + 1, even=even)
        found |= {f"{name}_{key}": held[key] for key in ("gap", "share") if key in held}
        found |= {f"{name}_first_{key}": held[f"{key}_along"][0] for key in ("gap", "share") if key in held}
    x = draw(flow.source, 0, 1024, 1, "source")
    return found | {"seconds": seconds_of(flow.float(), x, flow.source, 2 if given.quick else 10)}


def several(seed: int, given: argparse.Namespace) -> dict:
    flow, cpu = trained(config_of(SEVERAL, seed, given.steps), given.runs / f"{SEVERAL}_{seed}")
    config, transport = flow.info["config"], operator_of(flow)
    found = {"cpu_seconds": cpu, "train_steps": config["train"]["steps"]}
    ((name, ends),) = transport.weights.items()
    for weight in (ends[0], *transport.told(), ends[1]):
        flow.transports[0] = transport.reweighted({name: weight})
        count, steps = 2 if given.quick else ROLLOUTS, 2 * config["method"]["jko_steps"]
        held = judge_held_out(flow, config["method"]["initial"], steps, count=count, n=1024, seed=seed + 1)
        found |= {f"{weight:g}_{key}": held[key] for key in ("gap", "worst_gap", "share", "worst_share", "fell")}
    return found


def ablation(variant: str, seed: int, given: argparse.Namespace) -> dict:
    raw = config_of(ABLATED, seed, given.steps, correction=0, **ABLATIONS[variant])
    flow, cpu = trained(raw, given.runs / f"ablation_{variant.replace(' ', '_')}_{seed}")
    method, found = flow.info["config"]["method"], {"cpu_seconds": cpu, "train_steps": raw["train"]["steps"]}
    count, steps = 2 if given.quick else ROLLOUTS, 2 * method["jko_steps"]
    held = judge_held_out(flow, method["initial"], steps, count=count, n=1024, seed=seed + 1)
    for k in (1, steps // 4, steps // 2, steps):
        found |= {f"share_{k}": held["share_along"][k - 1], f"gap_{k}": held["gap_along"][k - 1]}
    along = [[v if math.isfinite(v) else None for v in held[name]] for name in ("share_along", "gap_along")]
    finite = {key: value for key, value in found.items() if math.isfinite(value)}  # a map that folds has no energy
    return {**finite, "fell": held["fell"], "along": along}


def per_step(steps: int, method: dict, folder: str, **changes) -> tuple:
    """(flow of one step, CPU-seconds) of the per-step solver from the mixture."""
    raw = {
        "source": SOURCE, "data": {"name": "space", "dimension": 1},
        "network": {"name": "icnn", "width": 32, "depth": 2},
        "method": {"name": "jko_icnn", "functional": method["functional"], "tau": method["tau"], "jko_steps": 1,
                   "cloud": 8192, "tol": 0.0, **changes},
        "train": {"steps": steps, "batch_size": 512, "lr": 1e-2, "checkpoint_every": 10**6}, "evaluate": {"nfe": [1]},
        "out": folder, "device": "cpu",
    }  # fmt: skip
    outcome = gengrad.train(read_config(raw), quiet=True)
    return gengrad.load(folder), outcome.cpu_seconds


def error_of(law: gengrad.data.GaussianMixture, operator: OperatorTransport, move: Callable) -> float:
    """Root of E|X - X_ref|^2 after one step from the mixture, as a share of the way."""
    x = draw(law, 0, 4096, 1, "source").double()
    truth = on_the_line(operator.functional(), operator.tau, law.log_density, x, law.log_density(x))(1)[0]
    with torch.no_grad():
        return float(((move(x) - truth).square().mean() / (x - truth).square().mean()).sqrt())


def pushed(flow: gengrad.Flow) -> Callable:
    """The flow's one map in float64."""
    return flow.transports[0].double().push


def seconds_of(flow: gengrad.Flow, cloud: torch.Tensor, log_density: object, count: int) -> float:
    """CPU-seconds of a step, the median of so many."""
    times = []
    for _ in range(count):
        started = time.process_time()
        flow.step(cloud, log_density=log_density)
        times.append(time.process_time() - started)
    return statistics.median(times)


def speed(case: str, seed: int, given: argparse.Namespace) -> dict:
    flow, cpu = trained(config_of(case, seed, given.steps), given.runs / f"{case}_{seed}")
    method, operator, found = flow.info["config"]["method"], operator_of(flow), {"training_cpu": cpu}
    law = gengrad.data.GaussianMixture(**{key: value for key, value in SOURCE.items() if key != "name"})
    x, double = draw(law, 0, 1024, 1, "source"), flow.double()
    found["error"] = error_of(law, operator, lambda x: double.step(x).double())
    found["told_error"] = error_of(law, operator, lambda x: double.step(x, log_density=law).double())
    flow = flow.float()
    ways = (("seconds", x, None), ("batch_seconds", x.expand(16, -1, -1).contiguous(), None), ("told_seconds", x, law))
    for name, cloud, log_density in ways:
        seconds = seconds_of(flow, cloud, log_density, 5 if given.quick else 30)
        found[name] = seconds / (len(cloud) if cloud.dim() == 3 else 1)
    lengths = (4,) if given.quick else SOLVER_STEPS
    aims = {"solver": found["error"], "told_solver": found["told_error"]}
    for steps in lengths:
        with tempfile.TemporaryDirectory() as folder:
            solver, seconds = per_step(steps, method, folder)
        off = error_of(law, operator, pushed(solver))
        for name in [name for name, aim in aims.items() if off <= aim or steps == lengths[-1]]:
            found |= {f"{name}_steps": steps, f"{name}_cpu": seconds, f"{name}_error": off}
            del aims[name]
        if not aims:
            break
    return found | {
        "ratio": found["solver_cpu"] / found["seconds"],
        "told_ratio": found["told_solver_cpu"] / found["told_seconds"],
    }


def warm(case: str, seed: int, given: argparse.Namespace) -> dict:
    folder = given.runs / f"{case}_{seed}"
    start = trained(config_of(case, seed, given.steps), folder)[0]
    method, operator = start.info["config"]["method"], operator_of(start)
    found: dict = {"along": []}
    for steps in (2,) if given.quick else (1, 50, 200):
        for name, changes in (("cold", {}), ("warm", {"init_from_operator": str(folder)})):
            with tempfile.TemporaryDirectory() as scratch:
                flow, cpu = per_step(steps, method, scratch, **changes)
            residual = flow.transports[0].record["residual"]
            error = error_of(flow.source, operator, pushed(flow))
            found["along"].append([name, steps, residual, error, cpu])
            found |= {f"{name}_{steps}_residual": residual, f"{name}_{steps}_error": error, f"{name}_{steps}_cpu": cpu}
    return found


def cells(given: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    """Name -> what computes it, in the order in which they are worth having."""
    found: dict[str, Callable[[], dict]] = {}
    for seed in range(given.seeds):
        if "accuracy" in given.parts:
            for case in list(CASES)[:1] if given.quick else (c for c in CASES if c not in (SEVERAL, ABLATED)):
                found[f"accuracy/{case}/{seed}"] = lambda c=case, s=seed: accuracy(c, s, given)
        if "correction" in given.parts:
            for case, degrees in list(DEGREES.items())[:1] if given.quick else DEGREES.items():
                for degree in degrees:
                    found[f"correction/{case}, degree {degree}/{seed}"] = lambda c=case, k=degree, s=seed: correction(
                        c, k, s, given
                    )
        if "weights" in given.parts:
            found[f"weights/{SEVERAL}/{seed}"] = lambda s=seed: several(s, given)
        if "ablation" in given.parts:
            for variant in list(ABLATIONS)[:2] if given.quick else ABLATIONS:
                found[f"ablation/{variant}/{seed}"] = lambda v=variant, s=seed: ablation(v, s, given)
        if "clouds" in given.parts:
            for kind in KINDS:
                found[f"clouds/{kind}/{seed}"] = lambda k=kind, s=seed: clouds(k, s, given.quick)
        if "scores" in given.parts:
            for d in (1, 2, 3):
                found[f"scores/{d}/{seed}"] = lambda d=d, s=seed: scores(d, s, given.quick)
        if "speed" in given.parts:
            found[f"speed/heat_1/{seed}"] = lambda s=seed: speed("heat_1", s, given)
        if "warm" in given.parts:
            found[f"warm/heat_1/{seed}"] = lambda s=seed: warm("heat_1", s, given)
    return found


def table(results: dict) -> str:
    """Markdown, one table a part: a row for each cell, the columns that any of its cells has."""
    lines: list[str] = []
    for part in dict.fromkeys(key.split("/")[0] for key in results):
        rows = {key.partition("/")[2]: cell for key, cell in results.items() if key.startswith(part + "/")}
        columns = list(dict.fromkeys(c for cell in rows.values() for c in cell if c != "along"))
        lines += [f"| {part} | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
        lines += ["| --- " * (len(columns) + 1) + "|"]
        for case, cell in rows.items():
            lines.append(f"| {case} | " + " | ".join(f"{cell[c]:.3g}" if c in cell else "" for c in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="accuracy,correction,weights,ablation,clouds,scores,speed,warm")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps, instead of the configs' own")
    parser.add_argument("--runs", type=Path, default=Path("runs/operator_benchmark"))
    parser.add_argument("--quick", action="store_true", help="few steps, one seed: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "jko_operator.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick:
        given.seeds, given.steps = 1, 8
        given.runs = Path(tempfile.mkdtemp())
    print(table(fill(given.out, cells(given), given.only, keep=not given.quick)))


if __name__ == "__main__":
    main()
