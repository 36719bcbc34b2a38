"""NSGF++ against flow matching and OT flow matching on small images; what its first phase is; the UNet's throughput.

    python benchmarks/images.py [--quick] [--data ROOT] [--parts methods,phase1,coupling,speed,precision,transfer]
        [--methods nsgf_pp,flow_matching] [--seeds 3] [--steps 3000] [--runs FOLDER] [--out FILE]

methods: the same UNet, number of images seen and draws for all; Frechet distance of classifier features (FD-classifier,
which is no FID) on 10,000 samples against the 10,000 test images at each NFE, three sampling seeds, beside the floor
(training against test images). phase1: per epsilon and OT batch in pixel space, what the Sinkhorn plan looks like and
how far the re-solved flow strays from a straight line. coupling: how much a plan tells of the image, in pixels and in
principal components. precision: the loss in fp32 and in bf16. transfer: a short training on the classes 5 to 9 from the
weights of one on 0 to 4 (``init_from``), beside one from nothing. speed: images a second of a training step, beside
torchcfm's UNet and diffusers' where they are installed. ROOT holds MNIST as torchvision keeps it; --quick uses the
embedded 8x8 digits. Cells that the JSON holds are not computed again, and a run that was cut goes on from its
checkpoint; two processes with different --methods may share one JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch
import yaml
from images_methods import DEFAULT, METHODS, ROOT, TITLES, config_of, config_on, floor_of, judge, scores_at, train
from images_plans import explained, matched_cost, plan
from images_unets import images_per_second, peers

import gengrad
from gengrad import plotting
from gengrad.config import read_config
from gengrad.data.draws import generator_for
from gengrad.evaluation.report import format_table
from gengrad.files import write_json
from gengrad.ot import principal_components
from gengrad.registry import DATASETS
from gengrad.training.tracking import read_metrics

NFES = (1, 2, 5, 10, 20, 60)
EPSILONS = (0.002, 0.01, 0.05, 0.2)
BATCHES = (128, 512, 2048)
BATCHES_COUPLED = {128: 60, 1024: 8, 2048: 6}  # OT batch: how many
DIMS = (3, 5, 8, 12, 20)


# ------------------------------------------------------------------ methods


def order(given: argparse.Namespace) -> list[tuple[int, int]]:
    """(NFE, seed): few evaluations first, the many last, so that a benchmark cut short has the table's left part."""
    return [(nfe, seed) for nfe in sorted(NFES) for seed in range(given.seeds)]


def methods(results: dict, given: argparse.Namespace) -> None:
    target = DATASETS.build(config_of("flow_matching", given).data)
    for method in given.methods:
        config = config_of(method, given)
        cells = results["methods"].setdefault(method, {"cells": {}})
        if cells.get("config", config.digest()) != config.digest():
            cells = results["methods"][method] = {"cells": {}}  # measured under another config
        if "config" not in cells:
            cells |= train(config)
            save(results, given)
        if "floor" not in cells:
            cells["floor"] = floor_of(target, given.n)
    for nfe, seed in order(given):
        for method in given.methods:
            cells = results["methods"][method]["cells"]
            if f"{nfe}/{seed}" not in cells:
                cells[f"{nfe}/{seed}"] = judge(config_of(method, given), target, nfe, seed, given.n)
                save(results, given)
    ready = [method for method in METHODS if (Path(config_of(method, given).general.out) / "flow.json").exists()]
    flows = {TITLES[method]: gengrad.load(config_of(method, given).general.out) for method in ready}
    given.pictures.mkdir(parents=True, exist_ok=True)
    for nfe in (2, 5):
        grids = {title: flow.sample(36, nfe, seed=0) for title, flow in flows.items()}
        plotting.save(plotting.side_by_side(grids), given.pictures / f"images_nfe{nfe}{'_quick' * given.quick}.png")


def methods_table(results: dict) -> str:
    """Mean and standard deviation over sampling seeds; the number of seeds where there are fewer than the most."""
    most = max((len(scores_at(cells, nfe)) for cells in results["methods"].values() for nfe in NFES), default=0)
    rows = []
    for method, cells in results["methods"].items():
        row = {"FD-classifier": TITLES[method]}
        for nfe in NFES:
            scores = scores_at(cells, nfe)
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            seeds = f" ({len(scores)} of {most} seeds)" if len(scores) < most else ""
            row[f"NFE {nfe}"] = f"{statistics.mean(scores):.2f}{spread}{seeds}" if scores else ""
        row |= {"floor": f"{cells['floor']:.2f}", "images": f"{cells['images']:,}"}
        rows.append(row | {"CPU s": round(cells["cpu_seconds"]), "of them OT": round(cells["ot_seconds"])})
    return format_table(rows)


# ------------------------------------------------------------------ phase 1


def phase1(results: dict, given: argparse.Namespace) -> None:
    target = DATASETS.build(config_of("flow_matching", given).data)
    for n in BATCHES[: 2 if given.quick else None]:
        y = target.sample(n, generator_for(0, "phase1 target")).flatten(1)
        x = torch.randn(y.shape, generator=generator_for(0, "phase1 source"))
        cells = results["phase1"].setdefault(str(n), {})
        if "matched_cost" not in cells:
            cells["matched_cost"] = matched_cost(x, y)
        for epsilon in EPSILONS:
            if str(epsilon) not in cells:
                cells[str(epsilon)] = plan(x, y, epsilon)
                save(results, given)


def phase1_table(results: dict) -> str:
    rows = []
    for n, cells in results["phase1"].items():
        for epsilon in EPSILONS:
            if (cell := cells.get(str(epsilon))) is not None:
                names = {"OT batch": int(n), "epsilon_rel": epsilon, "matched cost": cells["matched_cost"]}
                rows.append({**names, **cell})
    return format_table(rows)


# ------------------------------------------------------------------ coupling


def coupling(results: dict, given: argparse.Namespace) -> None:
    points = DATASETS.build(config_of("flow_matching", given).data).points.flatten(1)
    points = points - points.mean(0)
    basis = principal_components(points[:4096], max(DIMS), generator_for(0, "coupling components"))
    for n, batches in BATCHES_COUPLED.items():
        for dims in (None, *DIMS):
            key = f"{n}/{dims or 'all'}"
            if key not in results["coupling"]:
                seen = None if dims is None else basis[:, :dims]
                results["coupling"][key] = explained(points, n, seen, 2 if given.quick else batches)
                save(results, given)


def coupling_table(results: dict) -> str:
    rows = []
    for n in BATCHES_COUPLED:
        cells = {dims: results["coupling"][f"{n}/{dims or 'all'}"] for dims in (None, *DIMS)}
        shares = {f"{dims} components" if dims else "all": f"{c['explained']:.2f}" for dims, c in cells.items()}
        rows.append({"OT batch": n, **shares, "s: all": cells[None]["seconds"], "s: 8": cells[8]["seconds"]})
    return format_table(rows)


# ------------------------------------------------------------------ speed


def speed(results: dict, given: argparse.Namespace) -> None:
    for shape in ((1, 28, 28), (3, 32, 32)):
        there = peers(shape[0], shape[1])
        networks = {name: network for name, network in there.items() if network is not None}
        for bf16 in (False, True):
            key = f"{shape[1]}x{shape[2]} {'bf16' if bf16 else 'fp32'}"
            if key not in results["speed"]:
                measured = images_per_second(networks, shape, bf16, 1 if given.quick else (3 if bf16 else 7))
                counts = {name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()}
                missing = [name for name, network in there.items() if network is None]
                measured = {"rates": measured, "parameters": counts, "missing": missing}
                results["speed"][key] = measured | {"threads": torch.get_num_threads()}
                save(results, given)


def speed_table(results: dict) -> str:
    rows = [
        {"images": key, **{name: round(rate, 1) for name, rate in cell["rates"].items()}, "threads": cell["threads"]}
        for key, cell in results["speed"].items()
    ]
    missing = {name for cell in results["speed"].values() for name in cell["missing"]}
    return format_table(rows) + (f"\nnot installed, so not measured: {', '.join(sorted(missing))}" if missing else "")


# ------------------------------------------------------------------ precision


def precision(results: dict, given: argparse.Namespace) -> None:
    """The same short training in fp32 and in bf16: the loss at each step, and images a second."""
    rows = []
    for name, value in (("fp32", "no"), ("bf16", "bf16")):
        config = config_of("flow_matching", given).resolved()
        config["train"] |= {"steps": given.short, "precision": value, "log_every": 1, "warmup": given.short // 10}
        config["train"]["checkpoint_every"] = given.short
        run = read_config(config | {"out": str(given.runs / f"precision-{name}-{given.short}")})
        if name not in results["precision"]:
            outcome = gengrad.train(run, quiet=True)
            losses = [row["loss"] for row in read_metrics(run.general.out)]
            rate = given.short * run.train.batch_size / outcome.cpu_seconds
            results["precision"][name] = {"losses": losses, "images a CPU-second": rate, "steps": given.short}
            save(results, given)
        losses = results["precision"][name]["losses"]
        rows += [{"stage": name, "step": k + 1, "loss": loss} for k, loss in enumerate(losses)]
    given.pictures.mkdir(parents=True, exist_ok=True)
    plotting.save(plotting.loss_curve(rows, overlay=True), given.pictures / f"images_bf16{'_quick' * given.quick}.png")


def precision_table(results: dict) -> str:
    rows = []
    for name, cell in results["precision"].items():
        last = cell["losses"][-max(1, len(cell["losses"]) // 5) :]
        rate = round(cell["images a CPU-second"])
        row = {"precision": name, "steps": cell["steps"], "images a CPU-second": rate}
        rows.append(row | {"mean loss of the last fifth": f"{statistics.mean(last):.4f}"})
    return format_table(rows)


# ------------------------------------------------------------------ transfer


def transfer(results: dict, given: argparse.Namespace) -> None:
    """FD-classifier at 5 evaluations on the classes 5 to 9: after ``--short`` steps from 0 to 4, and from nothing."""
    base = config_on(range(5), given.steps // 3, None, given)
    for name, start in (("from 0 to 4", base.general.out), ("from nothing", None)):
        if name not in results["transfer"]:
            if start:
                train(base)
            config = config_on(range(5, 10), given.short, start, given)
            train(config)
            found = judge(config, DATASETS.build(config.data), 5, 0, min(given.n, 4000))
            results["transfer"][name] = {"FD-classifier": found["FD-classifier"], "steps": given.short}
            save(results, given)


def transfer_table(results: dict) -> str:
    return format_table([{"weights": name, **cell} for name, cell in results["transfer"].items()])


# ------------------------------------------------------------------ main

PARTS = {
    "methods": (methods, methods_table),
    "phase1": (phase1, phase1_table),
    "coupling": (coupling, coupling_table),
    "speed": (speed, speed_table),
    "precision": (precision, precision_table),
    "transfer": (transfer, transfer_table),
}


def save(results: dict, given: argparse.Namespace) -> None:
    """Writes the JSON; what another process has written of other methods and parts meanwhile stays."""
    there = json.loads(given.out.read_text()) if given.out.exists() else {}
    for part in PARTS:
        if part not in given.parts:
            results |= {part: there[part]} if part in there else {}
        elif part == "methods":
            others = {m: cells for m, cells in there.get(part, {}).items() if m not in given.methods}
            results[part] = {**others, **{m: c for m, c in results.get(part, {}).items() if m in given.methods}}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, results)


def chosen(text: str, known: Iterable[str], what: str) -> list[str]:
    """The names of a comma-separated list; leaves the program where one is unknown."""
    names = text.split(",")
    if wrong := [name for name in names if name not in known]:
        raise SystemExit(f"--{what}: unknown {', '.join(map(repr, wrong))}; known: {', '.join(known)}")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8x8 digits and few samples: minutes")
    parser.add_argument("--data", default="data", help="folder with MNIST, as torchvision keeps it")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--methods", default=",".join(DEFAULT), help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds")
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the config's)")
    parser.add_argument("--short", type=int, default=200, help="steps of the trainings in fp32 and bf16")
    parser.add_argument("--n", type=int, default=None, help="samples per seed (10000; quick: 1497)")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_images"))
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)
    given.parts = chosen(given.parts, PARTS, "parts")
    given.methods = chosen(given.methods, METHODS, "methods")
    shipped = ROOT / "configs" / "images" / f"{'digits' if given.quick else 'mnist'}_nsgf_pp.yaml"
    given.steps = given.steps or yaml.safe_load(shipped.read_text())["train"]["steps"]
    given.n = given.n or (1497 if given.quick else 10_000)
    name = "images_quick.json" if given.quick else "images.json"
    given.out = given.out or ROOT / "benchmarks" / "results" / name
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results |= {"machine": machine, "date": str(date.today()), "gengrad": gengrad.__version__}
    for part in given.parts:
        measure, table = PARTS[part]
        results.setdefault(part, {})
        measure(results, given)
        save(results, given)
        print(f"\n{part}\n{table(results)}")


if __name__ == "__main__":
    main()
