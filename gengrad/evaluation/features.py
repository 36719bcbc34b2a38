"""Feature extractors of image scores: Inception, a classifier of the data themselves, or the pixels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gengrad.data.base import FiniteData
from gengrad.data.images import as_floats
from gengrad.evaluation.classifier import cache_folder, classifier_of
from gengrad.files import sha256_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class Features(NamedTuple):
    """``x`` (n, d) and, where the extractor is a classifier, ``logits`` (n, classes); float32 on the CPU."""

    x: Tensor
    logits: Tensor | None


class Extractor(nn.Module):
    """Bytes to features. ``key``: all that its features depend on.

    ``distance``, ``kernel`` and ``score`` are what the Frechet distance, the kernel distance and the exponential of the
    mutual information of its features are called: FID, KID and IS are names for those of Inception alone.
    """

    kind: str
    key: str
    distance: str
    kernel: str
    score: str

    def describe(self) -> dict:
        """What it is, for the record."""
        return {"features": self.kind, "key": self.key}

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Features:
        """Features of bytes (n, c, h, w), in full precision also where the samples are drawn in a lower one."""
        device = next((p.device for p in self.parameters()), images.device)
        with torch.autocast(device.type, enabled=False):
            return self.features(images.to(device))

    def features(self, images: Tensor) -> Features:
        """Features of bytes on the device of the weights."""
        raise NotImplementedError


class IdentityFeatures(Extractor):
    """The pixels themselves, in [-1, 1]: the Frechet distance is that of two Gaussians fitted to the images."""

    kind, key = "identity", "identity"
    distance, kernel, score = "FD-pixels", "KD-pixels", ""

    def features(self, images: Tensor) -> Features:
        return Features(as_floats(images).flatten(1), None)


class ClassifierFeatures(Extractor):
    """The last features of a small classifier trained on the same data. Its distance is never to be called FID."""

    kind = "classifier"
    distance, kernel, score = "FD-classifier", "KD-classifier", "score-classifier"

    def __init__(self, data: FiniteData):
        super().__init__()
        self.network, self.about = classifier_of(data)
        self.key = self.about["key"]

    def describe(self) -> dict:
        return {"features": self.kind, **self.about}

    def features(self, images: Tensor) -> Features:
        features, logits = self.network(as_floats(images))
        return Features(features.cpu(), logits.cpu())


class InceptionFeatures(Extractor):
    """torch-fidelity's port of the Inception of published FIDs: uint8 in, its own resizing without antialiasing.

    Raises ``FileNotFoundError`` without the weights and ``ValueError`` where they are not the ones: they are a pickle,
    which is opened only after its SHA-256 was compared.
    """

    kind, key = "inception", INCEPTION_SHA256
    distance, kernel, score = "FID", "KID", "IS"

    def __init__(self, file: Path | None = None):
        super().__init__()
        self.file = inception_weights(file)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(self.file)
        )

    def describe(self) -> dict:
        return {"features": self.kind, "weights": INCEPTION_FILE, "sha256": INCEPTION_SHA256, "antialias": False}

    def features(self, images: Tensor) -> Features:
        images = images.expand(-1, 3, -1, -1)  # grey ones as colour
        parts = [self.network(some) for some in images.split(100)]
        return Features(torch.cat([p[0] for p in parts]).cpu(), torch.cat([p[1] for p in parts]).cpu())


def inception_weights(file: Path | None = None) -> Path:
    """The checked weights file: ``file``, else $GENGRAD_INCEPTION, else the one in the cache folder."""
    asked = file or os.environ.get("GENGRAD_INCEPTION")
    place = Path(asked) if asked else cache_folder() / INCEPTION_FILE
    if not place.is_file():
        raise FileNotFoundError(
            f"FID needs the weights of Inception, and there is no file {place}. Get {INCEPTION_URL} (95,628,359 bytes, "
            f"SHA-256 {INCEPTION_SHA256}) and put it there, or name it with --inception FILE. Without it: "
            "--features classifier trains a small classifier on the data and reports FD-classifier, which is no FID"
        )
    found = sha256_of(place)
    if found != INCEPTION_SHA256:
        raise ValueError(
            f"{place} is not torch-fidelity's Inception: its SHA-256 is {found}, not {INCEPTION_SHA256}. It was not "
            f"opened. Get it again from {INCEPTION_URL}"
        )
    return place


KINDS = ("inception", "classifier", "identity")


def extractor(kind: str, data: FiniteData, inception: Path | None = None) -> Extractor:
    """The extractor called ``kind`` for a data set; raises ``ValueError`` for an unknown one."""
    if kind == "inception":
        return InceptionFeatures(inception)
    if kind == "classifier":
        return ClassifierFeatures(data)
    if kind == "identity":
        return IdentityFeatures()
    raise ValueError(f"unknown features {kind!r}; known: {', '.join(KINDS)}")
