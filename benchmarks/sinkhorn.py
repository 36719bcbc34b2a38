"""One velocity evaluation of the debiased Sinkhorn flow: gengrad against geomloss, POT and ott-jax, on one CPU thread.

    python benchmarks/sinkhorn.py [--quick] [--output benchmarks/results/sinkhorn.json]

Every solver returns v = T_xy - T_xx at epsilon = (f x RMS distance between x and y)^2, with the cost |x - y|^2 / 2. The
error is the relative L2 error of v against a float64 solve with a marginal error below 1e-6. Each solver gets its
cheapest setting (of the grids below) that reaches the error; peers never solve y with y, are given precomputed cost
matrices, are jitted and warmed up before timing, and may choose among several algorithms. Times are CPU milliseconds of
the process, pinned to one core (on an idle machine: elapsed time), medians over interleaved rounds in which every
timed call follows an untimed one of the same solver; shorter calls are repeated for 20 ms. A cell that is in the JSON
already, from the same machine and versions, is not measured again. A missing peer is skipped, and named.

Data: d = 2, three-fold moons -> 8 Gaussians; d = 64, normal -> 10 anisotropic Gaussians; d = 784, 3072, noise ->
tanh of random fields with spectrum 1/k^1.5 (28 x 28, or 32 x 32 x 3 with correlated channels). A flow is 20 explicit
steps of size 0.2 along the float64 trajectory, each with the previous result as a warm start where a solver has one;
there the worst of the 20 errors counts. A batch is 16 clouds at the settings of the single problem. "products alone"
are the fp32 matrix products of gengrad's solve without anything else: what is left to gain in high dimension.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from sinkhorn_peers import available  # noqa: E402

import gengrad.ot as ot  # noqa: E402
from gengrad.ot.sinkhorn_fused import symmetric_product  # noqa: E402

LEAST = 0.02  # seconds of a timing: shorter calls are repeated
CAP = 20.0  # seconds per evaluation; a peer beyond it counts as the cap
DIMENSIONS, STRENGTHS, ERRORS = (2, 64, 784, 3072), (0.05, 0.5), (0.05, 0.01)
FLOWS = [(256, d, f) for d in (2, 64, 784) for f in STRENGTHS] + [(1024, 2, 0.05), (1024, 64, 0.05)]
BATCHES = [(256, d, f) for d in DIMENSIONS for f in STRENGTHS] + [(1024, d, f) for d in (2, 64) for f in STRENGTHS]
BATCH, STEPS, STEP = 16, 20, 0.2
ROOF = "products alone"


def clouds(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target of n points each, float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if d == 2:
        angle, half = (
            torch.rand(n, generator=g, dtype=torch.float64) * math.pi,
            torch.rand(n, generator=g) < 0.5,
        )
        first = torch.where(half, angle.cos(), 1 - angle.cos())
        x = 3 * (torch.stack([first, torch.where(half, angle.sin(), 0.5 - angle.sin())], 1) + 0.05 * normal(n, 2)) - 1
        mode = torch.randint(8, (n,), generator=g) * (math.pi / 4)
        return x, 5 * torch.stack([mode.cos(), mode.sin()], 1).double() + 0.3 * normal(n, 2)
    x = normal(n, d)
    if d == 64:
        means, factors = normal(10, d), 0.7 * normal(10, d, d) / math.sqrt(d)
        mode = torch.randint(10, (n,), generator=g)
        return x, means[mode] + torch.einsum("mij,mj->mi", factors[mode], normal(n, d))
    side, channels = (28, 1) if d == 784 else (32, 3)
    k = (torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.fftfreq(side)[None] ** 2).sqrt().double()
    z = torch.fft.ifft2(torch.fft.fft2(normal(n, channels, side, side)) * (k + 1 / side) ** -1.5).real
    z = z / z.std()
    z = z + 0.7 * z.mean(1, keepdim=True) if channels == 3 else z
    return x, torch.tanh(z).reshape(n, d)


def strength(x: torch.Tensor, y: torch.Tensor, f: float) -> float:
    """(f x RMS distance)^2."""
    mean = y.mean(0)
    return f * f * float((x - mean).square().sum(-1).mean() + (y - mean).square().sum(-1).mean())


def cached(name: str, make):
    """`make()` kept in the temporary directory: references take longer than the measurements."""
    path = Path(tempfile.gettempdir()) / "gengrad-sinkhorn-references" / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        torch.save(make(), path)
    return torch.load(path)


def reference(x, y, epsilon, warm=None):
    """The float64 velocity, and the result to go on from."""
    for tol in (1e-5, 1e-6, 1e-7):
        r = ot.sinkhorn_velocity(x, y, epsilon=epsilon, tol=tol, max_iter=4000, warm_start=warm, skip_self_mass=2.0)
        warm = r
        if float(r.marginal_error) <= 1e-6:
            return r.velocity, r
    raise RuntimeError(f"the reference stopped at a marginal error of {float(r.marginal_error):.1e}")


def trajectory(n, d, f):
    """STEPS states of the reference flow with their velocities."""
    x, y = clouds(n, d)
    epsilon, warm, states = strength(x, y, f), None, []
    for _ in range(STEPS):
        v, warm = reference(x, y, epsilon, warm)
        states.append((x, v))
        x = x + STEP * v
    return y, epsilon, states


def error(v: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 error; a failed solve counts as infinite."""
    gap = float((v.double() - exact).norm() / exact.norm())
    return gap if math.isfinite(gap) else math.inf


def timed(run, least: float = 0.0):
    """The result of run() and its CPU seconds, the mean of calls that together take `least` seconds."""
    calls, start = 0, time.process_time()
    while True:
        out, calls = run(), calls + 1
        spent = time.process_time() - start
        if spent >= least:
            return out, spent / calls


class Ours:
    """gengrad in its fused or its plain path; the setting is tol."""

    def __init__(self, backend, products="same"):
        self.options = {"backend": backend, "products": products}

    def variants(self, f):
        return [("tol", [0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001])]

    def velocity(self, x, y, epsilon, variant, setting, warm=None):
        r = ot.sinkhorn_velocity(x, y, epsilon=epsilon, tol=setting, warm_start=warm, **self.options)
        return r.velocity, r


def search(solver, problem, f, target, budget=CAP, variants=None, first=None):
    """The cheapest (seconds, variant, setting, error) that reaches the target error on every (x, v) of the problem.

    `first` skips settings looser than one known to be needed. A variant stops once it costs more than the best.
    """
    y, epsilon, states, best = *problem, None
    for variant, settings in variants or solver.variants(f):
        for setting in settings:
            if first and variant == first[0] and setting > first[1] * 3.5:
                continue
            solver.velocity(states[0][0], y, epsilon, variant, setting)  # compile, and touch memory
            total, worst, warm = 0.0, 0.0, None
            for x, v in states:
                (found, warm), seconds = timed(lambda: solver.velocity(x, y, epsilon, variant, setting, warm))  # noqa: B023
                total, worst = total + seconds, max(worst, error(found, v))
                if total > budget or (worst > max(target, 1e-12) and len(states) > 1):
                    break
            if worst <= target and total <= budget and (best is None or total < best[0]):
                best = (total, variant, setting, worst)
            if worst <= target or total > (budget if best is None else 1.5 * best[0]):
                break
    return best


def products_alone(problem) -> float:
    """Milliseconds of the matrix products of gengrad's own solve of x, y and nothing else: the roof of high dimensions.

    x y' and P y; where the self map is solved, 9/16 of x x' and the plan's product with x too.
    """
    y, epsilon, ((x, _),) = problem
    solved = not torch.equal(ot.sinkhorn_velocity(x, y, epsilon=epsilon, tol=0.3).self_target, x)
    plan = torch.rand(len(x), len(y))

    def products():
        torch.mm(x, y.T)
        torch.mm(plan, y)
        if solved:
            symmetric_product(x, plan)
            torch.mm(plan, x)

    products()
    return 1e3 * statistics.median(timed(products, LEAST)[1] for _ in range(5))


def measure(solvers, problem, found, rounds):
    """Median CPU seconds of each solver at its found setting, interleaved."""
    y, epsilon, states = problem
    times = {name: [] for name in found}
    for _ in range(rounds):
        for name, (_, variant, setting, _) in found.items():
            total, warm = 0.0, None
            if len(states) == 1:
                solvers[name].velocity(states[0][0], y, epsilon, variant, setting)  # bring its code and data in
            for x, _ in states:
                (_, after), seconds = timed(
                    lambda: solvers[name].velocity(x, y, epsilon, variant, setting, warm),  # noqa: B023
                    LEAST / len(states),
                )
                total, warm = total + seconds, after
            times[name].append(total)
    return {name: statistics.median(t) for name, t in times.items()}


def single(problem):
    """float64 -> what the solvers see."""
    y, epsilon, states = problem
    return y.float(), epsilon, [(x.float(), v) for x, v in states]


def run_cell(kind, n, d, f, target, solvers, known):
    """One row: milliseconds, setting and error of every solver; peers start from what a smaller n needed."""
    if kind == "flow":
        problem = cached(f"flow-{n}-{d}-{f}", lambda: trajectory(n, d, f))
    else:
        x, y = clouds(n, d)
        epsilon = strength(x, y, f)
        problem = (y, epsilon, [(x, cached(f"one-{n}-{d}-{f}", lambda: reference(x, y, epsilon)[0]))])
    problem, found, row = single(problem), {}, {}
    for name, solver in solvers.items():
        before = known.get((name, d, f, target, kind))
        if name == "gengrad bf16" and (kind != "single" or d < 784 or n > 1024):
            continue
        if before and n > 256 and before[0] * 16 > CAP:
            row[name] = {"ms": CAP * 1e3, "capped": f"predicted from the smaller n: {before[0] * 16:.0f} s"}
            continue
        variants = None
        if kind == "flow":  # at least what its first step needs, by the algorithm that was best there
            before = before or known.get((name, d, f, target, "single"))
            if before is None:
                row[name] = {"ms": None, "capped": "no setting reached the error on a single problem"}
                continue
        if before and not isinstance(solver, Ours):
            variants = [(v, s) for v, s in solver.variants(f) if v == before[1]]
        best = search(
            solver,
            problem,
            f,
            target,
            CAP,
            variants,
            before and before[1:3],
        )
        if best is None:
            row[name] = {"ms": None, "capped": "no setting reached the error within the cap"}
        else:
            found[name], known[name, d, f, target, kind] = best, best
    slow = max((b[0] for b in found.values()), default=0)
    for name, seconds in measure(solvers, problem, found, 7 if slow < 0.3 else 3 if slow < 4 else 1).items():
        _, variant, setting, worst = found[name]
        row[name] = {"ms": 1e3 * seconds, "variant": variant, "setting": setting, "error": worst}
    if kind == "single" and d >= 784:
        row[ROOF] = {"ms": products_alone(problem)}
    return row


def run_batch(n, d, f, target, solvers, known):
    """Sixteen problems at once, at the settings of the single one; solvers without batches take them in turn."""
    pairs = [clouds(n, d, seed) for seed in range(BATCH)]
    epsilon = strength(*pairs[0], f)
    x, y = (torch.stack(t).float() for t in zip(*pairs))
    row = {}
    for name, solver in solvers.items():
        best = known.get((name, d, f, target, "single"))
        if best is None or name == "gengrad bf16":
            continue
        if best[0] * BATCH > CAP:
            row[name] = {"ms": best[0] * BATCH * 1e3, "capped": "16 x the single problem"}
            continue
        batch = getattr(solver, "batch", solver.velocity)
        batch(x, y, epsilon, best[1], best[2])
        times = [timed(lambda: batch(x, y, epsilon, best[1], best[2]), LEAST)[1] for _ in range(3)]  # noqa: B023
        row[name] = {"ms": 1e3 * statistics.median(times), "variant": best[1], "setting": best[2]}
    return row


def machine() -> dict:
    """What the numbers depend on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    model = next(named, platform.processor())
    return {"cpu": model, "torch": torch.__version__, "python": platform.python_version(), "threads": 1}


def gemm_rate() -> float:
    """fp32 GFLOP/s of a 1024 x 1024 x 1024 product here, the roof of high dimensions."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    torch.mm(a, b)
    return 2 * 1.024**3 / statistics.median(timed(lambda: torch.mm(a, b))[1] for _ in range(9))


def plan(sizes: tuple[int, ...], dimensions: tuple[int, ...]):
    """(kind, n, d, f, error) in the order of measurement."""
    for n in sizes:
        for d in dimensions:
            yield from (("single", n, d, f, e) for f in STRENGTHS for e in ERRORS)
        yield from (("batch", *c, 0.05) for c in BATCHES if c[0] == n and c[1] in dimensions)
        yield from (("flow", *c, e) for c in FLOWS if c[0] == n and c[1] in dimensions for e in ERRORS)


def table(cells: dict, names: list[str]) -> str:
    """Markdown: one line per cell, then the geometric means of fastest peer / gengrad."""
    peers = [n for n in names if not n.startswith("gengrad") and n != ROOF]
    lines = [
        f"| kind | n | d | f | error | {' | '.join(names)} | fastest peer / gengrad |",
        "|" + " --- |" * (len(names) + 6),
    ]
    ratios = []
    for key, row in cells.items():
        kind, n, d, f, e = key.split()
        ms = {k: v["ms"] for k, v in row.items()}
        shown = [
            ""
            if k not in row
            else "not reached"
            if ms[k] is None
            else f"{'> ' if 'capped' in row[k] else ''}{ms[k]:.3g}"
            for k in names
        ]
        fastest = min((ms[k] for k in peers if ms.get(k)), default=None)
        ratio = fastest / ms["gengrad"] if fastest and ms.get("gengrad") else None
        geom = ms.get("geomloss") or (CAP * 1e3 if "geomloss" in row else None)
        ratios.append((kind, int(d), float(f), ratio, geom / ms["gengrad"] if geom and ms.get("gengrad") else None))
        lines.append(
            f"| {kind} | {n} | {d} | {f} | {float(e):.0%} | {' | '.join(shown)} "
            f"| {'' if ratio is None else f'{ratio:.2f}'} |"
        )

    def mean(values):
        values = [v for v in values if v]
        return (
            f"{statistics.geometric_mean(values):.2f} (least {min(values):.2f}, {len(values)} cells)"
            if values
            else "none"
        )

    lines += ["", f"Geometric mean of fastest peer / gengrad, all cells: {mean([r[3] for r in ratios])}"]
    lines += [
        f"- d <= 64: {mean([r[3] for r in ratios if r[1] <= 64])}",
        f"- d >= 784: {mean([r[3] for r in ratios if r[1] > 64])}",
    ]
    lines += [f"- {k}: {mean([r[3] for r in ratios if r[0] == k])}" for k in ("single", "batch", "flow")]
    lines += [
        f"- geomloss / gengrad at f = 0.05, d <= 64: {mean([r[4] for r in ratios if r[1] <= 64 and r[2] == 0.05])}"
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what the JSON lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="n = 256, d in {2, 64}: minutes")
    parser.add_argument("--sizes", default="256,1024,4096", help="numbers of points; 4096 takes the longest")
    parser.add_argument("--dimensions", default=",".join(map(str, DIMENSIONS)))
    parser.add_argument("--errors", default="0.05,0.01", help="1 %% at n = 4096 takes a quarter of an hour a cell")
    parser.add_argument("--table", action="store_true", help="print the table of the JSON, measure nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/sinkhorn.json")
    args = parser.parse_args()
    sizes = (256,) if args.quick else tuple(int(n) for n in args.sizes.split(","))
    errors = {float(e) for e in args.errors.split(",")}
    dimensions = (2, 64) if args.quick else tuple(int(d) for d in args.dimensions.split(","))
    planned = [cell for cell in plan(sizes, dimensions) if cell[-1] in errors]
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    peers, versions, missing = available()
    solvers = {
        "gengrad": Ours("auto"),
        "gengrad torch": Ours("torch"),
        "gengrad bf16": Ours("torch", "bf16"),
        **peers,
    }
    state = {"machine": machine() | versions, "missing": missing, "cells": {}, "known": []}
    if args.output.exists():
        old = json.loads(args.output.read_text())
        if args.table or old["machine"] == state["machine"]:
            state = old
    known = {tuple(k): tuple(v) for k, v in state["known"]}
    for kind, n, d, f, target in () if args.table else planned:
        key = f"{kind} {n} {d} {f} {target}"
        if key in state["cells"]:
            continue
        cell = (
            run_batch(n, d, f, target, solvers, known)
            if kind == "batch"
            else run_cell(kind, n, d, f, target, solvers, known)
        )
        state["cells"][key], state["known"] = cell, [[list(k), list(v)] for k, v in known.items()]
        state["date"], state["gemm_gflops"] = time.strftime("%Y-%m-%d"), round(gemm_rate(), 1)
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(json.dumps(state, indent=1))
        print(key, {k: v["ms"] and round(v["ms"], 2) for k, v in cell.items()}, flush=True)
    names = (
        ["gengrad", "gengrad torch", "gengrad bf16", ROOF, *peers]
        if not args.table
        else list({k for c in state["cells"].values() for k in c})
    )
    names.sort(key=lambda k: (not k.startswith("gengrad"), k != ROOF, k))
    print(
        f"\nMachine: {state['machine']}; fp32 products {state.get('gemm_gflops')} GFLOP/s; {state.get('date')}. ",
        end="",
    )
    print(f"Missing peers: {', '.join(state['missing']) or 'none'}.\nMilliseconds:\n")
    print(table(state["cells"], names))


if __name__ == "__main__":
    main()
