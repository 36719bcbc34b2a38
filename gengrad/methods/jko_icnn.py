"""The JKO scheme with input-convex networks: one convex potential for each implicit step, densities carried along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NoReturn

from pydantic import AliasChoices, Field, model_validator
from torch import nn

from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.flows.density_cloud import Cloud
from gengrad.flows.flow import Flow, load
from gengrad.flows.gradient import GradientTransport
from gengrad.flows.operator import operator_of
from gengrad.functionals.base import Functional
from gengrad.functionals.expression import Expression, build_expression, lacks, needs_density, refuse_unbounded, takes
from gengrad.methods import jko_warm as warm
from gengrad.methods.base import Method, Problem, Stage
from gengrad.methods.jko_stage import JKOStage
from gengrad.registry import METHODS, Settings

SCORED = 32_768  # particles whose score is carried along, and trained on where the functional has a density


@METHODS.register("jko_icnn")
class JKOICNN(Method):
    """u_{k+1} = argmin over convex u of F((grad u)_# rho_k) + E |grad u(x) - x|^2 / (2 tau), rho_{k+1} its image

    (JKO-ICNN, arXiv 2106.00774; Large-Scale Wasserstein Gradient Flows, arXiv 2106.00736). One stage for each of
    ``jko_steps`` steps of length ``tau`` in flow time; ``train.steps`` are shared out over them, and the learning rate
    decays within each. The particles and their log densities live in a cloud that is pushed once a step.

    A step begins at the best map that is affine beyond the potential of the step before (``start: affine``), which
    is exact where everything is Gaussian; one whose relative optimality residual is below ``tol`` then is not trained.
    What training leaves is kept where the objective on the cloud says that it is better than the start.
    """

    learns = "potential"

    class Config(Settings):
        functional: Expression = Field([{"name": "kl", "weight": 1.0}], validate_default=True)
        tau: float = Field(0.1, gt=0)
        # also under the name that other methods give them, so that a config changes its method by one word
        jko_steps: int = Field(10, ge=1, validation_alias=AliasChoices("jko_steps", "flow_steps"))
        start: Literal["affine", "identity"] = "affine"
        cloud: int = Field(100_000, ge=2)  # particles that are carried along and trained on
        affine_cloud: int = Field(32_768, ge=2)  # of them, for the affine start; fewer for a costly functional
        outposts: int = Field(0, ge=0)  # particles further out, beside those trained on: they teach the tails
        init_from_operator: str | None = None  # a run of jko_operator, whose steps the potentials start from
        fit: int = Field(200, ge=1)  # optimiser steps of the fit to the operator's map
        tol: float = Field(1e-4, ge=0)  # E|residual|^2 / E|velocity|^2 at which a step counts as solved; 0: never
        target_samples: int = Field(2048, ge=2)  # of the data, for functionals that compare with samples

        @model_validator(mode="after")
        def _has_minima(self):
            refuse_unbounded(self.functional)
            return self

    def least_nfe(self) -> int:
        return self.config.jko_steps

    def objections(self, source: Distribution, target: Distribution) -> list[str]:
        found = warm.objections(self.config, tuple(target.event_shape)) + lacks(self.config.functional, target)
        if needs_density(self.config.functional) and not hasattr(source, "log_density"):
            found.append(
                f"the functional needs a density, and source {source.name!r} has none: start from a source with a log "
                "density (normal, gaussian, gaussian_mixture, uniform), or use functionals of particles"
            )
        return found

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield from self.steps(problem, flow, {})

    def steps(self, problem: Problem, flow: Flow, updates: dict[int, Callable]) -> Iterator[Stage]:
        """The stages; ``updates[k](flow, cloud)`` gives a transport that comes before step k, with no training."""
        functional, position = self._functional_of(problem), 0
        carried = Carried(problem, self.config.cloud, self.config.outposts)
        start = self.config.init_from_operator
        operator = warm.told_for(operator_of(load(start, problem.device)), self.config.functional) if start else None
        for k in range(self.config.jko_steps):
            if k in updates:
                if position == len(flow.transports):
                    flow.transports.append(updates[k](flow, carried.up_to(flow)))
                position += 1
            if position < len(flow.transports):
                yield Finished(k)  # by an earlier call
            else:
                yield JKOStage(problem, self.config, functional, carried.up_to(flow), k, _last_network(flow), operator)
            position += 1

    def _functional_of(self, problem: Problem) -> Callable[[Distribution], Functional]:
        """target -> the functional towards it; the samples that it may take are the same for all."""
        c = self.config
        samples = None
        if takes(c.functional, "samples"):
            samples = problem.target.sample(c.target_samples, generator_for(problem.seed, "functional/target"))
            samples = samples.to(problem.device)
        return lambda target: build_expression(c.functional, target, samples)


class Carried:
    """The cloud at the end of a flow that grows: pushed once by each transport, from the source on when resumed."""

    def __init__(self, problem: Problem, size: int, outposts: int):
        self.problem, self.size, self.outposts, self.count, self.cloud = problem, size, outposts, 0, None

    def up_to(self, flow: Flow) -> Cloud:
        if self.cloud is None:
            p = self.problem
            self.cloud = Cloud.of(p.source, self.size, p.seed, SCORED, p.device, self.outposts)
        for transport in flow.transports[self.count :]:
            self.cloud = self.cloud.through(transport)
        self.count = len(flow.transports)
        return self.cloud


def _last_network(flow: Flow) -> nn.Module | None:
    return next((t.network for t in reversed(flow.transports) if isinstance(t, GradientTransport)), None)


class Finished(Stage):
    """A step whose transport is in the flow already."""

    networks: dict = {}
    steps = 0

    def __init__(self, k: int):
        self.name = f"step_{k + 1}"

    def objective(self, *arguments: object) -> NoReturn:
        raise RuntimeError(f"{self.name} has been trained already")

    transport = objective
