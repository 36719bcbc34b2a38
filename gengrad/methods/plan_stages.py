"""What the schemes with transport plans share: a cloud of particles that each step pushes on, networks handed on."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gengrad.data.draws import Keyed, Shuffle, Stream, generator_for
from gengrad.flows.flow import Flow
from gengrad.flows.transports import PlanTransport
from gengrad.functionals.base import Functional
from gengrad.functionals.expression import ParticleExpression, build_expression
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.registry import FUNCTIONALS, Settings


class DescentSettings(Settings):
    """What descends, from where to where in flow time."""

    functional: ParticleExpression = Field([{"name": "riesz_mmd", "r": 1.0}], validate_default=True)
    towards: Literal["data", "nothing"] = "data"  # nothing: the interaction energy alone, the data are its closed form
    tau: float = Field(0.1, gt=0)  # length of one step in flow time
    flow_steps: int = Field(12, ge=1)  # how many steps

    def taus(self) -> list[float]:
        """The lengths of the steps in flow time."""
        return [self.tau] * self.flow_steps

    @model_validator(mode="after")
    def _has_a_target(self):
        for term in self.functional if self.towards == "nothing" else []:
            cls = FUNCTIONALS.get(term["name"])
            if cls.takes == "samples" and not cls.alone:
                raise ValueError(f"{term['name']!r} is nothing without a target: leave out towards=nothing")
        return self


class PlanSettings(DescentSettings):
    """The keys that the backward and the forward scheme share: a network for each step of flow time."""

    pool: int = Field(16_384, ge=2)  # particles carried from step to step
    target_batch: int | None = Field(None, ge=1)  # target points in each objective; none: as many as particles
    warm_start: bool = True  # networks go on from the step before, except from the one that bursts atoms
    # looks (one every 50 optimiser steps, at a fixed batch) without progress until a step ends early: the learning
    # rate then decays to zero over half as many steps as were made; none: every step takes its share of train.steps
    patience: int | None = Field(None, ge=1)


class PlanMethod(Method):
    """``flow_steps`` stages, one network each: every stage starts from the cloud that the ones before have pushed."""

    learns = "plan"
    stage: type[PlanStage]

    def least_nfe(self) -> int:
        return self.config.flow_steps

    def batches(self) -> dict[str, tuple[int, bool]]:
        size = self.config.target_batch
        return {"method.target_batch": (size, False)} if size and self.config.towards == "data" else {}

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        steps, size = self.config.flow_steps, self.config.pool
        cloud = Stream(problem.source, problem.seed, "train/source").take(0, size).to(problem.device)
        share, rest = divmod(problem.steps, steps)
        for number in range(steps):
            network = problem.make_network()
            # the step that bursts atoms is nothing like the second one
            if self.config.warm_start and number > hasattr(problem.source, "atoms"):
                network.load_state_dict(flow.transports[number - 1].network.state_dict())
            yield self.stage(problem, self.config, number, max(1, share + (number < rest)), network, cloud)
            cloud = pushed(flow.transports[number], cloud, problem.seed, number)


@torch.no_grad()
def pushed(transport: PlanTransport, cloud: Tensor, seed: int, number: int, chunk: int = 4096) -> Tensor:
    """The cloud after one more step; each particle meets its own noise, whatever the chunks."""
    starts = range(0, len(cloud), chunk)
    keys = [Keyed(a, min(a + chunk, len(cloud)), seed, f"train/latent/{number}") for a in starts]
    return torch.cat([transport.push(cloud[key.start : key.stop], key) for key in keys])


EVERY, LOOKED_AT, PROGRESS = 50, 1024, 1e-3  # of a plateau: steps between looks, draws, least relative progress


class PlanStage(Stage):
    """One step of flow time: a network net(x, z) on particles of the cloud and fresh latents."""

    def __init__(
        self, problem: Problem, config: PlanSettings, number: int, steps: int, network: nn.Module, cloud: Tensor
    ):
        self.problem, self.config, self.number, self.steps, self.cloud = problem, config, number, steps, cloud
        self.tau = config.taus()[number]
        self.name, self.networks = f"step_{number + 1}", {"plan": network}
        self.order = Shuffle(len(cloud), problem.seed, f"train/cloud/{number}")
        self.target = Stream(problem.target, problem.seed, f"train/target/{number}")
        self.best, self.since = math.inf, 0  # of the looks for a plateau

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        if self.config.patience and part.step % EVERY == 0 and part.piece == 0:
            self._look(part.step)
        rows, device = part.rows(), self.problem.device
        order = self.order.take(part.step * part.size + rows.start, part.step * part.size + rows.stop)
        x = self.cloud[order.to(device)]
        z = torch.randn(part.size, self.networks["plan"].latent, generator=generator)[rows].to(device)
        return self.loss(x, networks["plan"](x, z), self.functional(part))

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """Ends the stage early where the loss at a fixed batch, the same on every process, falls no more."""
        network, x = self.networks["plan"], self.cloud[:LOOKED_AT]
        z = torch.randn(len(x), network.latent, generator=generator_for(self.problem.seed, "train/look", self.number))
        value = float(self.loss(x, network(x, z.to(x)), self.functional(Part(0, LOOKED_AT)))[0])
        if value < self.best - PROGRESS * abs(self.best) or step == 0:
            self.best, self.since = value, 0
        else:
            self.since += 1
        if self.since == self.config.patience:
            self.steps = min(self.steps, step + max(step // 2, 1))  # the schedule reads it: from here the rate decays

    def state(self) -> dict:
        return {"steps": self.steps, "best": self.best, "since": self.since} if self.config.patience else {}

    def load_state(self, state: dict) -> None:
        if state:
            self.steps, self.best, self.since = state["steps"], state["best"], state["since"]

    @abstractmethod
    def loss(self, x: Tensor, v: Tensor, functional: Functional) -> tuple[Tensor, dict[str, float]]:
        """What the step minimises, at particles x (n, *event) and the network's displacements v."""

    def functional(self, part: Part) -> Functional:
        """The functional towards this step's target points: all processes meet the same ones."""
        if self.config.towards == "nothing":
            return build_expression(self.config.functional)
        size = self.config.target_batch or part.size
        y = self.target.take(part.step * size, (part.step + 1) * size)
        return build_expression(self.config.functional, self.problem.target, y.to(self.problem.device))

    def transport(self, networks: dict[str, nn.Module]) -> PlanTransport:
        return PlanTransport(networks["plan"])
