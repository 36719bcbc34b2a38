"""Scikit-learn's 8x8 handwritten digits: 1,797 small images that come with the package, no download."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.base import FiniteData
from gengrad.data.draws import generator_for
from gengrad.registry import DATASETS, Settings


def stratified_split(labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train, held out), sorted; each class gives its share of ``held_out``, largest remainders
    first.

    A pure function of its arguments: the split is part of the data set's definition.
    """
    classes, counts = labels.unique(return_counts=True)
    exact = counts * held_out / len(labels)
    quota = exact.floor().long()
    remainder_first = (exact - quota).argsort(descending=True, stable=True)
    quota[remainder_first[: held_out - int(quota.sum())]] += 1
    chosen = []
    for label, share in zip(classes.tolist(), quota.tolist()):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator_for(seed, "stratified split", label))
        chosen.append(members[order[:share]])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    return (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)


@DATASETS.register("digits")
class Digits(FiniteData):
    """Handwritten digits as images (1, 8, 8) in [-1, 1] (17 grey levels), with labels 0 .. 9 in ``labels``.

    1,497 of the 1,797 train, 300 are held out, stratified by label. Source: E. Alpaydin, C. Kaynak, Optical
    Recognition of Handwritten Digits, UCI Machine Learning Repository, test set, as shipped with
    scikit-learn.
    """

    class Config(Settings):
        held_out: Annotated[int, Field(ge=10, le=1000)] = 300
        split_seed: int = 0
        classes: list[Annotated[int, Field(ge=0, le=9)]] | None = Field(None, min_length=1)  # only these

    def prepare(self) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
        labels = torch.from_numpy(bunch.target).long()
        train, held_out = stratified_split(labels, self.config.held_out, self.config.split_seed)
        if self.config.classes is not None:
            wanted = torch.isin(labels, torch.tensor(self.config.classes))
            train, held_out = train[wanted[train]], held_out[wanted[held_out]]
        self.points, self.labels = images[train], labels[train]
        self.held_out, self.held_out_labels = images[held_out], labels[held_out]
