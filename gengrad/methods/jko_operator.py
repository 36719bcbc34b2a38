"""A learned JKO operator: one network takes a measure to its next JKO step, trained on the step's own objective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from pydantic import AliasChoices, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.data.families import Families, clouds
from gengrad.flows.density_cloud import standing_for
from gengrad.flows.flow import Flow
from gengrad.flows.operator import OperatorTransport, energies_of, family_of, push, rollout
from gengrad.flows.transports import Transport
from gengrad.functionals.base import Density, Functional
from gengrad.functionals.expression import (
    Expression,
    build_expression,
    gradient_of,
    has_pairs,
    is_translation_invariant,
    lacks,
    needs_density,
    refuse_unbounded,
    reweighted,
    takes,
    told,
)
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.jko_affine import JKOProblem
from gengrad.methods.state_buffer import StateBuffer
from gengrad.networks.kernels import Marks
from gengrad.networks.set_operator import FOLD, LARGEST_JACOBIAN, determinant, log_without_folds
from gengrad.registry import FAMILIES, METHODS, Settings, settings_of

SEEN = 256  # fresh measures by which the range of the training family is told
EVERY = 8  # optimiser steps between two pushes of a part of the buffer


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
        anchors: int = Field(1024, ge=4)  # particles of the source that the flow's samples follow
        buffer: int = Field(128, ge=1)  # states that the operator has moved; 0 ages where rollout is false
        fresh: float = Field(0.25, ge=0, le=1)  # least share of initial measures in a batch
        curriculum: float = Field(0.4, ge=0, le=1)  # share of the training over which the horizon grows from 1
        rollout: bool = True  # false: initial measures alone, the ablation of the paper
        # for networks that take log densities: the share of the measures that these are told none of, so that they
        # move clouds of unknown density too
        untold: float = Field(0.25, gt=0, le=1)
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


def step_loss(
    jko: JKOProblem, x: Tensor, y: Tensor, log_rho: Tensor | None = None, log_det: Tensor | None = None
) -> Tensor:
    """E |y - x|^2 / (2 tau) + F of the particles y = T x, the mean over measures; x, y (measures, n, d).

    ``log_rho``, ``log_det`` (measures, n): log rho(x) and log det DT(x), for functionals with a density.
    """
    if not has_pairs(jko.functional):  # a mean over particles: that over all measures at once
        flat = [None if v is None else v.flatten(0, 1) for v in (x, y, log_rho, log_det)]
        return jko.objective(*flat) / jko.tau
    empty = [None] * len(x)
    rows = zip(x, y, empty if log_rho is None else log_rho, empty if log_det is None else log_det)
    return torch.stack([jko.objective(*row) for row in rows]).mean() / jko.tau


def loss_by_log_det(
    jko: JKOProblem, network: nn.Module, x: Tensor, seen: Tensor, log_rho: Tensor,
    known: Tensor | Marks | None = None,
) -> Tensor:  # fmt: skip
    """``step_loss`` through log det DT: for any density, also one that ends at an edge. ``known``: log rho of ``seen``,

    for networks that take it.
    """
    y, jacobian = network(x, seen, jko.tau, jko.weights, jacobian=True, log_density=known)
    return step_loss(jko, x, y, log_rho, log_without_folds(determinant(jacobian)))


def loss_by_score(
    jko: JKOProblem, network: nn.Module, x: Tensor, seen: Tensor, log_rho: Tensor, moved: Tensor, det: Tensor,
    after: Tensor, weight: Tensor, known: Tensor | Marks | None = None,
) -> Tensor:  # fmt: skip
    """``step_loss`` with the gradient E <(T x - x) / tau + grad dF/drho'(T x), dT>, internal energies by parts.

    On average that is the gradient through log det, for smooth densities on all of space; but at the minimum it is
    zero particle by particle. ``moved``, ``det``, ``after``: T x, det DT and the score there, of ``pushed_density``;
    ``weight`` (measures, n): of the particles in the mean.
    """
    flat = [values.flatten(0, 1) for values in (moved, log_rho - det.log(), after)]
    field = gradient_of(jko.functional, flat[0], Density(flat[1], flat[2])).view_as(x) + (moved - x) / jko.tau
    slope = (weight * (field * network(x, seen, jko.tau, jko.weights, log_density=known)).sum(-1)).mean()
    with torch.no_grad():
        value = step_loss(jko, *(taken(values, evened(weight)) for values in (x, moved, log_rho, det.log())))
    return value + slope - slope.detach()


def _rows(values: Tensor | Marks | None, which: Tensor) -> Tensor | Marks | None:
    return values.rows(which) if isinstance(values, Marks) else None if values is None else values[which]


def evened(weight: Tensor) -> Tensor:
    """Numbers (measures, n) of particles that weigh the same, for those of ``weight`` (measures, n).

    Systematic resampling with the middle of each nth: where all weights are the same, each particle once.
    """
    n = weight.shape[-1]
    shares = weight.double().cumsum(-1)
    places = (torch.arange(n, dtype=torch.float64, device=weight.device) + 0.5) / n
    return torch.searchsorted(shares / shares[..., -1:], places.expand_as(shares).contiguous()).clamp_max(n - 1)


def taken(values: Tensor, numbers: Tensor) -> Tensor:
    """The particles of these numbers (measures, n) of values (measures, n) or (measures, n, d)."""
    return torch.take_along_dim(values, numbers if values.dim() == 2 else numbers[..., None], 1)


def pushed_density(
    network: nn.Module, x: Tensor, seen: Tensor, jko: JKOProblem, score: Tensor,
    known: Tensor | Marks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(T x, det DT, grad log rho'(T x)) for x and score (measures, n, d), detached; the context that of ``seen``,

    ``known`` (measures, m) its log densities.

    log rho'(T x) = log rho(x) - log det DT(x), so that grad log rho'(T x) = DT^{-T} (score - grad log det DT).
    """
    if not bool(score.isfinite().any()):  # no measure is smooth
        with torch.no_grad():
            moved, jacobian = network(x, seen, jko.tau, jko.weights, jacobian=True, log_density=known)
        return moved, determinant(jacobian), score
    with torch.no_grad():
        context = network.context(seen, jko.tau, jko.weights, known)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        moved, jacobian = network(leaf, context, jacobian=True)
        det = determinant(jacobian)
        (slope,) = torch.autograd.grad(det.clamp_min(FOLD).log().sum(), leaf)
    jacobian, det = jacobian.detach(), det.detach()
    # a singular matrix is that of a fold, whose density is not used: anything that can be solved will do
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    safe = torch.where((det.abs() < 1e-6)[..., None, None], eye, jacobian)
    return moved.detach(), det, torch.linalg.solve(safe.mT, (score - slope)[..., None])[..., 0]


def _between(low: float, high: float, generator: torch.Generator) -> float:
    """Drawn evenly in the logarithm."""
    return math.exp(math.log(low) + math.log(high / low) * float(torch.rand((), generator=generator)))


class OperatorStage(Stage):
    """The operator's training: batches of measures, of which the buffer's grow older as the operator moves them."""

    name = "operator"

    def __init__(self, problem: Problem, config: JKOOperator.Config):
        self.problem, self.config, self.steps = problem, config, problem.steps
        network = problem.make_network().to(problem.device)
        self.networks, self.averages = {"operator": network}, {}
        self.samples = torch.empty(0, *problem.target.event_shape)
        if takes(config.functional, "samples"):
            generator = generator_for(problem.seed, "functional/target")
            self.samples = problem.target.sample(config.target_samples, generator)
        self.functional = self._functional(config.functional)
        self.d, self.seen = problem.target.event_shape[0], config.seen or config.particles
        self.size = self.seen + config.particles
        self.states = StateBuffer(self._clouds, config.buffer, self._energy, problem.seed)

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        if self.config.rollout and part.piece == 0 and part.step and part.step % EVERY == 0:
            self._advance(part)
        *batch, ages = self._batch(part, generator)
        jko, network = self._problem(generator), networks["operator"]
        seen, (x, log_rho, score, weight) = batch[0][:, : self.seen], (values[:, self.seen :] for values in batch)
        known = self._known(batch[1], self._told(part.size, generator)[part.rows()])
        if not jko.needs_density:
            loss = step_loss(jko, x, network(x, seen, jko.tau, jko.weights))
        elif has_pairs(jko.functional):
            loss = loss_by_log_det(jko, network, x, seen, log_rho, known)
        else:
            loss = self._mixed(jko, network, x, seen, log_rho, score, weight, known)
        dropped = self.states.dropped / max(self.states.advanced, 1)
        return loss, {"age": float(ages.float().mean()), "horizon": self._horizon(part.step), "dropped": dropped}

    def _mixed(self, jko: JKOProblem, network: nn.Module, *batch: Tensor) -> Tensor:
        """The loss by scores where measures have one, and by log det for the others, each by its share."""
        x, seen, log_rho, score, weight, known = batch
        if known is not None:
            known = self.networks["operator"].marks(seen, jko.tau, known)  # what wraps it passes forward alone
        moved, det, after = pushed_density(self.networks["operator"], x, seen, jko, score, known)
        smooth = (after.isfinite().all(-1) & (det > FOLD)).all(-1)
        total = x.new_zeros(())
        if smooth.any():
            given = (_rows(values, smooth) for values in (x, seen, log_rho, moved, det, after, weight, known))
            total = total + smooth.double().mean().float() * loss_by_score(jko, network, *given)
        if not smooth.all():
            # where a map folds far out, those few particles are what it is to learn: none weighs less there
            given = (_rows(values, ~smooth) for values in (x, seen, log_rho, known))
            total = total + (~smooth).double().mean().float() * loss_by_log_det(jko, network, *given)
        return total

    def _told(self, count: int, generator: torch.Generator) -> Tensor:
        """Which of so many measures (count, 1) the network is told the log densities of."""
        if not self.networks["operator"].config.log_density:
            return torch.zeros(count, 1, dtype=torch.bool)
        return torch.rand(count, 1, generator=generator) >= self.config.untold

    def _known(self, log_rho: Tensor, told: Tensor) -> Tensor | None:
        """log rho at the context's particles of the ``told`` measures, NaN for others; None where none is taken."""
        if not self.networks["operator"].config.log_density:
            return None
        return torch.where(told.to(log_rho.device), log_rho[:, : self.seen], math.nan)

    def _batch(self, part: Part, generator: torch.Generator) -> list[Tensor]:
        """Clouds, log densities, scores, weights and ages: this process's rows of the batch, fresh measures first."""
        fresh = part.size if not self.config.rollout else math.ceil(self.config.fresh * part.size)
        batch = [*self._clouds(fresh, generator), torch.zeros(fresh, dtype=torch.long)]
        if fresh < part.size:
            rows, states = self.states.pick(part.size - fresh, generator), self.states
            older = (states.x, states.log_rho, states.score, states.weight, states.age)
            batch = [torch.cat([new, old[rows]]) for new, old in zip(batch, older)]
        return [values[part.rows()].to(self.problem.device) for values in batch]

    def _clouds(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fresh measures; what every particle meets every other in takes them as they are, without weights."""
        weighed = self.functional.needs_density and not has_pairs(self.functional)
        tails = self.config.tails if weighed else 1.0
        given = {"first": self.seen, "tails": tails, "independent": self.config.independent}
        return clouds(self.config.initial, count, self.size, self.d, generator, **given)

    def _advance(self, part: Part) -> None:
        network = self.averages.get("operator") if self.config.average else None
        network = network or self.networks["operator"]
        generator = generator_for(self.problem.seed, "operator/tau", part.step)
        jko = self._problem(generator)
        device = self.problem.device

        def move(*state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, seen = state[0].to(device), state[0][:, : self.seen].to(device)
            if not self.functional.needs_density:
                y = push(network, x, jko.tau, particles=seen, weights=jko.weights)[0]
                return y.cpu(), state[1], state[2]
            known = self._known(state[1].to(device), self._told(len(x), generator))
            own = None  # nobody asks for densities at the context's particles
            if known is not None:
                own, known = state[1][:, : self.seen].to(device), network.marks(seen, jko.tau, known)
            ahead, carried = push(network, seen, jko.tau, own, seen, jko.weights, known)
            x, log_rho, score = (values[:, self.seen :].to(device) for values in state)
            y, det, after = pushed_density(network, x, seen, jko, score, known)
            # a fold has a NaN, so that the state is dropped
            carried = state[1][:, : self.seen] if carried is None else carried
            both = (ahead, y), (carried, log_rho - det.log()), (state[2][:, : self.seen], after)
            return tuple(torch.cat([half.cpu() for half in halves], 1) for halves in both)

        count = max(1, self.config.buffer // 4)
        energy = partial(self._energy, functional=jko.functional) if self.config.weights else None
        self.states.advance(move, count, self._horizon(part.step), energy)

    def _horizon(self, step: int) -> int:
        """From 1 to ``jko_steps`` over the curriculum's share of the training."""
        share = step / (self.config.curriculum * self.steps) if self.config.curriculum else 1.0
        return 1 + math.floor((self.config.jko_steps - 1) * min(1.0, share))

    def _functional(self, terms: list[dict]) -> Functional:
        samples = self.samples.to(self.problem.device) if len(self.samples) else None
        return build_expression(terms, self.problem.target, samples)

    def _problem(self, generator: torch.Generator) -> JKOProblem:
        """The step that this batch is trained on, or moved by: tau and weights evenly in their logarithms."""
        tau, functional, weights = self.config.tau, self.functional, ()
        if self.config.taus is not None:
            tau = _between(*self.config.taus, generator)
        if self.config.weights:
            drawn = {name: _between(*ends, generator) for name, ends in self.config.weights.items()}
            weights = tuple(drawn.values())
            functional = self._functional(reweighted(self.config.functional, drawn))
        return JKOProblem(functional, tau, weights)

    @torch.no_grad()
    def _energy(self, x: Tensor, log_rho: Tensor, weight: Tensor, functional: Functional | None = None) -> Tensor:
        numbers = evened(weight[:, self.seen :])
        x, log_rho = (taken(values[:, self.seen :], numbers).to(self.problem.device) for values in (x, log_rho))
        return energies_of(functional or self.functional, x, log_rho)

    def state(self) -> dict:
        return {"states": self.states.state()}

    def load_state(self, state: dict) -> None:
        self.states.load_state(state["states"])

    @torch.no_grad()
    def transport(self, networks: dict[str, nn.Module]) -> Transport:
        """The operator, with the source's cloud moved by it as the anchors of samples."""
        c, p, network = self.config, self.problem, networks["operator"]
        x = standing_for(p.source, c.anchors, p.seed, "operator/anchors")
        known = None
        if network.config.log_density and hasattr(p.source, "log_density"):
            known = p.source.log_density(x).float().to(p.device)
        weights = told(c.functional, c.weights)
        anchors, known = rollout(network, x.float().to(p.device), c.tau, c.jko_steps, weights, known)
        fresh = self._clouds(SEEN, generator_for(p.seed, "operator/family"))[0]
        family = family_of(torch.cat([fresh, self.states.x])[:, : self.seen])
        data = settings_of(p.target) if takes(c.functional, "density") else None
        samples = self.samples.to(p.device)
        known = None if known is None else known[:-1]
        settings = (c.tau, c.functional, data, family, c.taus, c.weights, known)
        return OperatorTransport(network, anchors[:-1], samples, *settings)
