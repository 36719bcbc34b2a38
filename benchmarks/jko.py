"""The JKO scheme with input-convex networks against closed forms, exact implicit steps and Langevin sampling.

    python benchmarks/jko.py [--quick] [--parts ou,mixture,profiles,logistic,filter] [--seeds 3] [--uci FILE.npz]

ou: Ornstein-Uhlenbeck, random targets, 18 steps of 0.05: symmetric KL to the true law at t = 0.9, beside that of the
exact implicit steps (the floor of every JKO scheme); with ``trained`` every step trains its network (tol = 0).
mixture: Fokker-Planck to a Gaussian mixture, 40 steps of 0.1: symmetric KL, and energy distance to fresh draws beside
unadjusted Langevin with as many gradients of V a sample as the flow has steps, and with ten times as many.
profiles: porous medium, nonlinear Fokker-Planck and aggregation: largest relative error of radius and energy, and L1
error of the density, against the exact implicit steps, over all steps.
logistic: Bayesian logistic regression on the sets of --uci (NAME_x, NAME_y): accuracy and log likelihood on held-out
rows; posterior means and deviations beside those of a Metropolis-adjusted Langevin chain, in the chain's deviations.
filter: symmetric KL to a solution on a grid, mean over the steps.
CPU-seconds are of the training with its checkpoints, on one thread. Cells that the JSON holds are not computed again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

import gengrad
from gengrad.config import read_config
from gengrad.evaluation.steps import judge_end, judge_steps
from gengrad.evaluation.transport import energy_distance
from gengrad.evaluation.truth import truth_of_flow
from gengrad.files import write_json
from gengrad.functionals.potential import Rippled
from gengrad.methods.jko_filter import simulate
from gengrad.registry import DATASETS

CONFIGS = Path(__file__).parents[1] / "configs"
UCI = ("banana", "diabetis", "german", "image", "ringnorm", "splice", "twonorm", "waveform")


def trained(raw: dict) -> tuple:
    """(flow, CPU-seconds) of a config, trained in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = gengrad.train(read_config({**raw, "out": folder, "device": "cpu"}), quiet=True)
        return gengrad.load(folder), outcome.cpu_seconds


def ou_config(d: int, seed: int, condition: float, steps: int, tol: float) -> dict:
    quadratic = {"name": "quadratic", "seed": seed, "dimension": d, "condition": condition}
    terms = [{"name": "potential", "potential": quadratic}, {"name": "entropy"}]
    jko = {"tau": 0.05, "jko_steps": 18, "tol": tol}
    return {
        "source": {"name": "normal"},
        "data": {"name": "space", "dimension": d},
        "network": {"name": "icnn"},
        "method": {"name": "jko_icnn", "functional": terms, **jko},
        "train": {"steps": steps, "batch_size": 512, "lr": 5e-3, "checkpoint_every": steps, "log_every": steps},
        "evaluate": {"nfe": [18]},
        "seed": seed,
    }


def ornstein_uhlenbeck(d: int, seed: int, condition: float = 2.0, train: bool = False, quick: bool = False) -> dict:
    """Symmetric KL at t = 0.9; exact where all maps are affine, else a mean over 20,000 points."""
    raw = ou_config(d, seed, condition, 1000 if not quick else 20, 0.0 if train else 1e-4)
    flow, cpu = trained(raw)
    truth = truth_of_flow(raw["method"] | {"functional": read_config(raw).method["functional"]}, flow.source)
    row = judge_steps(flow, truth, n=2_000 if quick else 20_000, seed=seed, chosen=[18])[-1]
    share = statistics.mean(t.record["trained"] for t in flow.transports)
    return {"cpu_seconds": cpu, "symmetric_kl": row["symmetric_kl"], "floor": row["symmetric_kl_implicit"],
            "to_implicit": row["symmetric_kl_to_implicit"], "trained_steps": share}  # fmt: skip


def mixture_config(d: int, seed: int, quick: bool) -> dict:
    generator = torch.Generator().manual_seed(100 * d + seed)
    count = {2: 5, 4: 6, 6: 7}.get(d, 8)
    means = (10 * torch.rand(count, d, generator=generator) - 5).tolist()
    jko_steps = 2 if quick else 40
    variance = (16 * torch.eye(d)).tolist()
    return {
        "source": {"name": "gaussian", "mean": [0.0] * d, "covariance": variance},
        "data": {"name": "gaussian_mixture", "means": means, "scales": [1.0] * count},
        "network": {"name": "icnn"},
        "method": {"name": "jko_icnn", "functional": "kl", "tau": 0.1, "jko_steps": jko_steps, "cloud": 50_000},
        "train": {"steps": 20 if quick else 4200, "batch_size": 512, "lr": 4e-2, "checkpoint_every": 10_000},
        "evaluate": {"nfe": [jko_steps]},
        "seed": seed,
    }


def mixture(d: int, seed: int, quick: bool = False) -> dict:
    raw = mixture_config(d, seed, quick)
    flow, cpu = trained(raw)
    target = DATASETS.build(raw["data"])
    n = 500 if quick else 4000
    end, steps = judge_end(flow, target, n=n, seed=seed), len(flow.transports)
    truth, ours = target.sample(n, torch.Generator().manual_seed(999)), flow.sample(n, seed=seed)
    found = {"cpu_seconds": cpu, "symmetric_kl": end["symmetric_kl"], "energy_distance": energy_distance(ours, truth)}
    for factor in (1, 10):
        started = time.process_time()
        y = langevin(lambda x: -target.log_density(x), 4 * torch.randn(n, d), 4.0, factor * steps, seed)
        found[f"langevin_{factor}"] = energy_distance(y, truth)
        found[f"langevin_{factor}_cpu"] = time.process_time() - started
    found["floor"] = energy_distance(target.sample(n, torch.Generator().manual_seed(1)), truth)
    return found


def langevin(potential: Callable, x: Tensor, t: float, steps: int, seed: int) -> Tensor:
    """Unadjusted Langevin: x - h grad V + sqrt(2h) z up to time t, for all chains at once."""
    generator, h = torch.Generator().manual_seed(seed), t / steps
    for _ in range(steps):
        leaf = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(potential(leaf).sum(), leaf)
        x = x - h * gradient + (2 * h) ** 0.5 * torch.randn(x.shape, generator=generator)
    return x


def profile(name: str, seed: int, quick: bool = False) -> dict:
    raw = yaml.safe_load((CONFIGS / "pde" / f"{name}.yaml").read_text()) | {"seed": seed}
    if quick:
        raw["method"] |= {"jko_steps": 2, "cloud": 4096}
        raw["train"]["steps"], raw["evaluate"] = 20, {"nfe": [2]}
    flow, cpu = trained(raw)
    method = read_config(raw).method
    rows = judge_steps(flow, truth_of_flow(method, flow.source), n=20_000, seed=seed)
    return {
        "cpu_seconds": cpu,
        "radius": max(abs(r["radius"] / r["radius_implicit"] - 1) for r in rows),
        "energy": max(abs(r["energy"] / r["energy_implicit"] - 1) for r in rows),
        "density": max(r["density_error"] for r in rows),
    }


def logistic(file: str, name: str, seed: int, quick: bool = False) -> dict:
    raw = yaml.safe_load((CONFIGS / "posterior" / "logistic_regression.yaml").read_text()) | {"seed": seed}
    with tempfile.TemporaryDirectory() as folder, np.load(file) as tables:
        path = f"{folder}/{name}.npz"
        np.savez(path, x=tables[f"{name}_x"], y=tables[f"{name}_y"])
        raw["data"] = {"name": "logistic_posterior", "path": path, "features": "x", "labels": "y", "split_seed": seed}
        if quick:
            raw["method"] |= {"jko_steps": 2, "cloud": 1024, "affine_cloud": 256}
            raw["train"]["steps"], raw["evaluate"] = 20, {"nfe": [2]}
        flow, cpu = trained(raw)
        target = DATASETS.build(raw["data"])
    x = flow.sample(2000, seed=seed)
    started = time.process_time()
    chain, accepted = mala(target.log_density, x.double()[:64], 200 if quick else 4000, seed)
    reference = chain[len(chain) // 4 :].flatten(0, 1)
    seconds, scale = time.process_time() - started, reference.std(0)
    return {
        "cpu_seconds": cpu,
        **target.score_samples(x),
        **{f"reference_{key}": value for key, value in target.score_samples(reference[::37]).items()},
        "reference_cpu": seconds,
        "reference_acceptance": accepted,
        "mean_error": float(((x.double().mean(0) - reference.mean(0)) / scale).abs().max()),
        "deviation_error": float((x.double().std(0) / scale - 1).abs().max()),
    }


def mala(log_density: Callable, x: Tensor, steps: int, seed: int) -> tuple[Tensor, float]:
    """Metropolis-adjusted Langevin, preconditioned by the start's covariance, its step adapted in the first quarter."""
    generator = torch.Generator().manual_seed(seed)
    factor, h, kept, taken = torch.linalg.cholesky(torch.cov(x.T) + 1e-9 * torch.eye(x.shape[1])), 0.3, [], []

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        leaf = z.detach().requires_grad_(True)
        value = log_density(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0] @ factor

    value, gradient = evaluate(x)
    for k in range(steps):
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        move = h**2 / 2 * gradient + h * z
        proposal = x + move @ factor.T
        new_value, new_gradient = evaluate(proposal)
        back = (-move - h**2 / 2 * new_gradient) / h
        log_ratio = new_value - value - back.square().sum(1) / 2 + z.square().sum(1) / 2
        accept = torch.rand(len(x), generator=generator).log() < log_ratio
        x = torch.where(accept[:, None], proposal, x)
        value, gradient = torch.where(accept, new_value, value), torch.where(accept[:, None], new_gradient, gradient)
        rate = float(accept.double().mean())
        if k < steps // 4:
            h *= 1.02 if rate > 0.57 else 0.98
        else:
            taken.append(rate)
        kept.append(x)
    return torch.stack(kept), statistics.mean(taken)


def filtering(seed: int, quick: bool = False) -> dict:
    raw = yaml.safe_load((CONFIGS / "filtering" / "double_well.yaml").read_text()) | {"seed": seed}
    raw["method"]["observations"] = simulate(Rippled(), 1.0, [0.5 * k for k in range(1, 10)], 1.0, seed)
    if quick:
        raw["method"] |= {"jko_steps": 10, "cloud": 2048, "observations": raw["method"]["observations"][:1]}
        raw["train"]["steps"], raw["evaluate"] = 40, {"nfe": [11]}
    flow, cpu = trained(raw)
    rows = judge_steps(flow, truth_of_flow(read_config(raw).method, flow.source), n=100, seed=seed)
    values = [row["symmetric_kl"] for row in rows]
    return {"cpu_seconds": cpu, "symmetric_kl": statistics.mean(values), "last": values[-1], "worst": max(values)}


def cells(parts: list[str], seeds: int, uci: str | None, quick: bool) -> dict[str, Callable[[], dict]]:
    """Name -> what computes it, in the order in which they are worth having."""
    found: dict[str, Callable[[], dict]] = {}
    for seed in range(seeds):
        if "ou" in parts:
            for d in (1, 2) if quick else (1, 2, 4, 8, 12):
                for train in (False, True):
                    key = f"ou/{'trained/' if train else ''}d={d}/{seed}"
                    found[key] = lambda d=d, s=seed, t=train: ornstein_uhlenbeck(d, s, train=t, quick=quick)
            for d, condition in () if quick else ((12, 10.0), (12, 100.0), (32, 2.0), (64, 2.0)):
                key = f"ou/d={d},condition={condition:g}/{seed}"
                found[key] = lambda d=d, s=seed, c=condition: ornstein_uhlenbeck(d, s, c)
        if "profiles" in parts:
            for name in ("porous_medium", "nonlinear_fokker_planck", "aggregation_line", "aggregation_plane"):
                found[f"profiles/{name}/{seed}"] = lambda n=name, s=seed: profile(n, s, quick)
        if "filter" in parts:
            found[f"filter/{seed}"] = lambda s=seed: filtering(s, quick)
        if "logistic" in parts and uci:
            for name in UCI[:1] if quick else UCI:
                found[f"logistic/{name}/{seed}"] = lambda n=name, s=seed: logistic(uci, n, s, quick)
        if "mixture" in parts:
            for d in (2,) if quick else (2, 4, 6, 8):
                found[f"mixture/d={d}/{seed}"] = lambda d=d, s=seed: mixture(d, s, quick)
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
        columns = list(next(iter(cases.values()))[0])
        lines += [f"| {part} | " + " | ".join(c.replace("_", " ") for c in columns) + " | seeds |"]
        lines += ["| --- " * (len(columns) + 2) + "|"]
        for case, found in cases.items():
            means = [f"{statistics.mean(cell[c] for cell in found):.3g}" for c in columns]
            lines.append(f"| {case} | " + " | ".join(means) + f" | {len(found)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="ou,profiles,filter,logistic,mixture")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--uci", default=None, help="an .npz of NAME_x and NAME_y; without it, no logistic part")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "jko.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick:
        given.seeds, given.out = 1, given.out.with_name("jko_quick.json")
    results: dict = yaml.safe_load(given.out.read_text()) if given.out.exists() and not given.quick else {}
    for key, compute in cells(given.parts.split(","), given.seeds, given.uci, given.quick).items():
        if key in results or given.only not in key:
            continue
        results[key] = compute()
        print(key, {name: float(f"{value:.4g}") for name, value in results[key].items()}, flush=True)
        if not given.quick:
            write_json(given.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
