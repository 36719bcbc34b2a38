"""Image scores from features: Frechet and kernel distance, Inception score (torchmetrics), precision and recall."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from gengrad.data.draws import generator_for
from gengrad.evaluation.classifier import cache_folder, fingerprint
from gengrad.evaluation.features import Extractor, Features
from gengrad.files import write_atomically

KEPT = 10_000  # features of which kernel distance, precision and recall are computed
NEIGHBOURS = 3
EXACT = "donot_use_mm_for_euclid_dist"  # a point is at distance 0 from itself, or it would miss its own ball
ROWS = 1024  # of a matrix of distances at once
ALONE = {"sync_on_compute": False}  # torchmetrics would wait for other processes, which have nothing to add


@dataclass
class Statistics:
    """Sums over features in float64, which add: ``n``, sum_i f_i (d,), sum_i f_i f_i' (d, d); and the first features.

    mean = s / n, covariance = (S - n mean mean') / (n - 1).
    """

    n: int = 0
    total: Tensor | None = None
    outer: Tensor | None = None
    kept: list[Features] = field(default_factory=list)
    _reaches: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def add(self, features: Features) -> None:
        self._reaches.clear()
        x = features.x.double()
        total, outer = x.sum(0), x.T @ x
        self.total = total if self.total is None else self.total + total
        self.outer = outer if self.outer is None else self.outer + outer
        room = max(0, KEPT - self.n)
        if room:
            self.kept.append(Features(features.x[:room], None if features.logits is None else features.logits[:room]))
        self.n += len(x)

    @classmethod
    def of(cls, batches: Iterable[Features]) -> Statistics:
        found = cls()
        for batch in batches:
            found.add(batch)
        return found

    @property
    def features(self) -> Tensor:
        """The first 10,000 features (n, d)."""
        return torch.cat([batch.x for batch in self.kept])

    def reach(self, k: int) -> Tensor:
        """The distance (m,) from each of the first 10,000 features to its k-th neighbour among them, computed once."""
        if k not in self._reaches:
            y = self.features.float()
            near = [torch.cdist(z, y, compute_mode=EXACT).kthvalue(k + 1, dim=1).values for z in y.split(ROWS)]
            self._reaches[k] = torch.cat(near)
        return self._reaches[k]

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d)."""
        mean = self.total / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


class _Given(nn.Module):
    """To torchmetrics an extractor; what it is given are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}), by torchmetrics in float64 (Heusel et al. 2017, eq. 6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(a.n, b.n) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images on either side; got {a.n} and {b.n}")
    metric = FrechetInceptionDistance(feature=_Given(len(a.total)), **ALONE)
    for side, s in (("real", b), ("fake", a)):
        setattr(metric, f"{side}_features_sum", s.total)
        setattr(metric, f"{side}_features_cov_sum", s.outer)
        setattr(metric, f"{side}_features_num_samples", torch.tensor(s.n))
    metric.orig_dtype = torch.float64  # torchmetrics gives the result in the type of the last features
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that compute comes before update: the sums are set above
        return float(metric.compute())


def kernel_distance(a: Statistics, b: Statistics, seed: int = 0) -> float:
    """KID: squared MMD of the kernel (x'y / d + 1)^3, mean over 100 pairs of subsets (Binkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = a.features, b.features
    size = min(1000, len(x), len(y))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # it draws from the global generator
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        torch.manual_seed(generator_for(seed, "KID").initial_seed())
        metric = KernelInceptionDistance(feature=_Given(x.shape[1]), subsets=100, subset_size=size, **ALONE)
        metric.update(x, real=False)
        metric.update(y, real=True)
        return float(metric.compute()[0])


def inception_score(a: Statistics, seed: int = 0) -> float | None:
    """exp E KL(p(y | x) || p(y)), mean over 10 splits (Salimans et al. 2016); None for features without logits."""
    if any(batch.logits is None for batch in a.kept):
        return None
    from torchmetrics.image.inception import InceptionScore

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        torch.manual_seed(generator_for(seed, "inception score").initial_seed())
        metric = InceptionScore(feature=_Given(1), splits=min(10, a.n), **ALONE)
        metric.update(torch.cat([batch.logits for batch in a.kept]).double())
        return float(metric.compute()[0])


def precision_recall(a: Statistics, b: Statistics, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of samples a within the manifold of the data b, and of b within that of a (Kynkaanniemi et al. 2019).

    A manifold is the union of the balls around its points that reach to their k-th neighbour; k is 3, as there, or the
    largest that so few points have.
    """
    return _covered(a, b, k), _covered(b, a, k)


def _covered(a: Statistics, b: Statistics, k: int) -> float:
    """The share of the points a inside a ball around a point of b."""
    x, y, radius = a.features.float(), b.features.float(), b.reach(min(k, min(b.n, KEPT) - 1))
    inside = [(torch.cdist(z, y, compute_mode=EXACT) <= radius).any(1) for z in x.split(ROWS)]
    return float(torch.cat(inside).float().mean())


def reference_statistics(images: Tensor, extract: Extractor) -> Statistics:
    """Statistics of uint8 images (n, c, h, w), cached by the images and by the extractor.

    A cached file that cannot be read is made anew.
    """
    file = cache_folder() / f"statistics-{fingerprint(images)[:16]}-{extract.key[:16]}.safetensors"
    try:
        stored = load_file(file)
        features = Features(stored["features"], stored.get("logits"))
        return Statistics(int(stored["n"]), stored["total"], stored["outer"], [features])
    except (OSError, SafetensorError, KeyError):
        pass
    found = Statistics.of(extract(some) for some in images.split(1000))
    tensors = {"n": torch.tensor(found.n), "total": found.total, "outer": found.outer, "features": found.features}
    if found.kept[0].logits is not None:
        tensors["logits"] = torch.cat([batch.logits for batch in found.kept])
    write_atomically(Path(file), tensors_to_bytes({name: t.contiguous() for name, t in tensors.items()}))
    return found


def image_scores(samples: Statistics, reference: Statistics, extract: Extractor) -> dict[str, float]:
    """Every score of samples against a reference, under the names that the extractor gives them."""
    precision, recall = precision_recall(samples, reference)
    found = {
        extract.distance: frechet_distance(samples, reference),
        extract.kernel: kernel_distance(samples, reference),
        extract.score: inception_score(samples),
        "precision": precision,
        "recall": recall,
    }
    return {name: value for name, value in found.items() if value is not None}
