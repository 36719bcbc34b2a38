"""How far samples are from their target: pure functions of two clouds, and the protocol that reports them fairly.

Every figure comes beside its *floor*, the same figure for data against data: two finite clouds of one distribution
differ, and no method can do better than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gengrad import ot
from gengrad.data.base import Distribution, FiniteData
from gengrad.data.draws import generator_for
from gengrad.ot.exact import wasserstein2
from gengrad.registry import SEEDS

# ------------------------------------------------------------------ distances of two clouds


def slicing_directions(d: int, count: int) -> Tensor:
    """``gengrad.ot.slicing_directions`` from the seed of the evaluation: unit vectors (d, count), float64."""
    return ot.slicing_directions(d, count, generator_for(0, "slicing directions", d))


def sliced_w2_squared(x: Tensor, y: Tensor, directions: int = 128) -> float:
    """SW_2^2(x, y) = mean over directions u of W_2^2(x u, y u), each exact in one dimension.

    x (n, d), y (m, d) with uniform weights. Clouds of different sizes are compared by their quantile functions: both
    are steps, and the integral over [0, 1] of their squared difference is a sum over the merged jumps. A translation
    by s has |s|^2 / d; unlike W_2^2 the figure stays cheap at 100,000 points. Source: Bonneel, Rabin, Peyre, Pfister,
    Sliced and Radon Wasserstein barycenters of measures (2015).
    """
    n, m = len(x), len(y)
    u = slicing_directions(x.shape[1], directions)
    # jumps of either quantile function in units of 1 / (n m): whole numbers, no rounding
    jumps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    share = np.diff(jumps, prepend=0) / (n * m)
    of_x, of_y = (jumps - 1) // m, (jumps - 1) // n
    total = 0.0
    for some in u.T.split(16):  # bounds the memory to 16 projections; NumPy sorts them several times faster
        px, py = (np.sort((some @ cloud.double().T).numpy()) for cloud in (x, y))
        total += float(((px[:, of_x] - py[:, of_y]) ** 2 @ share).sum())
    return total / u.shape[1]


def _distance_sum(x: Tensor, y: Tensor, tile: int = 2048) -> float:
    """sum_ij |x_i - y_j| in float64, a tile of the distance matrix at a time."""
    return sum(torch.cdist(a, b).sum().item() for a in x.double().split(tile) for b in y.double().split(tile))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| without bias: pairs of a point with itself are left out.

    x (n, d), y (m, d), at least two points each. In the units of a distance; zero for equal distributions, so that
    an estimate may come out a little below zero. Raises ``ValueError`` for a cloud of one point.
    Source: Szekely, Rizzo, Energy statistics (2013).
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"the energy distance compares pairs within each cloud; got clouds of {n} and {m} points")
    within_x, within_y = _distance_sum(x, x) / (n * (n - 1)), _distance_sum(y, y) / (m * (m - 1))
    return 2 * _distance_sum(x, y) / (n * m) - within_x - within_y


class ModeCoverage(NamedTuple):
    """``modes_hit``: share of modes with samples; ``within_radius``: share of samples close to a mode;
    ``mass_error``: total-variation distance of the modes' masses from their weights."""

    modes_hit: float
    within_radius: float
    mass_error: float


def mode_coverage(x: Tensor, modes: Tensor, radius: float, weights: Tensor | None = None) -> ModeCoverage:
    """Which modes (k, d) the samples x (n, d) reach, how cleanly, and in which proportions (``weights``, else equal).

    A mode is hit when at least a tenth of the samples due to it lie within ``radius``, and at least one. Its mass is
    the share of samples nearest to it: mass_error = sum_k |mass_k - w_k| / 2.
    """
    k = len(modes)
    w = torch.full((k,), 1 / k, dtype=torch.float64) if weights is None else weights.double() / weights.double().sum()
    distance, nearest = torch.cdist(x.double(), modes.double()).min(dim=1)
    close = distance <= radius
    found = torch.bincount(nearest[close], minlength=k).double()
    hit = found >= (0.1 * w * len(x)).clamp_min(1)
    mass = torch.bincount(nearest, minlength=k).double() / len(x)
    return ModeCoverage(hit.double().mean().item(), close.double().mean().item(), (mass - w).abs().sum().item() / 2)


# ------------------------------------------------------------------ the protocol

# the seeds that samplers are asked for: far from the small numbers that training runs are seeded with
FIRST_SAMPLING_SEED = 1_000_000


def sampling_seeds(seed: int, draws: int) -> list[int]:
    """The seeds of the samples that an evaluation keyed by ``seed`` judges, one a draw."""
    return [(FIRST_SAMPLING_SEED + 1000 * seed + k) % SEEDS for k in range(draws)]


class Reference:
    """The fixed side of an evaluation: per draw, points of the target to compare with, others for the floor.

    Reuse one for every method and every ``nfe`` that are to be compared: they then meet the same points (paired),
    and the floor is computed once. Densities: fresh points, ``sliced_n`` for SW_2^2 and the first ``n`` for the rest.
    Finite data: the held-out points (at most n), the floor is as many training points against them; images are
    flattened. Raises ``ValueError`` for n or draws too small, and for finite data without held-out points.
    """

    def __init__(
        self,
        target: Distribution,
        *,
        n: int = 4096,
        draws: int = 3,
        seed: int = 0,
        directions: int = 128,
        sliced_n: int = 100_000,
    ):
        if n < 2 or draws < 1:
            raise ValueError(f"an evaluation needs n >= 2 points and at least one draw; got n={n}, draws={draws}")
        self.target, self.draws, self.seed, self.directions = target, draws, seed, directions
        self.finite = isinstance(target, FiniteData)
        if self.finite and len(target.held_out) < 2:
            raise ValueError(
                f"data set {target.name!r} has {len(target.held_out)} held-out points; samples are judged by points "
                "that training never saw: give it a larger held_out"
            )
        self.n = min(n, len(target)) if self.finite else n
        self.reference_n = min(n, len(target.held_out)) if self.finite else n
        # samples asked for: W_2 takes the first n of them
        self.sample_n = self.n if self.finite else max(self.n, sliced_n)
        self.sampling_seeds = sampling_seeds(seed, draws)

    def points(self, k: int) -> Tensor:
        """What the samples of draw k are compared with, (reference_n or more, d)."""
        generator = generator_for(self.seed, "evaluation reference", k)
        if self.finite:
            return _some(self.target.held_out, self.reference_n, generator)
        return self.target.sample(self.sample_n, generator).flatten(1)

    def others(self, k: int) -> Tensor:
        """Points of the target in the place of the samples, for the floor, (sample_n, d)."""
        generator = generator_for(self.seed, "evaluation floor", k)
        if self.finite:
            return _some(self.target.points, self.sample_n, generator)
        return self.target.sample(self.sample_n, generator).flatten(1)

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Every metric of the samples x against the points y of one draw."""
        few, points = x[: self.n], y[: self.reference_n]
        values = {
            "w2": wasserstein2(few, points),
            "sw2_squared": sliced_w2_squared(x, y, self.directions),
            "energy_distance": energy_distance(few, points),
        }
        if self.target.modes is not None:
            t = self.target
            values |= mode_coverage(few, t.modes, t.mode_radius, t.mode_weights)._asdict()
        return values

    @cached_property
    def floor(self) -> dict[str, list[float]]:
        """Every metric of data against data, one value per draw."""
        return _by_metric([self.measure(self.others(k), self.points(k)) for k in range(self.draws)])

    def describe(self) -> dict:
        """What was compared with what, for the record."""
        what = "held-out points" if self.finite else "fresh draws"
        versus = "training points against held-out points" if self.finite else "fresh draws against fresh draws"
        return {
            "target": self.target.name,
            "reference": f"{self.reference_n} {what} of {self.target.name}",
            "floor": f"{versus}, sizes as for the samples",
            "n": self.n,
            "reference_n": self.reference_n,
            "sliced_n": self.sample_n,
            "draws": self.draws,
            "seed": self.seed,
            "sampling_seeds": self.sampling_seeds,
            "directions": self.directions,
            "w2": f"square root of the exact EMD with squared cost, POT {version('POT')}",
        }


def _some(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """``n`` different points at random, flattened to (n, d)."""
    return points[torch.randperm(len(points), generator=generator)[:n]].flatten(1)


def _by_metric(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def summary(values: Sequence[float]) -> dict:
    """Mean and standard deviation over draws (None for a single one), and the values themselves."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "values": list(values)}


def evaluate_transport(
    sample: Callable[[int, int], Tensor],
    target: Distribution,
    *,
    n: int = 4096,
    draws: int = 3,
    seed: int = 0,
    nfe: int | None = None,
    directions: int = 128,
    sliced_n: int = 100_000,
    reference: Reference | None = None,
) -> dict:
    """Judge samples by fresh points of their target; a plain dict, ready for JSON.

    ``sample(n, seed)`` gives n samples (n, *event). Per metric (w2, sw2_squared, energy_distance and, where the target
    has modes, modes_hit, within_radius, mass_error): mean, std over draws, values, and the floor's mean, std, values.
    ``w2_squared_minus_floor_squared`` pairs each draw with its floor. ``reference`` reuses the target's points and the
    floor of an earlier call; its settings then replace n, draws, seed, directions and sliced_n.
    ``protocol`` records all of it, with the wall-clock ``seconds``. Raises ``ValueError`` for samples that are not
    finite or not of the target's shape.
    """
    started = time.perf_counter()
    if reference is None:
        reference = Reference(target, n=n, draws=draws, seed=seed, directions=directions, sliced_n=sliced_n)
    rows = []
    for k, sampling_seed in enumerate(reference.sampling_seeds):
        x = checked_samples(sample(reference.sample_n, sampling_seed), reference.sample_n, target)
        rows.append(reference.measure(x, reference.points(k)))
    values, floor = _by_metric(rows), reference.floor
    result: dict = {"nfe": nfe}
    for metric in values:
        result[metric] = {**summary(values[metric]), "floor": summary(floor[metric])}
    excess = [w**2 - f**2 for w, f in zip(values["w2"], floor["w2"])]
    result["w2_squared_minus_floor_squared"] = summary(excess)
    result["protocol"] = {**reference.describe(), "seconds": round(time.perf_counter() - started, 2)}
    return result


def checked_samples(x: Tensor, n: int, target: Distribution) -> Tensor:
    """Samples flattened to (n, d) float32 on the CPU; ``ValueError`` for a wrong shape or non-finite values."""
    if tuple(x.shape) != (n, *target.event_shape):
        raise ValueError(
            f"the sampler gave shape {tuple(x.shape)} where {(n, *target.event_shape)} was asked for, "
            f"{n} events of data set {target.name!r}"
        )
    x = x.detach().float().cpu().flatten(1)
    bad = ~x.isfinite().all(dim=1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {n} samples are not finite (NaN or infinite), the first is number "
            f"{int(bad.int().argmax())}: the flow diverged; more network evaluations or a smaller lr may help"
        )
    return x
