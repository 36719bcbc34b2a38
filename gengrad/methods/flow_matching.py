"""Flow matching, the baseline: regression on straight lines between coupled source and target points."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gengrad.data.draws import Stream
from gengrad.flows.flow import Flow
from gengrad.flows.transports import VelocityTransport
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.regression import (
    Examples,
    LabelDropout,
    OTDims,
    PlanView,
    classes_in,
    forget_labels,
    matching_loss,
)
from gengrad.ot import exact_assignment
from gengrad.registry import METHODS, Settings


@METHODS.register("flow_matching")
class FlowMatching(Method):
    """min E |u(x_t, t) - (x_1 - x_0)|^2, x_t = (1 - t) x_0 + t x_1, t uniform (Lipman et al. 2023, eq. 9 and 23).

    ``coupling``: ``independent`` pairs, or the exact optimal assignment within each batch (minibatch OT: Tong et al.
    2024, Pooladian et al. 2023). Over several processes each one couples its own rows. With a network that takes
    classes, points are coupled within their class, and ``label_dropout`` of the labels are hidden, for guidance.
    """

    class Config(Settings):
        coupling: Literal["independent", "minibatch_ot"] = "independent"
        ot_dims: OTDims = None  # principal components of the data that the coupling sees; none: all coordinates
        time_exponent: float = Field(1.0, gt=0)  # t = u^time_exponent, u uniform; 1: the papers
        label_dropout: LabelDropout = 0.1

    def plans(self, batch_size: int, source_size: int, target_size: int) -> dict[str, tuple[int, int]]:
        coupled = self.config.coupling == "minibatch_ot"
        return {f"train.batch_size={batch_size}": (batch_size, batch_size)} if coupled else {}

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield StraightStage(problem, self.config)


class StraightStage(Stage):
    """Straight lines between coupled points, on the clock from ``start`` to 1: the one stage of flow matching."""

    name = "flow_matching"

    def __init__(self, problem: Problem, config: FlowMatching.Config, start: float = 0.0):
        self.problem, self.config, self.steps, self.start = problem, config, problem.steps, start
        self.networks = {"velocity": problem.make_network()}
        self.source = Stream(problem.source, problem.seed, "train/source")
        self.target = Stream(problem.target, problem.seed, "train/target")
        self.view = PlanView(problem, config.ot_dims if config.coupling == "minibatch_ot" else None)
        self._seconds = 0.0  # spent on couplings since the last logs
        self._pairs: tuple = (None, ())  # the coupled points of a step, which the pieces of its batch share

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        loss = matching_loss(networks["velocity"], self.examples(part, generator))
        if self.config.coupling == "independent":
            return loss, {}
        seconds, self._seconds = self._seconds, 0.0
        return loss, {"ot_seconds": seconds}

    def examples(self, part: Part, generator: torch.Generator) -> Examples:
        """x_t = (1 - t) x_0 + t x_1 with its velocity x_1 - x_0, t on [start, 1]."""
        x_0, x_1, y = (None if z is None else z[part.within()] for z in self._coupled(part))
        u = torch.rand(part.size, generator=generator)[part.rows()] ** self.config.time_exponent
        t = self.start + (1 - self.start) * u
        s = t.view(-1, *[1] * (x_0.dim() - 1))
        found = Examples((1 - s) * x_0 + s * x_1, t, x_1 - x_0, y)
        classes = self.problem.classes or 0
        found = forget_labels(found, self.config.label_dropout, classes, generator, part.rows(), part.size)
        return found.to(self.problem.device)

    def _coupled(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        """The pairs (x_0, x_1) of this process at this step, and the classes of the x_1 where they matter."""
        share = part.share()
        start, stop = part.step * part.size + share.start, part.step * part.size + share.stop
        if self._pairs[0] != (start, stop):
            x_0, x_1 = self.source.take(start, stop), self.target.take(start, stop)
            y = self.target.labels(start, stop) if self.problem.classes else None
            if self.config.coupling == "minibatch_ot":
                x_1, started = x_1.clone(), time.perf_counter()
                for rows in classes_in(y, len(x_1)):
                    x_1[rows] = x_1[rows][exact_assignment(self.view(x_0[rows]), self.view(x_1[rows]))]
                self._seconds += time.perf_counter() - started
            self._pairs = ((start, stop), (x_0, x_1, y))
        return self._pairs[1]

    def transport(self, networks: dict[str, nn.Module]) -> VelocityTransport:
        return VelocityTransport(networks["velocity"])
