"""The particle flow of any functional as a flow of its own: no network, the truth that learned schemes approximate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NoReturn

import torch
from pydantic import AliasChoices, Field, model_validator

from gengrad.data.base import Distribution, FiniteData
from gengrad.data.draws import Keyed, Stream
from gengrad.flows.cloud import ParticleCloud, growing_taus, without_entropy
from gengrad.flows.flow import Flow
from gengrad.flows.transports import Transport
from gengrad.functionals.expression import Expression, build_expression, lacks, takes
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.registry import FUNCTIONALS, METHODS, Settings, settings_of

FAR = 1e4  # times the source's extent: so far no flow goes, but explicit steps that diverge do


class ParticleStage(Stage):
    """Nothing to learn: its transport is the flow of ``particles`` particles, computed when it is asked for."""

    name, steps = "particles", 0

    def __init__(self, problem: Problem, config: Particles.Config):
        self.problem, self.config, self.networks = problem, config, {}

    def objective(self, networks: dict, part: Part, generator: torch.Generator) -> NoReturn:
        raise NotImplementedError("the particle flow has no objective; its stage has no networks")

    @torch.no_grad()
    def transport(self, networks: dict) -> Transport:
        c, p = self.config, self.problem
        x = Stream(p.source, p.seed, "train/source").take(0, c.particles).to(p.device)
        samples = self._samples().to(p.device) if takes(c.functional, "samples") else x[:0]
        data = settings_of(p.target) if takes(c.functional, "density") else None
        atoms = hasattr(p.source, "atoms")
        taus = growing_taus(c.tau * c.flow_steps, c.flow_steps) if atoms else [c.tau] * c.flow_steps
        made = ParticleCloud(x[None, :0], samples, taus, c.functional, data, c.spread if atoms else 0.0)
        functional, noise, memory = made.forces()[0], Keyed(0, len(x), p.seed, "train/latent"), {}
        states = [made.start(x, noise)]
        for k in range(c.flow_steps):
            states.append(made.step(states[-1], k, functional.velocity(states[-1], memory), noise))
            reach = float(states[-1].abs().max())
            if not reach <= FAR * (1 + float(states[0].abs().max())):
                raise ValueError(
                    f"particles: after step {k + 1} of {c.flow_steps} one is {reach:.3g} from the origin: explicit "
                    f"steps this long do not follow the flow; take a smaller method.tau (now {c.tau:g}), or jko_icnn, "
                    "whose steps are implicit"
                )
        return ParticleCloud(torch.stack(states[:-1]), samples, taus, c.functional, data, made.spread)

    def _samples(self) -> torch.Tensor:
        """The target's points: none, all of small finite data, else as many draws as there are particles."""
        target, n = self.problem.target, self.config.particles
        if self.config.towards == "nothing":
            return torch.empty(0, *target.event_shape)
        if isinstance(target, FiniteData) and len(target) <= n:
            return target.points
        return Stream(target, self.problem.seed, "train/target").take(0, n)


@METHODS.register("particles")
class Particles(Method):
    """Explicit Euler on particles, X^(k+1) = X^k + tau_k v(X^k), v the functional's velocity; samples follow the cloud.

    An entropy T Ent gives every particle noise of variance 2 T tau_k a step: then it is unadjusted Langevin, and ``kl``
    is Langevin sampling of the data's density. Other internal energies have no velocity on particles and are refused.
    From atoms of mass the steps grow like 1, 3, 5, ... with the same sum, for an atom bursts at unit speed at once.
    """

    learns = "nothing"

    class Config(Settings):
        functional: Expression = Field([{"name": "sinkhorn_divergence"}], validate_default=True)
        towards: Literal["data", "nothing"] = "data"  # nothing: the interaction energy alone, of riesz_mmd
        tau: float = Field(0.1, gt=0)  # length of one step in flow time
        # also under the name that jko_icnn gives them, so that a config changes its method by one word
        flow_steps: int = Field(10, ge=1, validation_alias=AliasChoices("flow_steps", "jko_steps"))
        particles: int = Field(2000, ge=2)
        spread: float = Field(1e-4, gt=0)  # standard deviation of the noise that tells particles of one atom apart

        @model_validator(mode="after")
        def _acts_on_particles(self):
            for term in self.functional:
                cls = FUNCTIONALS.get(term["name"])
                if getattr(cls, "needs_density", False):
                    without_entropy(build_expression([term]))
                if self.towards == "nothing" and cls.takes == "samples" and not cls.alone:
                    raise ValueError(f"{term['name']!r} is nothing without a target: leave out towards=nothing")
            return self

    def objections(self, source: Distribution, target: Distribution) -> list[str]:
        c = self.config
        return lacks([t for t in c.functional if c.towards == "data" or not takes([t], "samples")], target)

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield ParticleStage(problem, self.config)
