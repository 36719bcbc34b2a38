"""NSGF++: a few Sinkhorn steps, a network that tells the time, then straight lines to the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gengrad.data.draws import Stream, generator_for
from gengrad.flows.flow import Flow
from gengrad.flows.phased import PhasedTransport
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.flow_matching import FlowMatching, StraightStage
from gengrad.methods.nsgf import NSGF, SinkhornStage
from gengrad.methods.regression import matching_loss
from gengrad.networks.time_predictor import TimePredictor
from gengrad.registry import METHODS


@METHODS.register("nsgf_pp")
class NSGFPlusPlus(Method):
    """Algorithms 2-4 of Neural Sinkhorn Gradient Flow (arXiv 2401.14069), on the geodesic clock.

    1. w(x, t): velocity of the Sinkhorn flow, regressed on its particle paths from 0 to ``until`` (``nsgf``);
    2. t_phi: the time predictor, min E |t_phi((1 - t) x_0 + t x_1) - t|^2;
    3. u(x, t): straight flow on independent pairs (``flow_matching``).

    Sampling: at most ``flow_steps`` Euler steps of w, tau = t_phi of the result per sample, then u from tau to 1. With
    ``shared_network`` one network learns w before ``until`` and u after it, and the predictor only checks the clock.
    """

    class Config(NSGF.Config):
        flow_steps: int = Field(5, ge=1, le=5)
        functional: None = None  # its first phase is that of the Sinkhorn divergence
        stop: float = Field(1.0, ge=1, le=1)  # its straight phase goes to the data
        until: float = Field(0.5, gt=0, lt=1)  # where on the clock the Sinkhorn phase ends
        # the straight flow is trained this much before `until` as well, for samples that the predictor places earlier;
        # 1: on the whole clock, as in the paper, at the price of capacity
        margin: float = Field(0.15, ge=0, le=1)
        shared_network: bool = False
        # pairs of the straight phase. independent: the paper's; plan: those of the Sinkhorn phase, so that its lines go
        # on where that phase ends
        straight_pairs: Literal["independent", "plan"] = "independent"
        warm_start: bool = False  # the straight network starts from the Sinkhorn phase's weights; two networks only
        tau: float | None = Field(None, ge=0, lt=1)  # start of the straight flow for all samples; none: predicted
        sinkhorn_share: float = Field(0.5, gt=0, lt=1)  # of the steps; two networks only
        predictor_share: float = Field(0.05, gt=0, lt=1)  # of the steps
        predictor: TimePredictor.Config = TimePredictor.Config()

        @model_validator(mode="after")
        def _one_clock(self):
            if self.shared_network and self.tau not in (None, self.until):
                raise ValueError("a shared network changes its field at `until`: leave out tau")
            if self.straight_pairs == "plan" and self.pool != "geodesic":
                raise ValueError("straight_pairs=plan are the ends of geodesic paths: use pool=geodesic")
            return self

        @property
        def earliest(self) -> float:
            """From where on the straight flow is trained."""
            return self.until if self.shared_network else max(0.0, self.until - self.margin)

    batches, plans, refusals, objections = NSGF.batches, NSGF.plans, NSGF.refusals, NSGF.objections

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        c = self.config
        told = max(1, round(c.predictor_share * problem.steps))
        moved = max(1, problem.steps - told)
        first = moved if c.shared_network else max(1, round(c.sinkhorn_share * moved))
        stage = SharedStage if c.shared_network else SinkhornPhase
        yield stage(replace(problem, steps=first), c)
        yield PredictorStage(replace(problem, steps=told), c, flow)
        if not c.shared_network:
            yield StraightPhase(replace(problem, steps=max(1, moved - first)), c, flow)


def phased(config: NSGFPlusPlus.Config, network: nn.Module, **parts) -> PhasedTransport:
    """The transport with the parts that are trained so far."""
    c = config
    settings = {"until": c.until, "earliest": c.earliest, "most": c.flow_steps, "fixed_tau": c.tau}
    if c.shared_network:
        settings["fixed_tau"] = c.until  # the predictor is a check there
    return PhasedTransport(network, shared=c.shared_network, **settings, **parts)


def straight_lines(problem: Problem, config: NSGFPlusPlus.Config) -> SinkhornStage | StraightStage:
    """The straight flow on [``earliest``, 1]: uniform times on lines between independent pairs or the plan's."""
    if config.straight_pairs == "plan":
        return SinkhornStage(problem, config.model_copy(update={"time_exponent": 1.0}), 1.0, config.earliest)
    return StraightStage(problem, FlowMatching.Config(label_dropout=config.label_dropout), config.earliest)


# ------------------------------------------------------------------ 1


class SinkhornPhase(SinkhornStage):
    """Stage 1: E |w(x_t, t) - v / (1 - t)|^2 on the particle paths of the Sinkhorn flow, t in [0, until]."""

    name = "sinkhorn_phase"

    def __init__(self, problem: Problem, config: NSGFPlusPlus.Config):
        super().__init__(problem, config, config.until)

    def transport(self, networks: dict[str, nn.Module]) -> PhasedTransport:
        return phased(self.config, networks["velocity"])


class SharedStage(Stage):
    """Stages 1 and 3 in one network: ``until`` of each batch's rows from the Sinkhorn paths, the others straight."""

    name = "shared_network"

    def __init__(self, problem: Problem, config: NSGFPlusPlus.Config):
        self.config, self.steps = config, problem.steps
        self.networks = {"velocity": problem.make_network()}
        own = replace(problem, make_network=lambda: self.networks["velocity"])
        self.straight: StraightStage | None = None
        if config.straight_pairs == "plan":  # the paths simply go on to 1
            self.sinkhorn = SinkhornStage(own, config, 1.0)
            return
        rows = max(1, round(config.until * problem.batch_size))
        self.sinkhorn = SinkhornStage(replace(own, batch_size=rows), config, config.until)
        self.straight = straight_lines(own, config)

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        if self.straight is None:
            return self.sinkhorn.objective(networks, part, generator)
        pieces = part.world * part.pieces
        first = max(1, round(self.config.until * part.size / pieces)) * pieces
        before = self.sinkhorn.examples(replace(part, size=first), generator)
        after = self.straight.examples(replace(part, size=part.size - first), generator)
        return matching_loss(networks["velocity"], before + after), self.sinkhorn.logs()

    def transport(self, networks: dict[str, nn.Module]) -> PhasedTransport:
        return phased(self.config, networks["velocity"])


# ------------------------------------------------------------------ 2


class PredictorStage(Stage):
    """Stage 2: E |t_phi(x_t) - t|^2 with x_t = (1 - t) x_0 + t x_1, independent pairs, t uniform on [0, 1]."""

    name = "time_predictor"
    replaces = True

    def __init__(self, problem: Problem, config: NSGFPlusPlus.Config, flow: Flow):
        self.problem, self.config, self.steps, self.flow = problem, config, problem.steps, flow
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(problem.seed, "init/predictor").initial_seed())
            predictor = TimePredictor(config.predictor, event_shape=tuple(problem.target.event_shape))
        self.networks = {"predictor": predictor}
        self.source = Stream(problem.source, problem.seed, "train/source")
        self.target = Stream(problem.target, problem.seed, "train/target")

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        rows = part.rows()
        start, stop = part.step * part.size + rows.start, part.step * part.size + rows.stop
        x_0, x_1 = self.source.take(start, stop), self.target.take(start, stop)
        t = torch.rand(part.size, generator=generator)[rows]
        s = t.view(-1, *[1] * (x_0.dim() - 1))
        device = self.problem.device
        error = networks["predictor"](((1 - s) * x_0 + s * x_1).to(device)) - t.to(device)
        return error.square().mean(), {"time_error": float(error.detach().abs().mean())}

    def transport(self, networks: dict[str, nn.Module]) -> PhasedTransport:
        return phased(self.config, self.flow.transports[-1].network, predictor=networks["predictor"])


# ------------------------------------------------------------------ 3


class StraightPhase(Stage):
    """Stage 3: E |u(x_t, t) - (x_1 - x_0)|^2 on straight lines, t uniform on [until - margin, 1]."""

    name = "straight_phase"
    replaces = True

    def __init__(self, problem: Problem, config: NSGFPlusPlus.Config, flow: Flow):
        self.config, self.steps, self.flow = config, problem.steps, flow
        self.lines = straight_lines(problem, config)
        self.networks = self.lines.networks
        if config.warm_start:
            self.networks["velocity"].load_state_dict(flow.transports[-1].network.state_dict())

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        return self.lines.objective(networks, part, generator)

    def transport(self, networks: dict[str, nn.Module]) -> PhasedTransport:
        before = self.flow.transports[-1]
        return phased(self.config, before.network, predictor=before.predictor, straight=networks["velocity"])
