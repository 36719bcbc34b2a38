"""How far a cloud is from those that a learned operator was trained on, by a few features of it."""

from __future__ import annotations

import torch
from torch import Tensor


def features(x: Tensor) -> Tensor:
    """What tells clouds apart coarsely, (..., n, d) -> (..., 2 d + 1), float64 on the CPU.

    The mean, the logarithms of the principal standard deviations, that of the kurtosis E|y|^4 / (E|y|^2)^2.
    """
    x = x.double().cpu()
    mean = x.mean(-2)
    away = x - mean[..., None, :]
    variances = torch.linalg.eigvalsh(away.mT @ away / x.shape[-2]).clamp_min(1e-300)
    squared = away.square().sum(-1)
    kurtosis = squared.square().mean(-1) / squared.mean(-1).square().clamp_min(1e-300)
    return torch.cat([mean, variances.log() / 2, kurtosis.clamp_min(1e-300).log()[..., None]], -1)


def family_of(x: Tensor) -> dict:
    """The range of the features of the clouds (clouds, n, d)."""
    found = features(x)
    return {"low": found.amin(0).tolist(), "high": found.amax(0).tolist()}


def outside(family: dict, x: Tensor) -> tuple[float, str]:
    """(how far the cloud x (n, d) lies outside of the family, in widths of it; what lies outside): 0 within."""
    low, high = (torch.tensor(family[name], dtype=torch.float64) for name in ("low", "high"))
    found, d = features(x), x.shape[-1]
    beyond = torch.maximum(low - found, found - high).clamp_min(0) / (high - low).clamp_min(0.2)
    worst = int(beyond.argmax())
    name = f"mean {worst + 1}" if worst < d else "standard deviation" if worst < 2 * d else "kurtosis"
    values = [float(v[worst]) if worst < d else float(v[worst].exp()) for v in (found, low, high)]
    return float(beyond.max()), f"{name} {values[0]:.3g}, in training {values[1]:.3g} to {values[2]:.3g}"
