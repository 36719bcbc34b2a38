"""What a flow does to a population, step by step, measured on what comes out and not on what the surrogate hopes."""

from __future__ import annotations

import torch
from torch import Tensor

from gengrad.flows.flow import Flow
from gengrad.functionals.riesz import EnergyDistance
from gengrad.latent.codec import Codec
from gengrad.latent.population import Population, population, start, states
from gengrad.latent.surrogate import Surrogate, rank_correlation
from gengrad.molecules.metrics import METRICS, Described, describe
from gengrad.molecules.objective import Objective

ENOUGH = 1000  # points that divergences are taken between


class Observer:
    """Judges the populations of one flow in the order of its steps.

    ``known``: the molecules of the data, which are not novel; ``calls``: how many of them were scored to fit the
    surrogate, from which the scorer's calls go on counting: each different molecule once.
    """

    def __init__(self, codec: Codec, objective: Objective, surrogate: Surrogate, known: set[str], calls: int):
        self.codec, self.objective, self.surrogate = codec, objective, surrogate
        self.known, self.calls, self.seen = known, calls, set()
        self.first: Population | None = None

    def row(self, found: Population) -> dict:
        """One line of steps.csv; NaN where there is nothing to measure."""
        self.first = self.first or found
        texts = [found.smiles[i] for i in found.valid]
        new = set(texts) - self.seen - self.known
        self.seen |= new
        self.calls += len(new)
        described, true = describe(texts, ()), found.scores.total
        x = found.x[found.valid]
        expected, spare = (self.surrogate.scores(self.objective, x, spare).double() for spare in (False, True))
        scored = ~true.isnan()
        properties = zip(self.objective.labels, found.scores.properties.T)
        medians = {f"median_{label}": _median(values) for label, values in properties}
        return {
            "step": found.step,
            "molecules": len(found),
            "true_mean": _mean(true),
            "true_median": _median(true),
            "surrogate_mean": _mean(expected),
            "spare_mean": _mean(spare),
            "rank_correlation": rank_correlation(true[scored], expected[scored]) if scored.sum() > 1 else torch.nan,
            "off_manifold": self._off_manifold(found),
            "validity": len(found.valid) / len(found),
            "uniqueness": len(set(texts)) / max(1, len(texts)),
            "novelty": len(set(texts) - self.known) / max(1, len(set(texts))),
            "internal_diversity": _metric("internal_diversity", described),
            "passed": int(found.scores.passed.sum()),
            "divergence": divergence(found.x, self.first.x),
            "moved": float((found.x - self.first.x).square().sum(1).mean().sqrt()),
            "calls": self.calls,
            **medians,
        }

    def _off_manifold(self, found: Population) -> float:
        """Mean |enc(dec x) - x| / sqrt(latent) over the molecules that the autoencoder can read again.

        Whitened codes have a coordinate variance of one: 1.4 is the distance of two molecules that have nothing to do
        with each other.
        """
        rows = self.codec.rows([found.smiles[i] for i in found.valid], processes=0)
        kept = [(i, row) for i, row in zip(found.valid, rows) if not isinstance(row, ValueError)]
        if not kept:
            return torch.nan
        again = self.codec.encode([row for _, row in kept])
        away = (again - found.x[[i for i, _ in kept]]).norm(dim=1).mean()
        return float(away / self.codec.latent**0.5)


def divergence(x: Tensor, y: Tensor) -> float:
    """The energy distance E|x - y| - E|x - x'|/2 - E|y - y'|/2 of two clouds (at most 1000 points of each)."""
    with torch.no_grad():
        return float(EnergyDistance(y[:ENOUGH].double())(x[:ENOUGH].double()))


def along(
    flow: Flow, observer: Observer, n: int, seed: int, *, nfe: int | None = None, processes: int = 1, say=lambda text: 0
) -> tuple[Population, Population, list[dict]]:
    """(population before, population after, a row for each step): n molecules of the source on their way."""
    x, parents = start(flow, n, seed)
    rows, first, last = [], None, None
    for step, here in enumerate(states(flow, x, seed, nfe)):
        last = population(observer.codec, observer.objective, observer.surrogate, here, parents, step, seed, processes)
        first = first or last
        rows.append(observer.row(last))
        row = rows[-1]
        say(
            f"step {step}: true {row['true_median']:.3f} (median), surrogate {row['surrogate_mean']:.3f}, spare "
            f"{row['spare_mean']:.3f}, unique {row['uniqueness']:.1%}, diversity {row['internal_diversity']:.3f}, "
            f"off manifold {row['off_manifold']:.2f}"
        )
    return first, last, rows


def _metric(name: str, described: Described) -> float:
    metric = METRICS.build({"name": name})
    metric.update(described)
    return float(metric.compute())


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if len(values) else torch.nan


def _median(values: Tensor) -> float:
    """Of the values that are not NaN, the mean of the two in the middle for an even number."""
    values = values[~values.isnan()]
    return float(values.double().quantile(0.5)) if len(values) else torch.nan
