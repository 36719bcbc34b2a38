"""Entropic transport as a flow of its own: one Sinkhorn problem, no network, and a map that new points can follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.base import Distribution, FiniteData
from gengrad.data.draws import Stream
from gengrad.flows.entropic_map import EntropicMap
from gengrad.flows.flow import Flow
from gengrad.flows.transports import Transport
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.ot import sinkhorn
from gengrad.registry import METHODS, Settings


class PlanStage(Stage):
    """Nothing to learn: its transport is the map of one plan, solved when it is asked for."""

    name, steps = "entropic_map", 0

    def __init__(self, problem: Problem, config: EntropicMapMethod.Config):
        self.problem, self.config, self.networks, self._told = problem, config, {}, {}

    def objective(self, networks: dict, part: Part, generator: torch.Generator) -> NoReturn:
        raise NotImplementedError("an entropic map has no objective; its stage has no networks")

    @torch.no_grad()
    def transport(self, networks: dict) -> Transport:
        c, p = self.config, self.problem
        x, y = self._points(p.source, "train/source"), self._points(p.target, "train/target")
        solved = sinkhorn(x.flatten(1), y.flatten(1), c.epsilon, c.epsilon_rel, tol=c.tol)
        if not bool(solved.converged):
            raise ValueError(
                f"the plan of method.epsilon={float(solved.epsilon):.3g} did not converge: its map has an error of "
                f"{float(solved.velocity_error):.2g} of the way, and method.tol={c.tol:g} was asked for; take a larger "
                f"method.epsilon_rel (now {c.epsilon_rel:g}), or a larger tol"
            )
        self._told = {
            "effective_neighbours": float(solved.effective_neighbours), "epsilon": float(solved.epsilon),
            "velocity_error": float(solved.velocity_error), "iterations": float(solved.iterations),
        }  # fmt: skip
        return EntropicMap(y, solved.g.float(), float(solved.epsilon), c.stop, c.flow_steps)

    def summary(self) -> dict[str, float]:
        return self._told

    def _points(self, law: Distribution, stream: str) -> Tensor:
        """All of finite data that are not more than ``points``, else as many draws."""
        n, p = self.config.points, self.problem
        whole = isinstance(law, FiniteData) and len(law) <= n
        return (law.points if whole else Stream(law, p.seed, stream).take(0, n)).float().to(p.device)


@METHODS.register("entropic_map")
class EntropicMapMethod(Method):
    """T x = sum_j w_j(x) y_j with the weights of one entropic plan from the source to the data, at any x.

    What NSGF's network learns of one plan with ``target: sample``, in closed form: one Sinkhorn problem of ``points`` a
    side, in place of a training, and no network. It knows what to do with points that the plan has not seen, by the
    plan's potential (``EntropicMap`` has the formula and its source). ``stop`` < 1: it ends on the way, as epsilon -> 0
    in McCann's interpolation. A small epsilon sends every point to one target, a large one to a mean of many. Raises
    ``ValueError`` for a plan that does not converge.
    """

    learns = "nothing"

    class Config(Settings):
        epsilon: float | None = Field(None, gt=0)  # absolute, in units of |x - y|^2 / 2; overrides epsilon_rel
        epsilon_rel: float = Field(0.02, gt=0)  # in units of the mean cost
        tol: float = Field(1e-2, gt=0)  # relative error of the map at which Sinkhorn stops
        points: int = Field(10_000, ge=2)  # of each side, where there are more or a density is given
        stop: float = Field(1.0, gt=0, le=1)
        flow_steps: int = Field(10, ge=1)  # states on the straight way, for pictures and tables

    def plans(self, batch_size: int, source_size: int, target_size: int) -> dict[str, tuple[int, int]]:
        n = self.config.points
        return {f"method.points={n}": (min(source_size or n, n), min(target_size or n, n))}

    def refusals(self, network: dict) -> list[str]:
        return ["an entropic map knows no classes: leave out network.classes"] if network.get("classes") else []

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield PlanStage(problem, self.config)
