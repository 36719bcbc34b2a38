"""The states that an operator is trained on: measures that it has moved so far, each as a cloud with an age."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gengrad.data.draws import generator_for

RISE = 1e-3  # relative rise of a state's energy in a step from which on it is dropped: more than rounding
Push = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Energy = Callable[[Tensor, Tensor, Tensor], Tensor]
Clouds = Callable[[int, torch.Generator], tuple[Tensor, Tensor, Tensor, Tensor]]
Found = Callable[[Tensor, Tensor], Tensor]


class StateBuffer:
    """``size`` clouds x (size, n, d) with log rho (size, n) and the score (size, n, d; NaN where a density is not

    smooth), the ``weight`` of each particle (size, n), their ``age`` in steps and their energy. After a step the score
    is true of the loss's particles alone, and log rho too, but for networks that are told it at the context's.

    ``clouds(count, generator)`` makes fresh ones; ``energy(x, log rho, weight)`` is F of each; ``found(x, log rho)``
    (size, ...) is what a network looks up in clouds, kept until they move. A state lives until its age reaches the
    horizon, or until it goes wrong: then a fresh initial measure takes its place. The first lives have lengths from a
    step to the horizon, so that ages do not march in step afterwards. Everything in it is a function of the seed and of
    the pushes it has seen; ``state`` holds all of it.
    """

    def __init__(self, clouds: Clouds, size: int, energy: Energy, found: Found, seed: int):
        self.clouds, self.seed, self.energy_of, self.found_of = clouds, seed, energy, found
        self.age = torch.zeros(size, dtype=torch.long)
        self.share = (torch.randperm(size, generator=generator_for(seed, "operator/lives")) + 1).double() / size
        self.position = self.filled = self.dropped = self.advanced = 0
        self.x, self.log_rho, self.score, self.weight = self._fresh(size)
        self.energy, self.found = self.energy_of(self.x, self.log_rho, self.weight), found(self.x, self.log_rho)

    def _fresh(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = generator_for(self.seed, "operator/states", self.filled)
        self.filled += 1
        return self.clouds(count, generator)

    def _fill(self, rows: Tensor) -> None:
        """Fresh measures in ``rows``."""
        x, log_rho, score, weight = self._fresh(len(rows))
        self.x[rows], self.log_rho[rows], self.score[rows], self.weight[rows] = x, log_rho, score, weight
        self.age[rows], self.energy[rows] = 0, self.energy_of(x, log_rho, weight)
        self.found[rows] = self.found_of(x, log_rho)

    @torch.no_grad()
    def advance(self, push: Push, count: int, horizon: int, energy_of: Energy | None = None) -> None:
        """Moves the next ``count`` states by one step; ``push(x, log rho, score, found)`` gives the

        first three after.

        A state whose points or densities are not finite, or whose energy rose, is dropped. ``energy_of``: the energy of
        this step, where it is another one than the buffer's.
        """
        rows = torch.arange(self.position, self.position + count) % len(self.x)
        self.position = int(self.position + count) % len(self.x)
        weight = self.weight[rows]  # stays as it is: the particles move with their mass
        x, log_rho, score = push(self.x[rows], self.log_rho[rows], self.score[rows], self.found[rows])
        sound = x.isfinite().all(-1).all(-1) & log_rho.isfinite().all(-1)
        energy = torch.full((len(rows),), math.inf, dtype=torch.float64)
        if sound.any():
            energy[sound] = (energy_of or self.energy_of)(x[sound], log_rho[sound], weight[sound])
        before = energy_of(self.x[rows], self.log_rho[rows], weight) if energy_of else self.energy[rows]
        kept = sound & (energy <= before + RISE * (1 + before.abs()))  # false for NaN too
        self.x[rows[kept]], self.log_rho[rows[kept]], self.score[rows[kept]] = x[kept], log_rho[kept], score[kept]
        self.energy[rows], self.age[rows] = energy, self.age[rows] + 1
        over = self.age[rows] >= (self.share[rows] * horizon).ceil().clamp_min(1)
        self.dropped, self.advanced = self.dropped + int((~kept).sum()), self.advanced + count
        going = kept & ~over
        if going.any():
            self.found[rows[going]] = self.found_of(x[going], log_rho[going])
        ended = rows[~going]
        if len(ended):
            self.share[ended] = 1.0
            self._fill(ended)

    def pick(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` rows, every age that is there equally likely."""
        weights = 1 / torch.bincount(self.age).double()[self.age]
        return torch.multinomial(weights, count, replacement=True, generator=generator)

    def state(self) -> dict:
        names = ("x", "log_rho", "score", "weight", "age", "energy", "share")
        tensors = {name: getattr(self, name).clone() for name in names}
        return tensors | {name: getattr(self, name) for name in ("position", "filled", "dropped", "advanced")}

    def load_state(self, state: dict) -> None:
        weightless = {"weight": torch.ones_like(state["log_rho"])}  # saved before there were weights
        for name, value in (weightless | state).items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        self.found = self.found_of(self.x, self.log_rho)
