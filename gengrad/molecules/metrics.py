"""What a population of molecules is like: torchmetrics with tensor states, so that they add up over processes.

A batch is described once (``describe``) and given to any number of metrics:

    described = describe(smiles)
    metric = METRICS.build({"name": "uniqueness"}); metric.update(described); metric.compute()
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torchmetrics import Metric

from gengrad.molecules.described import USUAL, Described, describe, describers
from gengrad.registry import METRICS, Settings

__all__ = ["METRICS", "USUAL", "Described", "describe", "describers", "tanimoto", "wasserstein_1"]

ROWS = 512  # fingerprints compared at once: bounds the memory, changes no result beyond rounding


def tanimoto(a: Tensor, b: Tensor) -> Tensor:
    """|A and B| / |A or B| of bit vectors (n, bits), (m, bits) -> (n, m); 1 for two empty ones."""
    a, b = a.float(), b.float()
    common = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - common
    return torch.where(union > 0, common / union.clamp(min=1), torch.ones_like(common))


class MoleculeMetric(Metric):
    """Base: ``update(described)`` gathers one of its tensors, ``compute`` gives a float64 scalar, NaN of nothing.

    ``reference`` is the population that it is compared with, for the metrics that say ``compares``.
    """

    full_state_update = False
    compares = False
    gathers = "molecules"  # the field of Described that is kept

    class Config(Settings):
        """No settings of its own."""

    def __init__(self, config: Settings | None = None, reference: Described | None = None, **settings):
        super().__init__()
        self.config = config if config is not None else self.Config(**settings)
        if self.compares and reference is None:
            raise ValueError(f"metric {self.name!r} compares with a population: give reference=describe(smiles)")
        self.reference = reference
        self.add_state("gathered", default=[], dist_reduce_fx="cat")

    def field(self, described: Described) -> Tensor:
        return getattr(described, self.gathers)

    def update(self, described: Described) -> None:
        self.gathered.append(self.field(described))

    def all(self) -> Tensor:
        """Everything gathered, over all batches and processes."""
        parts = self.gathered if isinstance(self.gathered, list) else [self.gathered]
        return torch.cat(parts) if parts else torch.empty(0)

    def compute(self) -> Tensor:
        x = self.all()
        return self.of(x) if len(x) else torch.tensor(float("nan"), dtype=torch.float64)

    def of(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@METRICS.register("validity")
class Validity(MoleculeMetric):
    """The share of strings that are molecules."""

    gathers = "valid"

    def of(self, x):
        return x.double().mean()


@METRICS.register("uniqueness")
class Uniqueness(MoleculeMetric):
    """Different molecules over valid ones, among the first ``first`` of them if given (Polykovskiy et al. 2020)."""

    class Config(Settings):
        first: int | None = Field(None, ge=1)

    def of(self, x):
        x = x[: self.config.first]
        return torch.tensor(len(x.unique()) / len(x), dtype=torch.float64)


@METRICS.register("novelty")
class Novelty(MoleculeMetric):
    """Of the different valid molecules, the share that the reference does not have."""

    compares = True

    def of(self, x):
        return (~torch.isin(x.unique(), self.reference.molecules.to(x.device))).double().mean()


@METRICS.register("internal_diversity")
class InternalDiversity(MoleculeMetric):
    """1 - (mean over all pairs, each with itself too, of Tanimoto^p)^(1/p) (Benhenda 2017; MOSES' IntDiv_p)."""

    gathers = "fingerprints"

    class Config(Settings):
        p: int = Field(1, ge=1)

    def of(self, x):
        p = self.config.p
        total = sum(tanimoto(rows, x).double().pow(p).sum() for rows in x.split(ROWS))
        return 1 - (total / len(x) ** 2) ** (1 / p)


@METRICS.register("nearest_similarity")
class NearestSimilarity(MoleculeMetric):
    """Mean Tanimoto similarity to the nearest molecule of the reference (MOSES' SNN)."""

    gathers, compares = "fingerprints", True

    def of(self, x):
        reference = self.reference.fingerprints.to(x.device)
        return torch.cat([tanimoto(rows, reference).amax(1) for rows in x.split(ROWS)]).double().mean()


@METRICS.register("scaffold_diversity")
class ScaffoldDiversity(MoleculeMetric):
    """Different Murcko scaffolds over valid molecules; all molecules without rings share one."""

    gathers = "scaffolds"

    def of(self, x):
        return torch.tensor(len(x.unique()) / len(x), dtype=torch.float64)


class Cosine(MoleculeMetric):
    """Base: <a, b> / |a| |b| of how often each thing comes here and in the reference."""

    compares = True

    def of(self, x):
        y = self.field(self.reference).to(x.device)
        known, place = torch.cat([x, y]).unique(return_inverse=True)
        a, b = (torch.bincount(part, minlength=len(known)).double() for part in place.split([len(x), len(y)]))
        return (a @ b) / (a.norm() * b.norm())


@METRICS.register("scaffold_cosine")
class ScaffoldCosine(Cosine):
    """The cosine of the counts of Murcko scaffolds (MOSES' Scaff)."""

    gathers = "scaffolds"


@METRICS.register("fragment_cosine")
class FragmentCosine(Cosine):
    """The cosine of the counts of BRICS fragments (MOSES' Frag)."""

    gathers = "fragments"


@METRICS.register("circles")
class Circles(MoleculeMetric):
    """How many molecules further than ``distance`` apart a greedy pass finds (Xie et al. 2023, a lower bound).

    Distance is 1 - Tanimoto. The order counts, so figures of several processes agree with one only if the order does.
    """

    gathers = "fingerprints"

    class Config(Settings):
        distance: float = Field(0.75, ge=0, lt=1)

    def of(self, x):
        kept = x[:1]
        for row in x[1:].split(1):
            if 1 - tanimoto(row, kept).max() > self.config.distance:
                kept = torch.cat([kept, row])
        return torch.tensor(float(len(kept)), dtype=torch.float64)


class PropertyMetric(MoleculeMetric):
    """Base of what looks at one property; ``property`` is the name of a scorer that was described."""

    class Config(Settings):
        property: str = "qed"

    def field(self, described):
        known = described.properties
        if self.config.property not in known:
            raise ValueError(
                f"metric {self.name!r}: {self.config.property!r} was not described; there are "
                f"{', '.join(known)}. Name it: describe(smiles, properties=[...])"
            )
        values = known[self.config.property]
        return values[~values.isnan()]


@METRICS.register("property_mean")
class PropertyMean(PropertyMetric):
    """The mean of a property over valid molecules."""

    def of(self, x):
        return x.mean()


@METRICS.register("property_median")
class PropertyMedian(PropertyMetric):
    """The median of a property over valid molecules; of an even number the mean of the two in the middle."""

    def of(self, x):
        return x.quantile(0.5)


@METRICS.register("property_wasserstein")
class PropertyWasserstein(PropertyMetric):
    """W1 of a property here and in the reference: int |F - G|, in the property's unit."""

    compares = True

    def of(self, x):
        return wasserstein_1(x, self.field(self.reference).to(x))


@METRICS.register("filters")
class Filters(PropertyMetric):
    """The share of valid molecules without a structural alert: ``alerts`` is 0 (MOSES' Filters, with RDKit's own)."""

    class Config(Settings):
        property: str = "alerts"

    def of(self, x):
        return (x == 0).double().mean()


@METRICS.register("property_kl")
class PropertyKL(PropertyMetric):
    """KL(reference || here) of a property, both as Gaussian kernel density estimates with Scott's bandwidth.

    int p log(p / q) over the reference's range widened by its deviation, on 1,000 points, q floored at 1e-10 (the
    descriptors' part of GuacaMol's KL score, which is the mean of exp(-KL)). NaN where either has no spread.
    """

    compares = True

    def of(self, x):
        y = self.field(self.reference).to(x)
        if len(x) < 2 or len(y) < 2 or x.std() == 0 or y.std() == 0:
            return torch.tensor(math.nan, dtype=torch.float64)
        t = torch.linspace((y.min() - y.std()).item(), (y.max() + y.std()).item(), 1000, dtype=torch.float64)
        p, q = (kernel_density(part.double(), t).clamp(min=1e-10) for part in (y, x))
        p, q = p / p.sum(), q / q.sum()
        return (p * (p / q).log()).sum()


def kernel_density(x: Tensor, t: Tensor) -> Tensor:
    """1 / (n h) sum_i N((t - x_i) / h) of a sample (n,) at points (m,), h = std n^(-1/5)."""
    h = x.std() * len(x) ** -0.2
    parts = [torch.exp(-(((t[:, None] - rows[None]) / h) ** 2) / 2).sum(1) for rows in x.split(ROWS)]
    return sum(parts) / (len(x) * h * math.sqrt(2 * math.pi))


def wasserstein_1(x: Tensor, y: Tensor) -> Tensor:
    """int |F(t) - G(t)| dt of two samples (n,), (m,) of numbers."""
    t = torch.cat([x, y]).sort().values
    below = [torch.searchsorted(part.sort().values, t[:-1], right=True).double() / len(part) for part in (x, y)]
    return ((below[0] - below[1]).abs().to(t) * t.diff()).sum()
