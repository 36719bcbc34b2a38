"""Nonlinear filtering by the JKO scheme: the flow predicts, an observation multiplies the density by its likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.flows.density_cloud import Cloud
from gengrad.flows.flow import Flow
from gengrad.flows.monotone import MonotoneTransport, reweighting
from gengrad.methods.base import Problem, Stage
from gengrad.methods.jko_icnn import JKOICNN
from gengrad.registry import METHODS


@METHODS.register("jko_filter")
class JKOFilter(JKOICNN):
    """The filter of dX = -grad V dt + sqrt(2 / beta) dW, seen through y = X(t) + N(0, noise^2), on the line.

    Between two observations rho follows the flow of ``functional`` (E V + Ent / beta) in implicit steps; at each one it
    becomes rho L / Z with the likelihood L(x) = N(y; x, noise^2) (arXiv 2106.00736, section 5.4). That update is the
    optimal map from rho to rho L / Z, so that samples, densities and inverses run through the whole filter.
    """

    class Config(JKOICNN.Config):
        observations: list[list[float]] = Field([[0.5, 0.0]], min_length=1)  # pairs [time, value], in order of time
        noise: float = Field(1.0, gt=0)

        @field_validator("observations")
        @classmethod
        def _pairs(cls, observations: list[list[float]]) -> list[list[float]]:
            if any(len(pair) != 2 for pair in observations):
                raise ValueError("each observation is a pair [time, value]")
            times = [time for time, _ in observations]
            if times != sorted(set(times)) or times[0] < 0:
                raise ValueError("the times of the observations must increase, from 0 on")
            return observations

        @model_validator(mode="after")
        def _on_the_grid(self):
            for time, _ in self.observations:
                k = round(time / self.tau)
                if abs(k * self.tau - time) > 1e-6 * max(1.0, time) or k >= self.jko_steps:
                    raise ValueError(
                        f"the observation at time {time:g} is not where one of the {self.jko_steps} steps of "
                        f"{self.tau:g} begins; they end at {self.jko_steps * self.tau:g}"
                    )
            return self

    def least_nfe(self) -> int:
        return self.config.jko_steps + len(self.config.observations)

    def objections(self, source: Distribution, target: Distribution) -> list[str]:
        found = super().objections(source, target)
        if math.prod(source.event_shape) != 1:
            found.append(f"jko_filter is for states on the line; the source has shape {tuple(source.event_shape)}")
        return found

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        c = self.config
        updates = {round(time / c.tau): self._update(time, value) for time, value in c.observations}
        yield from self.steps(problem, flow, updates)

    def _update(self, time: float, value: float):
        """(flow, cloud) -> the map that takes the observation in."""

        def update(flow: Flow, cloud: Cloud) -> MonotoneTransport:
            noise = self.config.noise

            def log_likelihood(x: Tensor) -> Tensor:
                return -(x[:, 0] - value).square() / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))

            low, high = (float(end) for end in (cloud.x.min(), cloud.x.max()))
            reach = 0.25 * (high - low)
            transport, log_z = reweighting(flow.log_density, log_likelihood, low - reach, high + reach)
            after = cloud.through(transport)
            energy = float(after.log_rho.mean())
            transport.record = {"observed": value, "time": time, "log_evidence": log_z, "entropy": energy}
            return transport.to(cloud.x.device)

        return update


def simulate(
    potential: Callable[[Tensor], Tensor],
    beta: float,
    times: list[float],
    noise: float,
    seed: int,
    start: float = 0.0,
) -> list[list[float]]:
    """Observations [time, value] of one path of dX = -grad V dt + sqrt(2 / beta) dW, Euler's method with steps 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    x, t, h, seen = torch.tensor([[start]], dtype=torch.float64), 0.0, 1e-3, []
    for time in times:
        while t < time - h / 2:
            leaf = x.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(potential(leaf).sum(), leaf)
            noise_step = torch.randn(1, 1, generator=generator, dtype=torch.float64)
            x, t = x - h * gradient + math.sqrt(2 * h / beta) * noise_step, t + h
        seen.append([time, float(x) + noise * float(torch.randn((), generator=generator, dtype=torch.float64))])
    return seen
