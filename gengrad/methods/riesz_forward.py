"""The neural forward scheme: Wasserstein steepest descent with velocity plans, explicit in flow time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from pydantic import model_validator
from torch import Tensor, nn

from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.flows.flow import Flow
from gengrad.flows.transports import PlanTransport
from gengrad.functionals.riesz import RieszMMD
from gengrad.methods.base import Part, Problem, Stage
from gengrad.methods.plan_stages import PlanMethod, PlanSettings, PlanStage
from gengrad.registry import FUNCTIONALS, METHODS

FLOOR = 1e-2  # added to |v|: the quotient below is of degree 0, and this keeps v from shrinking to nothing
DRAWS = 4096  # particles that the length of the finished step is measured on


class ForwardStage(PlanStage):
    """min DF(v) / (|v| + 1e-2) over v = net(x, z), |v|^2 = E|v|^2; then x + tau max(-DF(v), 0) / |v|^2 v."""

    def loss(self, x: Tensor, v: Tensor, functional: RieszMMD) -> tuple[Tensor, dict[str, float]]:
        derivative, norm = functional.directional_derivative(x, v, of_draws=True), mean_square(v).sqrt()
        return derivative / (norm + FLOOR), {"derivative": float(derivative.detach()), "norm": float(norm.detach())}

    def transport(self, networks: dict[str, nn.Module]) -> PlanTransport:
        return PlanTransport(networks["plan"], self.length(networks["plan"]))

    @torch.no_grad()
    def length(self, network: nn.Module) -> float:
        """tau max(-DF(v), 0) / |v|^2 of the network's v, on many particles; 0 where nothing descends."""
        n = min(DRAWS, len(self.cloud))
        z = torch.randn(n, network.latent, generator=generator_for(self.problem.seed, "train/length", self.number))
        x, functional = self.cloud[:n], self.functional(Part(0, DRAWS))
        v = network(x, z.to(x))
        derivative, square = functional.directional_derivative(x, v, of_draws=True), mean_square(v)
        return self.tau * float((-derivative).clamp_min(0) / square) if square > 0 else 0.0


def mean_square(v: Tensor) -> Tensor:
    """E|v|^2; (n, *event) -> scalar."""
    return v.flatten(1).square().sum(1).mean()


@METHODS.register("riesz_forward")
class RieszForward(PlanMethod):
    """mu_(n+1) = (x + tau max(-DF(v), 0) / |v|^2 v)_#, v = argmin DF(v) / |v| (arXiv 2301.11624, algorithm 2).

    DF is the one-sided directional derivative (``RieszMMD.directional_derivative``). At an atom of mass it is -infinity
    for r < 1, so there is no steepest direction (refused), and 0 for r > 1, so nothing moves (a warning).
    """

    stage = ForwardStage

    class Config(PlanSettings):
        """The shared settings; the functional is ``riesz_mmd`` or ``energy_distance``."""

        @model_validator(mode="after")
        def _has_a_directional_derivative(self):
            term, *more = self.functional
            if more or term["weight"] != 1 or not issubclass(FUNCTIONALS.get(term["name"]), RieszMMD):
                given = " + ".join(f"{t['weight']:g} {t['name']}" for t in self.functional)
                raise ValueError(
                    f"the forward scheme needs the one-sided derivative, which {given!r} does not have: take riesz_mmd "
                    "or energy_distance alone, with weight 1, or method.name=riesz_backward"
                )
            return self

        @property
        def r(self) -> float:
            return self.functional[0]["r"]

    def objections(self, source: Distribution, target: Distribution) -> list[str]:
        r = self.config.r
        if r < 1 and hasattr(source, "atoms"):
            return [
                f"source {source.name!r} has atoms of mass, where the derivative of the Riesz energy with r={r} < 1 is "
                "minus infinity in every splitting direction: there is no steepest one. Take r=1, a source without "
                "atoms, or method.name=riesz_backward, which needs no derivative"
            ]
        return []

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        r = self.config.r
        if r > 1 and hasattr(problem.source, "atoms"):
            warnings.warn(
                f"the forward scheme with r={r} > 1 starts at atoms of mass, where the derivative of the repulsion is "
                "0: they do not split. Take r=1 or method.name=riesz_backward",
                stacklevel=2,
            )
        yield from super().stages(problem, flow)
