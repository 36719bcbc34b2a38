"""The JKO scheme with input-convex networks against closed forms, exact implicit steps, and sampling by particles.

    python benchmarks/jko.py [--quick] [--parts ou,mixture,settled,profiles,logistic,filter] [--only TEXT] [--seeds 3]
                             [--uci FOLDER] [--out FILE.json]

One cell is one (part, case, seed); the JSON is written after each, and cells that it holds are not computed again: the
same command goes on where it was stopped.

ou: Ornstein-Uhlenbeck, random targets with curvatures from 1 / condition to 1, 20 steps of 0.05: symmetric KL to the
true law at t = 0.9, beside that of the exact implicit steps (the floor of every JKO scheme). ``networks``: the affine
start is left out and every step trained. Wall-clock of a cell: 10 s (d = 1) to 30 s (d = 12), minutes at d = 64.
mixture: Fokker-Planck to a Gaussian mixture, 40 steps of 0.1: symmetric KL, and energy distance to fresh draws beside
unadjusted Langevin up to the same time, with as many gradients of V a sample as the flow has steps, and with as many in
all as training took (at most 2,000 a sample). 3 to 8 minutes.
settled: the symmetric KL that the flow itself leaves at that time: in the plane by finite volumes, else that of the
modes' weights alone. Seconds.
profiles: porous medium, nonlinear Fokker-Planck and aggregation: relative error of radius and energy, and L1 error of
the density, against the exact implicit steps, after every step, and the largest of each. 1 to 3 minutes.
logistic: Bayesian logistic regression on the sets of uci_binary.npz in --uci (NAME_x, NAME_y): accuracy and log
likelihood on held-out rows; posterior means and deviations beside those of a Metropolis-adjusted Langevin chain, in the
chain's deviations. 1 to 5 minutes, half of it the chain.
filter: symmetric KL to a solution on a grid, mean over the steps; beside it a bootstrap filter with 1,000, 10,000 and
50,000 particles through a density estimate. Five seeds of observations at least. 3 to 5 minutes.
CPU-seconds are of the training with its checkpoints, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from cells import fill
from jko_references import bootstrap_filter, fokker_planck, langevin, mala, weights_alone

import gengrad
from gengrad.config import read_config
from gengrad.data import GaussianMixture
from gengrad.evaluation.steps import judge_end, judge_steps
from gengrad.evaluation.transport import energy_distance
from gengrad.evaluation.truth import truth_of_flow
from gengrad.functionals.potential import Rippled
from gengrad.methods.jko_filter import simulate
from gengrad.registry import DATASETS

CONFIGS = Path(__file__).parents[1] / "configs"
UCI = ("german", "diabetis", "banana", "twonorm", "image", "ringnorm", "splice", "waveform")
PROFILES = ("nonlinear_fokker_planck", "aggregation_plane", "porous_medium", "aggregation_line")


def trained(raw: dict) -> tuple:
    """(flow, CPU-seconds) of a config, trained in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = gengrad.train(read_config({**raw, "out": folder, "device": "cpu"}), quiet=True)
        return gengrad.load(folder), outcome.cpu_seconds


def share_trained(flow) -> float:
    """The share of the steps whose network was needed: the others were solved by the affine start, or kept it."""
    return statistics.mean(float(t.record["trained"]) for t in flow.transports if "step" in t.record)


def ou_config(d: int, seed: int, condition: float, steps: int) -> dict:
    quadratic = {"name": "quadratic", "seed": seed, "dimension": d, "condition": condition}
    terms = [{"name": "potential", "potential": quadratic, "weight": 1 / condition}, {"name": "entropy"}]
    return {
        "source": {"name": "normal"},
        "data": {"name": "space", "dimension": d},
        "network": {"name": "icnn"},
        "method": {"name": "jko_icnn", "functional": terms, "tau": 0.05, "jko_steps": 20},
        "train": {"steps": steps, "batch_size": 512, "lr": 5e-3, "checkpoint_every": steps, "log_every": steps},
        "evaluate": {"nfe": [20]},
        "seed": seed,
    }


def ornstein_uhlenbeck(d: int, seed: int, condition: float = 2.0, networks: bool = False, quick: bool = False) -> dict:
    """Symmetric KL at t = 0.9; exact where all maps are affine, else a mean over 20,000 points."""
    raw = ou_config(d, seed, condition, 20 if quick else 1000)
    if networks:
        raw["method"] |= {"start": "identity", "tol": 0.0}
    flow, cpu = trained(raw)
    truth = truth_of_flow(raw["method"] | {"functional": read_config(raw).method["functional"]}, flow.source)
    row = judge_steps(flow, truth, n=2_000 if quick else 20_000, seed=seed, chosen=[18])[17]
    return {"cpu_seconds": cpu, "symmetric_kl": row["symmetric_kl"], "floor": row["symmetric_kl_implicit"],
            "to_implicit": row["symmetric_kl_to_implicit"], "trained_steps": share_trained(flow)}  # fmt: skip


def mixture_config(d: int, seed: int, quick: bool) -> dict:
    generator = torch.Generator().manual_seed(100 * d + seed)
    count = {2: 5, 4: 6, 6: 7}.get(d, 8)
    means = (10 * torch.rand(count, d, generator=generator) - 5).tolist()
    jko_steps = 2 if quick else 40
    variance = (16 * torch.eye(d)).tolist()
    return {
        "source": {"name": "gaussian", "mean": [0.0] * d, "covariance": variance},
        "data": {"name": "gaussian_mixture", "means": means, "scales": [1.0] * count},
        "network": {"name": "log_sum_exp"},
        "method": {"name": "jko_icnn", "functional": "kl", "tau": 0.1, "jko_steps": jko_steps, "cloud": 50_000},
        "train": {"steps": 20 if quick else 16_800, "batch_size": 256, "lr": MIXTURE_LR, "checkpoint_every": 10_000},
        "evaluate": {"nfe": [jko_steps]},
        "seed": seed,
    }


MIXTURE_LR = 2e-2


@contextmanager
def counted(cls: type) -> Iterator[list[int]]:
    """Counts the points at which ``cls.log_density`` is evaluated."""
    total, real = [0], cls.log_density

    def counting(self, x):
        total[0] += len(x)
        return real(self, x)

    cls.log_density = counting
    try:
        yield total
    finally:
        cls.log_density = real


def mixture(d: int, seed: int, quick: bool = False) -> dict:
    raw = mixture_config(d, seed, quick)
    with counted(GaussianMixture) as evaluations:
        flow, cpu = trained(raw)
    target = DATASETS.build(raw["data"])
    n = 500 if quick else 4000
    end, steps = judge_end(flow, target, n=n, seed=seed), len(flow.transports)
    truth, ours = target.sample(n, torch.Generator().manual_seed(999)), flow.sample(n, seed=seed)
    found = {"cpu_seconds": cpu, "symmetric_kl": end["symmetric_kl"], "trained_steps": share_trained(flow),
             "energy_distance": energy_distance(ours, truth), "evaluations": evaluations[0]}  # fmt: skip
    budget = min(max(evaluations[0] // n, steps), 2000)
    for name, count in (("langevin", steps), ("langevin_budget", budget)):
        started = time.process_time()
        y = langevin(lambda x: -target.log_density(x), 4 * torch.randn(n, d), 0.1 * steps, count, seed)
        found |= {name: energy_distance(y, truth), f"{name}_cpu": time.process_time() - started}
    found["floor"] = energy_distance(target.sample(n, torch.Generator().manual_seed(1)), truth)
    return found


def settled(d: int, seed: int) -> dict:
    """What symmetric KL is left at t = 4 by the flow itself: in the plane its own, of the modes' weights in any d."""
    target = DATASETS.build(mixture_config(d, seed, False)["data"])
    start = 4 * torch.randn(20_000, d, generator=torch.Generator().manual_seed(seed))
    x = langevin(lambda x: -target.log_density(x), start, 4.0, 400, seed)
    return {"weights_alone": weights_alone(target, x)} | ({"exact": fokker_planck(target, 16.0, 4.0)} if d == 2 else {})


def profile(name: str, seed: int, quick: bool = False) -> dict:
    raw = yaml.safe_load((CONFIGS / "pde" / f"{name}.yaml").read_text()) | {"seed": seed}
    if quick:
        raw["method"] |= {"jko_steps": 2, "cloud": 4096}
        raw["train"]["steps"], raw["evaluate"] = 20, {"nfe": [2]}
    flow, cpu = trained(raw)
    rows = judge_steps(flow, truth_of_flow(read_config(raw).method, flow.source), n=20_000, seed=seed)
    along = {
        "radius": [abs(r["radius"] / r["radius_implicit"] - 1) for r in rows],
        "energy": [abs(r["energy"] / r["energy_implicit"] - 1) for r in rows],
        "density": [r["density_error"] for r in rows],
    }
    worst = {key: max(values) for key, values in along.items()}
    return {"cpu_seconds": cpu, **worst, "trained_steps": share_trained(flow), "along": along}


def logistic(folder: Path, name: str, seed: int, quick: bool = False) -> dict:
    raw = yaml.safe_load((CONFIGS / "posterior" / "logistic_regression.yaml").read_text()) | {"seed": seed}
    file = folder / "uci_binary.npz" if folder.is_dir() else folder
    with tempfile.TemporaryDirectory() as scratch, np.load(file) as tables:
        path = f"{scratch}/{name}.npz"
        np.savez(path, x=tables[f"{name}_x"], y=tables[f"{name}_y"])
        raw["data"] = {"name": "logistic_posterior", "path": path, "features": "x", "labels": "y", "split_seed": seed}
        if quick:
            raw["method"] |= {"jko_steps": 2, "cloud": 1024, "affine_cloud": 256}
            raw["train"]["steps"], raw["evaluate"] = 20, {"nfe": [2]}
        flow, cpu = trained(raw)
        target = DATASETS.build(raw["data"])
    x = flow.sample(10_000, seed=seed)
    started = time.process_time()
    chain, accepted = mala(target.log_density, x.double()[:64], 200 if quick else 2000, seed)
    reference = chain[len(chain) // 4 :].flatten(0, 1)
    seconds, scale = time.process_time() - started, reference.std(0)
    # how far two halves of the chains are apart says what of the differences below is the chain's own noise
    halves = [half.flatten(0, 1).mean(0) for half in chain[len(chain) // 4 :].chunk(2)]
    return {
        "cpu_seconds": cpu,
        **target.score_samples(x[:2000]),
        **{f"reference_{key}": value for key, value in target.score_samples(reference[::37]).items()},
        "reference_cpu": seconds,
        "reference_acceptance": accepted,
        "reference_noise": float(((halves[0] - halves[1]) / scale).abs().max()) / 2,
        "mean_error": float(((x.double().mean(0) - reference.mean(0)) / scale).abs().max()),
        "deviation_error": float((x.double().std(0) / scale - 1).abs().max()),
        "trained_steps": share_trained(flow),
    }


def filtering(seed: int, quick: bool = False) -> dict:
    raw = yaml.safe_load((CONFIGS / "filtering" / "double_well.yaml").read_text()) | {"seed": seed}
    raw["method"]["observations"] = simulate(Rippled(), 1.0, [0.5 * k for k in range(1, 10)], 1.0, seed)
    if quick:
        raw["method"] |= {"jko_steps": 10, "cloud": 2048, "observations": raw["method"]["observations"][:1]}
        raw["train"]["steps"], raw["evaluate"] = 40, {"nfe": [11]}
    flow, cpu = trained(raw)
    truth = truth_of_flow(read_config(raw).method, flow.source)
    values = [row["symmetric_kl"] for row in judge_steps(flow, truth, n=100, seed=seed)]
    found = {"cpu_seconds": cpu, "symmetric_kl": statistics.mean(values), "last": values[-1], "worst": max(values),
             "trained_steps": share_trained(flow)}  # fmt: skip
    for count in (1000,) if quick else (1000, 10_000, 50_000):
        started, start = time.process_time(), flow.source.sample(count, torch.Generator().manual_seed(seed))
        errors = bootstrap_filter(Rippled(), 1.0, truth, start, len(values), seed)
        found |= {f"bootstrap_{count}": statistics.mean(errors), f"cpu_{count}": time.process_time() - started}
    return found


def cells(parts: list[str], seeds: int, uci: Path | None, quick: bool) -> dict[str, Callable[[], dict]]:
    """Name -> what computes it, in the order in which they are worth having."""
    found: dict[str, Callable[[], dict]] = {}
    for seed in range(seeds):
        if "ou" in parts:
            for d in (1, 2) if quick else (1, 2, 4, 8, 12):
                found[f"ou/d={d}/{seed}"] = lambda d=d, s=seed: ornstein_uhlenbeck(d, s, quick=quick)
        if "mixture" in parts:
            found[f"mixture/d=2/{seed}"] = lambda s=seed: mixture(2, s, quick)
        if "filter" in parts:
            found[f"filter/{seed}"] = lambda s=seed: filtering(s, quick)
        if "logistic" in parts and uci:
            for name in UCI[:1] if quick else UCI[:4]:
                found[f"logistic/{name}/{seed}"] = lambda n=name, s=seed: logistic(uci, n, s, quick)
        if "profiles" in parts:
            for name in PROFILES:
                found[f"profiles/{name}/{seed}"] = lambda n=name, s=seed: profile(n, s, quick)
        if "ou" in parts and not quick:
            for d, condition in ((12, 10.0), (12, 100.0), (32, 2.0), (64, 2.0)):
                key = f"ou/d={d},condition={condition:g}/{seed}"
                found[key] = lambda d=d, s=seed, c=condition: ornstein_uhlenbeck(d, s, c)
        if "mixture" in parts and not quick:
            for d in (4, 6, 8):
                found[f"mixture/d={d}/{seed}"] = lambda d=d, s=seed: mixture(d, s)
        if "settled" in parts:
            for d in (2,) if quick else (2, 4, 6, 8):
                found[f"settled/d={d}/{seed}"] = lambda d=d, s=seed: settled(d, s)
        if "logistic" in parts and uci and not quick:
            for name in UCI[4:]:
                found[f"logistic/{name}/{seed}"] = lambda n=name, s=seed: logistic(uci, n, s)
        if "ou" in parts:
            for d in (2,) if quick else (1, 2, 4, 8, 12):
                key = f"ou/networks,d={d}/{seed}"
                found[key] = lambda d=d, s=seed: ornstein_uhlenbeck(d, s, networks=True, quick=quick)
    for seed in range(seeds, 5 if "filter" in parts and not quick else 0):
        found[f"filter/{seed}"] = lambda s=seed: filtering(s)
    return found


def table(results: dict) -> str:
    """Markdown, one table a part: mean over seeds of every figure."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for key, cell in results.items():
        part, _, rest = key.partition("/")
        case = rest.rpartition("/")[0] or "all"
        groups.setdefault(part, {}).setdefault(case, []).append(cell)
    lines = []
    for part, cases in groups.items():
        columns = [c for c in next(iter(cases.values()))[0] if c != "along"]
        lines += [f"| {part} | " + " | ".join(c.replace("_", " ") for c in columns) + " | seeds |"]
        lines += ["| --- " * (len(columns) + 2) + "|"]
        for case, found in cases.items():
            means = [f"{statistics.mean(cell[c] for cell in found):.3g}" if c in found[0] else "" for c in columns]
            lines.append(f"| {case} | " + " | ".join(means) + f" | {len(found)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="ou,profiles,filter,logistic,mixture,settled")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--uci", type=Path, default=None, help="folder of uci_binary.npz; without it, no logistic part")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "jko.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick:
        given.seeds = 1
    wanted = cells(given.parts.split(","), given.seeds, given.uci, given.quick)
    print(table(fill(given.out, wanted, given.only, keep=not given.quick)))


if __name__ == "__main__":
    main()
