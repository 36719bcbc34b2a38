"""Flow matching, the baseline: regression on straight lines between coupled source and target points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gengrad.data.draws import Stream
from gengrad.flows.flow import Flow
from gengrad.flows.transports import VelocityTransport
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.ot import exact_assignment
from gengrad.registry import METHODS, Settings


@METHODS.register("flow_matching")
class FlowMatching(Method):
    """min E |u(x_t, t) - (x_1 - x_0)|^2, x_t = (1 - t) x_0 + t x_1, t uniform (Lipman et al. 2023, eq. 9 and 23).

    ``coupling``: ``independent`` pairs, or the exact optimal assignment within each batch (minibatch OT: Tong et al.
    2024, Pooladian et al. 2023). Over several processes each one couples its own rows.
    """

    class Config(Settings):
        coupling: Literal["independent", "minibatch_ot"] = "independent"
        time_exponent: float = Field(1.0, gt=0)  # t = u^time_exponent, u uniform; 1: the papers

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield StraightStage(problem, self.config)


class StraightStage(Stage):
    """The one stage of flow matching."""

    name = "flow_matching"

    def __init__(self, problem: Problem, config: FlowMatching.Config):
        self.problem, self.config, self.steps = problem, config, problem.steps
        self.networks = {"velocity": problem.make_network()}
        self.source = Stream(problem.source, problem.seed, "train/source")
        self.target = Stream(problem.target, problem.seed, "train/target")

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        rows = part.rows()
        start, stop = part.step * part.size + rows.start, part.step * part.size + rows.stop
        x_0, x_1 = self.source.take(start, stop), self.target.take(start, stop)
        t = torch.rand(part.size, generator=generator)[rows] ** self.config.time_exponent
        if self.config.coupling == "minibatch_ot":
            x_1 = x_1[exact_assignment(x_0.flatten(1), x_1.flatten(1))]
        x_0, x_1, t = (z.to(self.problem.device) for z in (x_0, x_1, t))
        s = t.view(-1, *[1] * (x_0.dim() - 1))
        x_t, u = (1 - s) * x_0 + s * x_1, x_1 - x_0
        return (networks["velocity"](x_t, t) - u).square().mean(), {}

    def transport(self, networks: dict[str, nn.Module]) -> VelocityTransport:
        return VelocityTransport(networks["velocity"])
