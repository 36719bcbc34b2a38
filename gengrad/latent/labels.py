"""Properties that an autoencoder learns to tell from its codes: a way through the codes is then one through them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gengrad.data.draws import generator_for
from gengrad.latent.settings import AutoencoderSettings
from gengrad.latent.surrogate import Scale
from gengrad.molecules.workers import Workers
from gengrad.registry import SCORERS

WIDTH = 128  # of the head, which no codec keeps


def labels_of(smiles: Sequence[str], settings: AutoencoderSettings, processes: int = 1) -> Tensor:
    """Standardised properties (n, k), float32; NaN where one has no value, and beside the ``labelled`` molecules.

    Those in [0, 1] through their logit. Raises ``ValueError`` for a property without a value for any molecule.
    """
    names, n = settings.properties, len(smiles)
    if not names:
        return torch.empty(n, 0)
    order = torch.randperm(n, generator=generator_for(settings.seed, "autoencoder/labelled"))
    chosen = order[: settings.labelled].sort().values.tolist()
    workers = Workers("score", {"scorers": [{"name": name} for name in names]}, processes)
    raw = torch.full((n, len(names)), math.nan)
    for i, answer in zip(chosen, workers.map([smiles[i] for i in chosen])):
        if answer.problem is None:
            raw[i] = torch.tensor(answer.value["values"], dtype=torch.float32)
    for name, values in zip(names, raw.T):
        if values.isnan().all():
            raise ValueError(f"autoencoder.properties: {name} has no value for any molecule")
    unit = torch.tensor([SCORERS.get(name).unit_interval for name in names])
    return Scale.of(raw, unit)(raw)


def head_of(latent: int, properties: int) -> nn.Module:
    """Predicts standardised properties (n, k) from codes (n, latent); of none, nothing that could be trained."""
    if not properties:
        return nn.Identity()
    return nn.Sequential(nn.Linear(latent, WIDTH), nn.SiLU(), nn.Linear(WIDTH, properties))


def label_loss(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error over what has a label: (n, k), (n, k) -> (); 0 where nothing has."""
    if not labels.shape[1]:
        return labels.new_zeros(())
    known = ~labels.isnan()
    return (predicted - labels.nan_to_num(0.0)).square().mul(known).sum() / known.sum().clamp_min(1)
