"""Molecules per second, prepared and scored; baselines at equal scorer calls; an autoencoder after minutes; QED flows.

    python benchmarks/molecules.py [--parts prepare,score] [--data FILE] [--n 20000] [--processes 1,2] [--out FILE]
    python benchmarks/molecules.py --parts baselines [--calls 2000] [--seeds 0,1]
    python benchmarks/molecules.py --parts autoencoder,flow,walks,unseen [--minutes 10] [--properties qed logp]
        [--runs FOLDER] [--flows "qed_nsgf,qed_nsgf method.stop=0.5,..."] [--flow-seeds 0,1,2]

Baselines: random screening of the enumerated library and a genetic algorithm that starts with its first 100 molecules,
on QED (weight 1) and logP between 1 and 3 (weight 1), geometric mean.
The minutes of the autoencoder are CPU-minutes of this process, whatever else the machine does; the flows move molecules
of QED below 0.7 by the configs of that name, changed as said after it, on the codes of that autoencoder. Both keep
their folders under --runs, and go on there when interrupted. walks: gradient ascent and Langevin dynamics of the
surrogate from the same molecules, as far as each step of the flow went. unseen: the trained flow on 1,000 molecules of
a QED below 0.7 that are not among its data.

Without --data the enumerated library stands in, which is cleaner than a real set. Seconds are of the wall clock and
hold the start of the worker processes; CPU-seconds are of all processes. Parts that the JSON holds at
the same n, data and processes are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path

import rdkit
from latent_walks import KINDS, picture, unseen, walk

from gengrad.files import read_json, write_atomically, write_json
from gengrad.molecules.library import library
from gengrad.molecules.objective import read_objective
from gengrad.molecules.prepare import prepare
from gengrad.molecules.reading import Row, read_molecules
from gengrad.molecules.scoring import score
from gengrad.molecules.searching import run_baseline

WINDOW = {"name": "linear", "low": 0.0, "high": 10.0}
OBJECTIVE = {
    "components": [{"scorer": "qed"}, *({"scorer": name, "transform": WINDOW} for name in ("sa", "logp"))],
    "filters": [{"scorer": "alerts", "at_most": 0}],
}


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(part: str, rows: list[Row], processes: int) -> dict:
    """One cell: {"n", "wall_seconds", "cpu_seconds", "per_second", "per_cpu_second", and what came of it}."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    if part == "prepare":
        found = {"kept": len(prepare(rows, processes=processes).kept)}
    else:
        scores = score(read_objective(OBJECTIVE), [row.text for row in rows], processes)
        found = {
            "scored": scores.calls,
            "passed": int(scores.passed.sum()),
            "median_qed": scores.properties[:, 0].nanmedian().item(),
        }
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return {
        "n": len(rows),
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "per_second": len(rows) / wall,
        "per_cpu_second": len(rows) / cpu,
        **found,
    }


WISHED = {
    "components": [
        {"scorer": "qed"},
        {"scorer": "logp", "transform": {"name": "double_sigmoid", "low": 1.0, "high": 3.0}},
    ]
}
KEPT = ("moved", "true_median", "spare_mean", "uniqueness", "validity", "novelty", "internal_diversity", "off_manifold")
FIGURES = ("top_1", "top_10", "top_100", "auc_top_10", "diversity_top_100")


def baselines(report: dict, given) -> None:
    """Random screening and graph-ga at the same number of scorer calls, a cell for each method and seed."""
    header = ["method", "seed", "calls", *(name.replace("_", " ") for name in FIGURES), "seconds", "CPU-seconds"]
    print(f"| {' | '.join(header)} |", "| --- " * len(header) + "|", sep="\n")
    for method in ("random", "graph-ga"):
        for seed in map(int, given.seeds.split(",")):
            key = f"baseline/{method}/{given.calls}/{seed}"
            if key not in report:
                report[key] = measure_baseline(method, given.calls, seed)
                write_json(given.out, report)
            cell = report[key]
            figures = " | ".join(f"{cell[name]:.4f}" for name in FIGURES)
            times = f"{cell['wall_seconds']:.0f} | {cell['cpu_seconds']:.0f}"
            print(f"| {method} | {seed} | {cell['calls']:,} | {figures} | {times} |", flush=True)


def measure_baseline(method: str, calls: int, seed: int) -> dict:
    """One cell, on one process: the last row of steps.csv, and what it took, the start of the workers included."""
    with tempfile.TemporaryDirectory() as folder:
        objective = Path(folder) / "objective.yaml"
        objective.write_text(json.dumps(WISHED))  # which is YAML as well
        wall, cpu = time.perf_counter(), cpu_seconds()
        found = run_baseline(method, objective, calls, Path(folder) / "out", seed=seed)
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    where = {"load": os.getloadavg()[0], "machine": platform.machine(), "date": date.today().isoformat()}
    last = {name: found["last_step"][name] for name in ("calls", *FIGURES)}
    return {**last, "wall_seconds": wall, "cpu_seconds": cpu, **where, "rdkit": rdkit.__version__}


def train_autoencoder(smiles: list[str], given: argparse.Namespace, folder: Path, processes: int) -> dict:
    """Exact reconstruction and mean Tanimoto of 1,000 held-out molecules after CPU-minutes of training."""
    from gengrad.latent import training
    from gengrad.latent.settings import AutoencoderSettings

    settings = AutoencoderSettings(minutes=given.minutes, properties=given.properties)
    codec = training.train_autoencoder(smiles, folder, settings, processes=processes, clock=time.process_time)
    if isinstance(codec, int):
        raise SystemExit(128 + codec)
    report = codec.info["reconstruction"]
    return {"molecules": len(smiles), "cpu_seconds": codec.info["seconds"], "steps": codec.info["steps"], **report}


FRESH = 6000  # molecules of the library beyond the first n, of which the unseen ones are
STAGES = ("molecules", "latents", "surrogate")  # of a run, which another one on the same codes may take


def move(flow: str, seed: int, smiles: list[str], autoencoder: Path, folder: Path) -> dict:
    """Median QED, uniqueness, diversity and the rest along a flow, "CONFIG key=value ..."."""
    from gengrad import chain
    from gengrad.config import load_config

    name, *overrides = flow.split()
    file = folder.parent / "molecules.smi"
    write_atomically(file, "".join(f"{text} {i}\n" for i, text in enumerate(smiles, 1)).encode())
    config = Path(__file__).parents[1] / "configs" / "molecules" / f"{name}.yaml"
    place = [f"data.path={file}", f"data.autoencoder_from={autoencoder}", f"out={folder}"]
    seeds = [f"seed={seed}", f"evaluate.seed={seed}"]
    settings = load_config(config, ["evaluate.n=1000", *overrides, *place, *seeds])
    made_of = json.dumps([settings.data[key] for key in ("objective", "limit")], sort_keys=True)
    stages = folder.parent / f"stages_{hashlib.sha256(made_of.encode()).hexdigest()[:8]}_{autoencoder.name}"
    for stage in STAGES:
        if (stages / stage).is_dir() and not (folder / stage).exists():
            shutil.copytree(stages / stage, folder / stage)
    cpu = cpu_seconds()
    outcome = chain.train(settings)
    if not outcome.finished:
        raise SystemExit(128 + outcome.signal)
    cpu = cpu_seconds() - cpu
    if not stages.exists():
        for stage in STAGES:
            shutil.copytree(folder / stage, stages / stage)
    with open(folder / "steps.csv", newline="", encoding="utf-8") as table:
        rows = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(table)]
    return {
        "cpu_seconds": cpu,
        "train_cpu_seconds": outcome.cpu_seconds,
        "before": rows[0],
        "after": rows[-1],
        "steps": rows,
        **judged(folder, chain.placed(settings, folder).source, seed),
    }


def judged(folder: Path, source: dict, seed: int) -> dict:
    """Median SA score before and after, and, where fcd_torch is there and the molecules are enough, the FCD of what

    the flow left to the molecules that it may start from, with its floor.
    """
    from gengrad.latent.data import Latents
    from gengrad.molecules.evaluating import read_population
    from gengrad.molecules.fcd import LEAST, frechet_chemnet

    smiles = {name: read_population(folder / f"population_{name}.csv").smiles for name in ("before", "after")}
    objective = read_objective({"components": [{"scorer": "sa", "transform": WINDOW}]})
    found = {f"median_sa_{name}": float(score(objective, texts, os.cpu_count() or 1).properties[:, 0].nanmedian())
             for name, texts in smiles.items()}  # fmt: skip
    starts = Latents(**{name: value for name, value in source.items() if name not in ("name", "take")})
    start = [starts.cloud.smiles[i] for i in starts.numbers.tolist()]
    if importlib.util.find_spec("fcd_torch") and min(len(start), len(smiles["after"])) >= LEAST:
        distance = frechet_chemnet(smiles["after"], start, seed)
        found |= {name: distance[name] for name in ("fcd", "floor", "n", "reference_n", "floor_n")}
    return found


def clean(given) -> list[str]:
    """The first n molecules as canonical SMILES: of the file, standardised, or of the library."""
    if given.data is None:
        return library(given.n)
    return prepare(read_molecules(given.data).rows[: given.n], processes=os.cpu_count() or 1).smiles


def learned(given, report: dict, name: str, smiles: list[str]) -> None:
    """The parts that train, and their tables."""
    machine = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.machine(), "date": date.today().isoformat()}
    processes = max(map(int, given.processes.split(",")))
    how = f"{given.minutes:g} CPU-minutes{''.join(f' {p}' for p in given.properties)}"
    autoencoder = given.runs / f"{name}_{len(smiles)}_{how.replace(' ', '_').replace('CPU-', '')}"

    def cell(key: str, measure_it) -> dict:
        if key not in report:
            report[key] = {"load": os.getloadavg()[0], **measure_it(), **machine}
            write_json(given.out, report)
        return report[key]

    trained = f"{name}/{len(smiles)}/{how}"
    found = cell(f"autoencoder/{trained}", lambda: train_autoencoder(smiles, given, autoencoder, processes))
    print("| autoencoder | exact | Tanimoto | validity | steps |", "| --- " * 5 + "|", sep="\n")
    figures = f"{found['exact']:.4f} | {found['tanimoto']:.4f} | {found['validity']:.4f} | {found['steps']:,}"
    print(f"| {trained} | {figures} |", flush=True)
    parts = given.parts.split(",")
    if "flow" not in parts:
        return
    print(f"| flow | {' | '.join(KEPT)} | FCD |", "| --- " * (len(KEPT) + 2) + "|", sep="\n")
    for flow in given.flows.split(","):
        for seed in map(int, given.flow_seeds.split(",")):
            folder = given.runs / f"{flow.replace(' ', '_')}_{seed}_{autoencoder.name}"
            key = f"{flow}/{trained}/{seed}"
            found = cell(f"flow/{key}", lambda f=flow, s=seed, to=folder: move(f, s, smiles, autoencoder, to))
            pairs = (f"{found['before'][name]:.3f} -> {found['after'][name]:.3f}" for name in KEPT)
            fcd = f"{found['fcd']:.2f} (floor {found['floor']:.2f})" if "fcd" in found else ""
            print(f"| {flow}, seed {seed} | {' | '.join(pairs)} | {fcd} |", flush=True)
            if "unseen" in parts:
                others = smiles if given.data else library(given.n + FRESH)[given.n :]
                new = cell(f"unseen/{key}", lambda s=seed, to=folder, o=others: unseen(to, o, 1000, s))
                pairs = (f"{new['before'][name]:.3f} -> {new['after'][name]:.3f}" for name in KEPT)
                print(f"| unseen, {flow}, seed {seed} | {' | '.join(pairs)} | |", flush=True)
            ways = [row["moved"] for row in found["steps"][1:]]
            for kind in KINDS if "walks" in parts else ():
                walked = cell(f"walk/{kind}/{key}", lambda k=kind, s=seed, to=folder, w=ways: walk(to, k, w, 1000, s))
                figures = " | ".join(f"{walked['after'][name]:.3f}" for name in KEPT)
                print(f"| {kind}, seed {seed} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default="prepare,score")
    parser.add_argument("--data", type=Path, default=None, help="a file of molecules (default: the library)")
    parser.add_argument("--n", type=int, default=20_000, help="the first n molecules")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--calls", type=int, default=2000, help="of each baseline")
    parser.add_argument("--seeds", default="0,1", help="of the baselines")
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU-minutes of the autoencoder's training")
    parser.add_argument("--properties", nargs="*", default=[], help="that the autoencoder's codes learn to tell")
    parser.add_argument("--flows", default="qed_jko_icnn,qed_nsgf", help="names of configs/molecules, overrides behind")
    parser.add_argument("--flow-seeds", default="0", help="of the flows")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_molecules"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "molecules.json")
    parser.add_argument("--picture", type=Path, default=None, help="a PNG of the flows and walks in --out")
    given = parser.parse_args()
    report = read_json(given.out) if given.out.exists() else {}
    if given.picture:
        return picture(report, given.picture)
    if given.parts == "baselines":
        return baselines(report, given)
    name = given.data.name if given.data else "library"
    rows = None
    measured = [part for part in given.parts.split(",") if part not in ("autoencoder", "flow", "walks", "unseen")]
    if len(measured) < len(given.parts.split(",")):
        learned(given, report, name, clean(given))
    if not measured:
        return
    print("| part | data | processes | molecules | per second | per CPU-second |", "| --- " * 6 + "|", sep="\n")
    for part in measured:
        if part not in ("prepare", "score"):
            raise SystemExit(
                f"--parts {part}: allowed: prepare, score, autoencoder, flow, walks, unseen; baselines alone"
            )
        for processes in map(int, given.processes.split(",")):
            key = f"{part}/{name}/{given.n}/{processes}"
            if key not in report:
                if rows is None:
                    every = (
                        read_molecules(given.data).rows
                        if given.data
                        else [Row(i, str(i), text) for i, text in enumerate(library(given.n), 1)]
                    )
                    rows = every[: given.n]
                load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
                where = {"load": load, "cpus": cpus, "machine": platform.machine(), "date": date.today().isoformat()}
                report[key] = {**measure(part, rows, processes), **where, "rdkit": rdkit.__version__}
                write_json(given.out, report)
            cell = report[key]
            print(
                f"| {part} | {name} | {processes} | {cell['n']:,} | {cell['per_second']:,.0f} | "
                f"{cell['per_cpu_second']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
