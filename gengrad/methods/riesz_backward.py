"""The neural backward scheme: JKO steps whose transports are plans, so that mass may split."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from gengrad.functionals.base import Functional
from gengrad.methods.plan_stages import PlanMethod, PlanSettings, PlanStage
from gengrad.registry import METHODS


class BackwardStage(PlanStage):
    """min E|x - T(x, z)|^2 / 2 + tau F(T_# mu_n) over T = x + net(x, z)."""

    def loss(self, x: Tensor, v: Tensor, functional: Functional) -> tuple[Tensor, dict[str, float]]:
        cost = v.flatten(1).square().sum(1).mean() / 2
        value = functional.of_draws(x + v)
        logs = {"transport_cost": float(cost.detach()), "functional": float(value.detach())}
        return cost + self.tau * value, logs


@METHODS.register("riesz_backward")
class RieszBackward(PlanMethod):
    """mu_(n+1) = T_#(mu_n x N(0, I)), T = argmin E|x - T(x, z)|^2 / 2 + tau F(T_#(mu_n x N(0, I))).

    The minimising movement scheme with plans (arXiv 2301.11624, algorithm 1). F is estimated from independent draws
    (x, z), all pairs but those of a draw with itself. For any functional that needs no density.
    """

    stage = BackwardStage

    class Config(PlanSettings):
        """The shared settings. ``growth``: each step is so many times as long as the one before, for flows that slow
        down; implicit steps stay stable however long they are."""

        growth: float = Field(1.0, ge=1)

        def taus(self) -> list[float]:
            return [self.tau * self.growth**k for k in range(self.flow_steps)]
