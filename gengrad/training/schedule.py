"""The learning rate as a pure function of the step: nothing to save, nothing to resume wrongly."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, lr: float, warmup: int, decay: str = "cosine") -> float:
    """lr x min(1, (step + 1) / warmup) x (1 + cos(pi step / steps)) / 2, or without the cosine for ``constant``."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if decay == "constant":
        return lr * ramp
    return lr * ramp * (1 + math.cos(math.pi * step / steps)) / 2
