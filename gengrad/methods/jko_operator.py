"""A learned JKO operator: one network takes a measure to its next JKO step, trained on the step's own objective."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import AliasChoices, Field, ValidationInfo, field_validator, model_validator

from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.data.families import Families
from gengrad.flows.flow import Flow
from gengrad.functionals.expression import (
    Expression,
    is_translation_invariant,
    lacks,
    needs_density,
    refuse_unbounded,
    told,
)
from gengrad.methods.base import Method, Problem, Stage
from gengrad.methods.operator_stage import OperatorStage
from gengrad.networks.set_operator import LARGEST_JACOBIAN
from gengrad.registry import FAMILIES, METHODS, Settings


@METHODS.register("jko_operator")
class JKOOperator(Method):
    """min over theta of E_mu [E |T x - x|^2 / (2 tau) + F(T_# mu)], T x = x + tau g(x; mu), over measures mu

    that are initial ones, or what the operator has made of them so far (Learn to Evolve, arXiv 2601.05583): no solved
    trajectory is needed. Of the paper's abstract: one network from measure to minimiser, the JKO objective as the
    loss, and updates in turn with trajectories of the current operator. The rest is ours: the network, the buffer
    and its rules, the densities carried along. ``docs/operator.md`` says which.

    A measure is a cloud: ``seen`` particles for the context, and ``particles`` others on which the objective is taken.
    """

    learns = "operator"

    class Config(Settings):
        functional: Expression = Field([{"name": "kl", "weight": 1.0}], validate_default=True)
        tau: float = Field(0.1, gt=0)
        # the horizon: how many steps a rollout is trained for, and the flow makes
        jko_steps: int = Field(10, ge=1, validation_alias=AliasChoices("jko_steps", "flow_steps"))
        initial: Families = Field(["gaussians", "mixtures"], validate_default=True)
        particles: int = Field(256, ge=4)
        seen: int | None = Field(None, ge=4)  # particles of the context; none: as many
        # particles of the loss are drawn from Gaussians so many times as wide, and weighed: so tails are learned
        tails: float = Field(1.5, ge=1)
        # steps are corrected by polynomials of at most this degree and by what circulates, those of energies with a
        # density where log densities are known; 0: not at all. It is no part of the training
        correction: int = Field(7, ge=0, le=9)
        anchors: int = Field(1024, ge=4)  # particles of the source that the flow's samples follow
        buffer: int = Field(128, ge=1)  # states that the operator has moved; 0 ages where rollout is false
        fresh: float = Field(0.25, ge=0, le=1)  # least share of initial measures in a batch
        # batches that a fresh measure comes in, on average: in the plane and in space clouds that settle cost more than
        # the update
        reuse: int = Field(1, ge=1)
        curriculum: float = Field(0.4, ge=0, le=1)  # share of the training over which the horizon grows from 1
        rollout: bool = True  # false: initial measures alone, the ablation of the paper
        # for networks that take log densities: the share of the measures that these are told none of, by which they
        # learn to move clouds of unknown density too
        untold: float = Field(0.25, ge=0.01, le=0.99)
        # share of the contexts of smooth measures that are independent points, not even ones
        independent: float = Field(0.0, ge=0, le=1)
        average: bool = True  # states are moved by the averaged weights; false: by the current ones
        taus: list[float] | None = None  # [least, largest] tau to train for, drawn evenly in the logarithm
        # the same of the weight of the functional's term of that name: one operator for a family of energies
        weights: dict[str, list[float]] | None = None
        target_samples: int = Field(256, ge=2)  # of the data, for functionals that compare with samples

        @field_validator("weights")
        @classmethod
        def _in_order(cls, given: dict | None, info: ValidationInfo) -> dict | None:
            """The network is told them by place: in the order of the terms, whatever that of the file."""
            names = [term["name"] for term in info.data.get("functional", ())]
            known = [name for name in names if name in (given or {})]
            return given and {name: given[name] for name in (*known, *given)}

        @model_validator(mode="after")
        def _can_be(self):
            refuse_unbounded(self.functional)
            if self.taus is not None and not (len(self.taus) == 2 and 0 < self.taus[0] <= self.tau <= self.taus[1]):
                raise ValueError(f"taus are [least, largest] around tau={self.tau:g}; got {self.taus}")
            names = [term["name"] for term in self.functional]
            for name, given in (self.weights or {}).items():
                if names.count(name) != 1:
                    raise ValueError(f"weights of {name!r}: the functional has {names.count(name)} terms of that name")
                (own,) = told(self.functional, [name])
                if not (len(given) == 2 and 0 < given[0] <= own <= given[1] < math.inf):
                    raise ValueError(f"weights of {name!r} are [least, largest] around its own, {own:g}; got {given}")
            return self

    def least_nfe(self) -> int:
        return self.config.jko_steps

    def refusals(self, network: dict) -> list[str]:
        c, found = self.config, []
        if c.taus is not None and not network["on_tau"]:
            found.append(f"method.taus={c.taus} asks for several tau, which the network must see: network.on_tau=true")
        if network["on_weights"] != (count := len(c.weights or {})):
            found.append(
                f"method.weights has {count} terms, which the network must be told: network.on_weights={count}"
            )
        if network["log_density"] and not needs_density(c.functional):
            found.append("network.log_density=true: the functional is one of particles, whose density nobody carries")
        if network["translation_equivariant"] and not is_translation_invariant(c.functional):
            found.append(
                "network.translation_equivariant=true: the operator would not see where a measure is, and this "
                "functional depends on that; internal and interaction energies alone do not"
            )
        return found

    def objections(self, source: Distribution, target: Distribution) -> list[str]:
        c, shape, found = self.config, tuple(target.event_shape), []
        if len(shape) != 1:
            return [f"jko_operator moves clouds of points (d,), not events of shape {shape}"]
        if needs_density(c.functional) and shape[0] > LARGEST_JACOBIAN:
            found.append(
                f"the functional needs a density, and log det DT is written out up to d = {LARGEST_JACOBIAN}; here "
                f"d = {shape[0]}: take jko_icnn, or functionals of particles (potential, interaction, energy_distance)"
            )
        for family in c.initial:
            try:
                FAMILIES.build(family).members(1, shape[0], generator_for(0, "operator/check"))
            except ValueError as error:  # a family of another dimension
                found.append(f"method.initial: {error}")
        return found + lacks(c.functional, target)

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield OperatorStage(problem, self.config)
