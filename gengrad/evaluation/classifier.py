"""A small classifier trained on the data themselves, whose features stand in where Inception's cannot be had."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from gengrad.data.base import FiniteData
from gengrad.data.draws import Shuffle, generator_for
from gengrad.data.images import as_bytes, as_floats
from gengrad.files import write_atomically

RECIPE = "1"  # raised when anything below changes what is trained
WIDTHS = (32, 64, 128)
SEED, BATCH, LR = 0, 128, 3e-3


def cache_folder() -> Path:
    """Where classifiers and reference statistics are kept: $GENGRAD_CACHE, or ~/.cache/gengrad."""
    return Path(os.environ.get("GENGRAD_CACHE") or Path.home() / ".cache" / "gengrad")


def fingerprint(images: Tensor, labels: Tensor | None = None) -> str:
    """SHA-256 of uint8 images (n, c, h, w) and their labels."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy())
    if labels is not None:
        digest.update(labels.contiguous().numpy())
    return digest.hexdigest()


class Classifier(nn.Module):
    """Three strided 3x3 convolutions with batch norm, the mean over all places (128 features), and a linear layer."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((channels, *WIDTHS), WIDTHS):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features (n, 128), logits (n, classes)) of images in [-1, 1]."""
        features = self.body(x).mean(dim=(2, 3))
        return features, self.head(features)


def steps_for(n: int) -> int:
    """Five epochs, but at least 400 steps and at most 2,000."""
    return min(max(5 * n // BATCH, 400), 2000)


def train_classifier(images: Tensor, labels: Tensor, classes: int) -> Classifier:
    """A classifier of uint8 images, a function of them, the recipe and the seed alone (up to rounding)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(SEED, "classifier").initial_seed())
        network = Classifier(images.shape[1], classes)
    steps, order = steps_for(len(images)), Shuffle(len(images), SEED, "classifier")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for step in range(steps):
        rows = order.take(step * BATCH, (step + 1) * BATCH)
        loss = F.cross_entropy(network(as_floats(images[rows]))[1], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of uint8 images whose largest logit is their label's."""
    hits = [(network(as_floats(x))[1].argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000))]
    return float(torch.stack(hits).sum()) / len(images)


def classifier_of(data: FiniteData) -> tuple[Classifier, dict]:
    """The classifier of a data set, from the cache or trained now, with {"accuracy", "key", "description", ...}.

    A cached file that cannot be read is made anew. Raises ``ValueError`` for data without labels.
    """
    if getattr(data, "labels", None) is None or getattr(data, "held_out_labels", None) is None:
        raise ValueError(
            f"data set {data.name!r} has no labels, so no classifier can be trained on it; use --features inception or "
            "identity"
        )
    images, labels = as_bytes(data.points), data.labels
    classes = int(labels.max()) + 1
    key = hashlib.sha256(f"{RECIPE} {SEED} {fingerprint(images, labels)}".encode()).hexdigest()
    file = cache_folder() / f"classifier-{key[:16]}.safetensors"
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and then replaced
        network = Classifier(images.shape[1], classes)
    hit = _stored(network, file)
    if hit is None:
        network = train_classifier(images, labels, classes)
        hit = accuracy(network, as_bytes(data.held_out), data.held_out_labels)
        content = tensors_to_bytes(dict(network.state_dict()), metadata={"accuracy": repr(hit), "key": key})
        write_atomically(file, content)
    widths = "-".join(map(str, WIDTHS))
    return network.eval(), {
        "description": f"3 strided 3x3 convolutions ({widths}), batch norm, mean over places, trained on the "
        f"{len(images):,} training images of {data.name} for {steps_for(len(images)):,} steps of {BATCH}, seed {SEED}",
        "accuracy": hit,
        "accuracy_on": f"{len(data.held_out_labels):,} held-out images",
        "key": key,
        "file": str(file),
    }


def _stored(network: Classifier, file: Path) -> float | None:
    """Puts the weights of a cached file into ``network``; its accuracy, or None where the file cannot be read."""
    try:
        with safe_open(file, "pt") as stored:
            network.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
            return float(stored.metadata()["accuracy"])
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError):
        return None
