"""The particle flow of a Riesz MMD as a flow of its own: no network, the truth that the learned schemes approximate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field, model_validator

from gengrad.data.base import FiniteData
from gengrad.data.draws import Keyed, Stream
from gengrad.flows.cloud import RieszCloud, growing_taus
from gengrad.flows.flow import Flow
from gengrad.flows.particles import particle_flow
from gengrad.flows.transports import Transport
from gengrad.functionals.riesz import RieszMMD
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.plan_stages import DescentSettings, functional_at
from gengrad.registry import FUNCTIONALS, METHODS


class ParticleStage(Stage):
    """Nothing to learn: its transport is the flow of ``particles`` particles, computed when it is asked for."""

    name, steps = "particles", 0

    def __init__(self, problem: Problem, config: RieszParticles.Config):
        self.problem, self.config, self.networks = problem, config, {}

    def objective(self, networks: dict, part: Part, generator: torch.Generator):
        raise NotImplementedError("the particle flow has no objective; its stage has no networks")

    def transport(self, networks: dict) -> Transport:
        c, problem = self.config, self.problem
        x = Stream(problem.source, problem.seed, "train/source").take(0, c.particles).to(problem.device)
        total, atoms = c.tau * c.flow_steps, hasattr(problem.source, "atoms")
        y = x[:0] if c.towards == "nothing" else self._target().to(problem.device)
        taus = growing_taus(total, c.flow_steps) if atoms else c.taus()
        r = c.functional["r"]
        start = RieszCloud(x[None, :0], y, taus, r, spread=c.spread if atoms else 0.0)
        x = start.start(x, Keyed(0, len(x), problem.seed, "train/latent/0"))
        flowed = particle_flow(functional_at(c.functional, y if len(y) else None), x, taus)
        return RieszCloud(flowed.states[:-1].contiguous(), y, taus, r, start.spread)

    def _target(self) -> torch.Tensor:
        """The target's points: all of small finite data, else as many draws as there are particles."""
        target, n = self.problem.target, self.config.particles
        if isinstance(target, FiniteData) and len(target) <= n:
            return target.points
        return Stream(target, self.problem.seed, "train/target").take(0, n)


@METHODS.register("riesz_particles")
class RieszParticles(Method):
    """Explicit Euler on particles, X^(k+1) = X^k + tau_k v(X^k) with v of ``RieszMMD``; samples follow the cloud.

    From atoms of mass the steps grow like 1, 3, 5, ... with the same sum, for an atom bursts at unit speed at once.
    """

    learns = "nothing"

    class Config(DescentSettings):
        particles: int = Field(2000, ge=2)
        spread: float = Field(1e-4, gt=0)  # standard deviation of the noise that tells particles of one atom apart

        @model_validator(mode="after")
        def _is_riesz(self):
            if not issubclass(FUNCTIONALS.get(self.functional["name"]), RieszMMD):
                raise ValueError(
                    f"riesz_particles follows riesz_mmd or energy_distance, not {self.functional['name']!r}"
                )
            return self

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield ParticleStage(problem, self.config)
