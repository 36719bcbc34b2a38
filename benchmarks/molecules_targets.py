"""Targets for molecules at equal scorer calls: two properties at once, and leads that keep their scaffold.

    python benchmarks/molecules_targets.py --autoencoder FOLDER [--parts two,leads] [--data FILE] [--n 20000]
                                           [--seeds 3] [--leads 40] [--calls 100] [--runs FOLDER] [--out FILE.json]

two: QED as high as it goes, logP between 1 and 3. ``nsgf`` and ``entropic_map`` score the n molecules (of --data, else
of the enumerated library), move 1,000 of those with a total below 0.25 toward those of 0.85 and more, and score what
comes out: n + 1,000 calls. Random screening of molecules drawn by the seed and the genetic algorithm have as many. A
hit has a QED of at least 0.85 and a logP within [1, 3]. ``rate``: hits that were not known before among the last 1,000
calls, once each; ``hits``: of all calls. CPU-seconds without the autoencoder's training; of baselines with the
standardising of --data.
leads: molecules of QED below 0.7 that are none of the n, each to be improved within --calls scorer calls, at a Tanimoto
similarity of 0.4 or more and with its Murcko scaffold; a success gains 0.1 of QED. Proposals by the latent space with
and without the surrogate of a run (--run, else the one that part two leaves), by graph mutations and by screening the n
molecules. ``before``: the calls that a way has cost before the first lead, which those of ``calls_per_lead`` are not.
The autoencoder is one of train-autoencoder or of benchmarks/molecules.py. What a flow scores on its way for its report
is not counted: nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from cells import fill
from molecules import WISHED, clean, cpu_seconds

from gengrad import chain
from gengrad.config import load_config
from gengrad.data.draws import generator_for
from gengrad.files import write_atomically
from gengrad.latent import proposer  # noqa: F401 - registers it
from gengrad.latent.data import Cloud
from gengrad.molecules.leads import LeadSearch, run_leads
from gengrad.molecules.objective import read_objective
from gengrad.molecules.scoring import score
from gengrad.molecules.searching import run_baseline

CONFIGS = Path(__file__).parents[1] / "configs" / "molecules"
MADE = 1000  # molecules that a flow makes
FRESH = 2000  # molecules of which leads are taken


def listed(smiles: list[str], path: Path) -> Path:
    write_atomically(path, "".join(f"{text} {i}\n" for i, text in enumerate(smiles, 1)).encode())
    return path


def table(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hit(row: dict) -> bool:
    return bool(row["qed"]) and float(row["qed"]) >= 0.85 and 1 <= float(row["logp"]) <= 3


def flow_hits(method: str, given: argparse.Namespace, seed: int) -> dict:
    """A flow's cell of part two; its run stays for the part leads."""
    folder, file = given.runs / f"two_{method}_{seed}", given.runs / "molecules.smi"
    places = [f"data.path={file}", f"data.autoencoder_from={given.autoencoder}", f"out={folder}"]
    target = [f"data.objective={json.dumps(WISHED)}", "data.surrogate.explored=0", "data.at_least=0.85"]
    changes = [*target, "source.at_most=0.25", f"evaluate.n={MADE}", f"seed={seed}", f"evaluate.seed={seed}"]
    began = cpu_seconds()
    outcome = chain.train(load_config(CONFIGS / f"qed_{method}.yaml", [*places, *changes]), quiet=True)
    if not outcome.finished:
        raise SystemExit(128 + outcome.signal)
    cpu, cloud = cpu_seconds() - began, Cloud.load(folder / "latents")
    after = table(folder / "population_after.csv")
    known, found = set(cloud.smiles), {row["smiles"] for row in after if hit(row)}
    data = sum(bool(q >= 0.85 and 1 <= p <= 3) for q, p in cloud.properties[:, :2].tolist())
    return {"calls": cloud.info["calls"] + MADE, "rate": len(found - known) / MADE, "hits": data + len(found - known),
            "known_hits": len(found & known), "cpu_seconds": cpu}  # fmt: skip


def baseline_hits(method: str, given: argparse.Namespace, seed: int) -> dict:
    """The same of a baseline, on other molecules of the same file or library, by the seed."""
    calls = given.n + MADE
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "objective.yaml").write_text(json.dumps(WISHED))  # which is YAML as well
        began = cpu_seconds()
        run_baseline(method, folder / "objective.yaml", calls, folder / "out", start=given.data, seed=seed)
        cpu, rows = cpu_seconds() - began, table(folder / "out" / "calls.csv")
    last = {row["smiles"] for row in rows[-MADE:] if hit(row)}
    return {"calls": len(rows), "rate": len(last) / MADE, "hits": sum(map(hit, rows)), "cpu_seconds": cpu}


def lead_gains(settings: dict, given: argparse.Namespace, seed: int) -> dict:
    """Success of one proposer on the leads of this seed."""
    fresh = clean(argparse.Namespace(data=given.data, n=given.n + FRESH))[given.n :]
    poor = [text for text, q in zip(fresh, score(read_objective({"components": ["qed"]}), fresh).total) if q < 0.7]
    order = torch.randperm(len(poor), generator=generator_for(seed, "benchmark leads"))[: given.leads]
    before = Cloud.load(given.run / "latents").info["calls"] if settings.get("guided", 0) else 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        leads = listed([poor[i] for i in order.tolist()], folder / "leads.smi")
        (folder / "objective.yaml").write_text("components: [qed]\n")
        began = cpu_seconds()
        found = run_leads(
            leads, folder / "objective.yaml", 0.4, given.calls, folder / "out", proposer=settings, seed=seed,
            settings=LeadSearch(keep_scaffold=True),
        )  # fmt: skip
        cpu, rows = cpu_seconds() - began, table(folder / "out" / "leads.csv")
    gains = [max(0.0, float(row["gain"])) if row["gain"] else 0.0 for row in rows]
    return {
        "success": statistics.mean(gain >= 0.1 for gain in gains), "mean_gain": statistics.mean(gains),
        "calls_per_lead": found["calls"] / len(rows), "before": before, "cpu_seconds": cpu,
        "decodes_per_lead": statistics.mean(int(row["proposed"]) for row in rows),
    }  # fmt: skip


def cells(given: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    found: dict[str, Callable[[], dict]] = {}
    name, file = given.data.name if given.data else "library", str(given.runs / "molecules.smi")
    two, leads = f"{name} of {given.n}", f"{name} of {given.n}, {given.leads} of {given.calls} calls"
    ways = {
        "latent, guided": {"name": "latent", "run": str(given.run), "guided": 0.5},
        "latent": {"name": "latent", "run": str(given.run), "guided": 0.0},
        "graph": {"name": "graph"},
        "screen": {"name": "screen", "path": file},
    }
    for seed in range(given.seeds):
        if "two" in given.parts.split(","):
            for method in ("nsgf", "entropic_map"):
                found[f"two/{two}/{method}/{seed}"] = lambda m=method, s=seed: flow_hits(m, given, s)
            for method in ("random", "graph-ga"):
                found[f"two/{two}/{method}/{seed}"] = lambda m=method, s=seed: baseline_hits(m, given, s)
        if "leads" in given.parts.split(","):
            for way, settings in ways.items():
                found[f"leads/{leads}/{way}/{seed}"] = lambda w=settings, s=seed: lead_gains(w, given, s)
    return found


def summary(results: dict) -> str:
    """Markdown: a table a part, means over the seeds."""
    lines, groups = [], {}
    for key, cell in results.items():
        part, data, way, _ = key.split("/")
        groups.setdefault((part, data), {}).setdefault(way, []).append(cell)
    for (part, data), ways in groups.items():
        columns = list(next(iter(ways.values()))[0])
        lines += ["", f"| {part}, {data} | " + " | ".join(columns) + " | seeds |", "| --- " * (len(columns) + 2) + "|"]
        for way, found in ways.items():
            means = [f"{statistics.mean(c[k] for c in found):.4g}" if k in found[0] else "" for k in columns]
            lines.append(f"| {way} | " + " | ".join(means) + f" | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, required=True, help="a folder of one")
    parser.add_argument("--parts", default="two,leads")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--data", type=Path, default=None, help="a file of molecules (default: the library)")
    parser.add_argument("--n", type=int, default=20_000, help="of its molecules, the first ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--leads", type=int, default=40)
    parser.add_argument("--calls", type=int, default=100, help="for each lead")
    parser.add_argument("--run", type=Path, default=None, help="a run on molecules whose surrogate guides")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_molecules_targets"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "molecules_targets.json")
    given = parser.parse_args()
    given.run = given.run or given.runs / "two_nsgf_0"
    listed(clean(given), given.runs / "molecules.smi")
    print(summary(fill(given.out, cells(given), given.only)))


if __name__ == "__main__":
    main()
