"""The exact coupling of a batch: from the potentials of a loose Sinkhorn solve, against the network simplex (POT).

    python benchmarks/assignment.py [--sizes 256,512,1024] [--rounds 20]

A standard normal against each target in the plane, a fresh batch a round, one thread; medians of CPU milliseconds. The
permutations must be the same, or the script stops.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import gengrad.data  # noqa: F401 - fills the registry
import gengrad.ot as ot
from gengrad.registry import DATASETS

TARGETS = ("8gaussians", "checkerboard", "swissroll")


def timed(run):
    """The result of run() and its CPU milliseconds."""
    start = time.process_time()
    found = run()
    return found, 1e3 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,512,1024")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = DATASETS.build({"name": "normal"}, event_shape=(2,))
    print("| target | n | Sinkhorn | assignment | network simplex | ratio |\n" + "| --- " * 6 + "|")
    for name in TARGETS:
        target, generator = DATASETS.build({"name": name}), torch.Generator().manual_seed(0)
        for n in map(int, given.sizes.split(",")):
            times = []
            for _ in range(given.rounds + 1):
                x, y = source.sample(n, generator), target.sample(n, generator)
                solved, first = timed(lambda: ot.sinkhorn(x, y, epsilon_rel=0.005, tol=0.1))  # noqa: B023
                ours, second = timed(lambda: ot.exact_assignment(x, y, solved.g))  # noqa: B023
                theirs, third = timed(lambda: ot.exact_assignment(x, y))  # noqa: B023
                if not torch.equal(ours, theirs):
                    raise SystemExit(f"{name}, n = {n}: the permutations differ")
                times.append((first, second, third))
            a, b, c = (statistics.median(column) for column in zip(*times[1:]))  # the first round compiles
            print(f"| {name} | {n} | {a:.2f} | {b:.2f} | {c:.2f} | {c / (a + b):.1f} |", flush=True)


if __name__ == "__main__":
    main()
