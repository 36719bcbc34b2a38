"""Riesz flows against their closed forms, and the kernel sums against geomloss.

    python benchmarks/riesz.py [--quick] [--parts interaction,steps,line,velocity,pictures] [--seeds 3] [--out FILE]

interaction: a Dirac under -E|x - x'| / 2 to t = 1.2 by the backward, the forward and the particle scheme, d in
{2, 3, 10}: error of the radius and W_1 of the radial law, with the CPU-seconds of the training on one thread.
steps: the backward scheme at r = 0.5 and 1.5 against the recursion of its dilations, worst of all steps.
line: particles in one dimension against the exact quantiles (three targets). velocity: one velocity of 8,000 particles
towards 8,000 targets, exact tiles and slices beside geomloss's energy distance, each in a process of its own.
pictures: energy distance of the smiley and of the two Diracs beside a particle flow given the same CPU time.
Cells that the JSON holds are not computed again, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

import gengrad
from gengrad.config import load_config
from gengrad.data import RieszProfile, generator_for
from gengrad.data.riesz_profile import dilations
from gengrad.evaluation import energy_distance
from gengrad.evaluation.riesz import quantile_flow, radial_distance, radius_error
from gengrad.files import write_json
from gengrad.flows import particle_flow
from gengrad.functionals import RieszMMD
from gengrad.ot import riesz_sums
from gengrad.registry import DATASETS, METHODS
from gengrad.run import train

CONFIGS = Path(__file__).parents[1] / "configs" / "riesz"
PARTS = ("interaction", "steps", "line", "velocity", "pictures")


def run(config: str, *overrides: str) -> tuple[gengrad.Flow, float]:
    """Trains a shipped config with overrides; the flow and the CPU-seconds of its training."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load_config(CONFIGS / f"{config}.yaml", [*overrides, f"out={folder}", "device=cpu"])
        outcome = train(settings, quiet=True)
        if not outcome.finished:  # a signal: a cell of a training cut short would be wrong
            raise SystemExit(128 + outcome.signal)
        return gengrad.load(folder), outcome.cpu_seconds


# ------------------------------------------------------------------ cells


def interaction(scheme: str, d: int, seed: int, samples: int, *overrides: str) -> dict:
    flow, seconds = run(f"interaction_{scheme}", f"data.d={d}", f"seed={seed}", *overrides)
    profile = RieszProfile(d=d, time=1.2)
    x = flow.sample(samples, seed=seed)
    return {
        "radius_error": radius_error(x, profile),
        "radial_distance": radial_distance(x, profile),
        "floor": radial_distance(profile.sample(samples, generator_for(seed, "benchmark floor")), profile),
        "cpu_seconds": seconds,
    }


def steps(r: float, seed: int, samples: int, *overrides: str) -> dict:
    """Relative error of the dilation after each backward step, from the mean squares."""
    tau, count = 0.2, 6
    changes = [f"data.r={r}", f"method.functional.r={r}", f"method.tau={tau}", f"method.flow_steps={count}"]
    flow, seconds = run("interaction_backward", f"seed={seed}", "evaluate.nfe=[6]", *changes, *overrides)
    path = flow.trajectory(samples, seed=seed)[1:]
    exact = [RieszProfile(r=r, dilation=s) for s in dilations(r, tau, count)]
    return {"errors": [radius_error(x, profile) for x, profile in zip(path, exact)], "cpu_seconds": seconds}


def line(target: str, n: int) -> dict:
    """Mean error of the quantiles of n particles from a Dirac at -1 at t = 1, relative to their mean distance moved."""
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    cdfs: dict[str, Callable] = {"uniform": lambda q: q.clamp(0, 1), "normal": torch.special.ndtr,
                                 "dirac": lambda q: (q >= 0).double()}  # fmt: skip
    points = {"uniform": levels, "normal": torch.special.ndtri(levels), "dirac": torch.zeros(1, dtype=torch.float64)}
    x = -1 + 1e-9 * levels
    found = particle_flow(RieszMMD(points[target][:, None]), x[:, None], [1 / 400] * 400).states[-1][:, 0]
    exact = quantile_flow(x, levels, cdfs[target], 1.0, steps=4000)
    return {"error": float((found - exact).abs().mean() / (exact - x).abs().mean())}


def velocity(peer: str, d: int, n: int, repeats: int) -> dict:
    """Median seconds and peak memory of one velocity, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_velocity, (peer, d, n, repeats))


def _velocity(peer: str, d: int, n: int, repeats: int) -> dict:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator) + 0.5
    options = {"geomloss": {}, "tiles": {"route": "tiles"}, "slices": {"route": "slices", "directions": 128}}[peer]
    evaluate: Callable = RieszMMD(y, **options).velocity
    if peer == "geomloss":
        from geomloss import SamplesLoss

        def evaluate(points):
            loss, leaf = SamplesLoss("energy", backend="tensorized"), points.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf, y), leaf)
            return -n * gradient

    evaluate(x[:64])
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats):
        started = time.process_time()
        found = evaluate(x)
        seconds.append(time.process_time() - started)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    few = x[:200].double()
    exact = riesz_sums(x.double(), x.double(), route="tiles", potential=False).gradient[:200] if d < 10 else None
    if exact is None:
        exact = riesz_sums(few, x.double(), route="tiles", potential=False).gradient
    exact = exact - riesz_sums(few, y.double(), route="tiles", potential=False).gradient
    error = float((found[:200].double() - exact).norm() / exact.norm())
    return {"seconds": statistics.median(seconds), "memory_mb": memory, "error": error}


def pictures(config: str, seed: int, samples: int, *overrides: str) -> dict:
    """Energy distance to fresh target points of the learned flow, and of particles after as much CPU time."""
    flow, seconds = run(config, f"seed={seed}", *overrides)
    settings = flow.info["config"]
    target, source = DATASETS.build(settings["data"]), flow.source
    fresh = target.sample(samples, generator_for(seed, "benchmark reference"))
    y = target.sample(2000, generator_for(seed, "benchmark target"))
    x = source.sample(2000, generator_for(seed, "benchmark source"))
    x = x + 1e-4 * torch.randn(x.shape, generator=generator_for(seed, "benchmark spread"))
    method = METHODS.build(settings["method"])
    functional, tau = RieszMMD(y), 0.1
    same_time = round(sum(method.config.taus()) / tau)
    started, count, early = time.process_time(), 0, x
    while time.process_time() - started < seconds:
        x, count = x + tau * functional.velocity(x), count + 1
        early = x if count == same_time else early
    return {
        "learned": energy_distance(flow.sample(samples, seed=seed), fresh),
        "particles_same_time": energy_distance(early, fresh),
        "particles_same_cpu": energy_distance(x, fresh),
        "floor": energy_distance(target.sample(samples, generator_for(seed, "benchmark floor")), fresh),
        "cpu_seconds": seconds,
        "particle_steps": count,
    }


# ------------------------------------------------------------------ the whole


def cells(given: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    """Name -> computation of every cell of the parts asked for."""
    small = ["train.steps=48", "method.pool=256"] if given.quick else []
    particles = ["method.particles=300"] if given.quick else []
    n, repeats, samples = (500, 1, 500) if given.quick else (8000, 3, 20_000)
    few = min(samples, 4000)
    found: dict[str, Callable[[], dict]] = {}
    for seed in range(given.seeds):
        for d in (2, 3, 10):
            for scheme in ("backward", "forward", "particles"):
                extra = particles if scheme == "particles" else small
                found[f"interaction/{scheme}/{d}/{seed}"] = lambda a=(scheme, d, seed, samples, *extra): interaction(*a)
        for r in (0.5, 1.5):
            found[f"steps/{r}/{seed}"] = lambda a=(r, seed, samples, *small): steps(*a)
        for config in ("smiley", "two_diracs"):
            found[f"pictures/{config}/{seed}"] = lambda a=(config, seed, few, *small): pictures(*a)
    for target in ("uniform", "normal", "dirac"):
        found[f"line/{target}"] = lambda a=(target, 200 if given.quick else 1000): line(*a)
    for d in (2, 100, 784):
        for peer in ("tiles", "slices", "geomloss"):
            found[f"velocity/{peer}/{d}"] = lambda a=(peer, d, n, repeats): velocity(*a)
    return {name: compute for name, compute in found.items() if name.split("/")[0] in given.parts.split(",")}


def table(results: dict[str, dict]) -> str:
    """Markdown, a block for each part that has cells."""
    lines = []

    def block(part: str, head: str, row: Callable[[str, list[dict]], str]) -> None:
        groups: dict[str, list[dict]] = {}
        for name, cell in sorted(results.items()):
            if name.startswith(part + "/"):
                words = name.split("/")[1:]
                groups.setdefault(" ".join(words[:-1] if part in SEEDED else words), []).append(cell)
        if groups:
            lines.extend(["", head, "| --- " * head.count(" | ") + "| --- |"])
            lines.extend(row(name, group) for name, group in groups.items())

    def worst(group: list[dict], key: str) -> float:
        return max((cell[key] for cell in group), key=abs)

    def mean(group: list[dict], key: str) -> float:
        return statistics.mean(cell[key] for cell in group)

    block(
        "interaction",
        "| scheme, d | radius error, worst seed | W1 of radii | floor | CPU-s | seeds |",
        lambda k, g: (
            f"| {k} | {worst(g, 'radius_error'):+.2%} | {mean(g, 'radial_distance'):.4f} | {mean(g, 'floor'):.4f} "
            f"| {mean(g, 'cpu_seconds'):.0f} | {len(g)} |"
        ),
    )
    block(
        "steps",
        "| r | dilation error, worst step and seed | CPU-s | seeds |",
        lambda k, g: (
            f"| {k} | {max((e for c in g for e in c['errors']), key=abs):+.2%} | {mean(g, 'cpu_seconds'):.0f} "
            f"| {len(g)} |"
        ),
    )
    block("line", "| target | error of the quantiles |", lambda k, g: f"| {k} | {worst(g, 'error'):.2%} |")
    block(
        "velocity",
        "| route, d | CPU-ms | MB | relative error |",
        lambda k, g: f"| {k} | {1e3 * mean(g, 'seconds'):.0f} | {mean(g, 'memory_mb'):.0f} | {mean(g, 'error'):.1e} |",
    )
    block(
        "pictures",
        "| config | learned | particles, same time | particles, same CPU | floor | CPU-s | seeds |",
        lambda k, g: (
            f"| {k} | {mean(g, 'learned'):.5f} | {mean(g, 'particles_same_time'):.5f} | "
            f"{mean(g, 'particles_same_cpu'):.5f} | {mean(g, 'floor'):.5f} | {mean(g, 'cpu_seconds'):.0f} | {len(g)} |"
        ),
    )
    return "\n".join(lines).strip()


SEEDED = ("interaction", "steps", "pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", default="", help="cells whose name holds this, e.g. backward/10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 1 seed: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "riesz.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick:
        given.seeds, given.out = 1, Path(tempfile.mkdtemp()) / "riesz_quick.json"
    results = json.loads(given.out.read_text()) if given.out.exists() else {"cells": {}}
    results["machine"] = f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}"
    results["date"] = date.today().isoformat()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name, compute in cells(given).items():
        if name in results["cells"] or given.only not in name:
            continue
        try:
            results["cells"][name] = compute()
        except ImportError as error:
            print(f"{name}: skipped, {error}", flush=True)
            continue
        write_json(given.out, results)
        print(name, results["cells"][name], flush=True)
    print(table(results["cells"]))


if __name__ == "__main__":
    main()
