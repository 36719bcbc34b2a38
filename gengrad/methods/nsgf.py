"""Neural Sinkhorn Gradient Flow: a network learns the velocity of the flow that descends the Sinkhorn divergence."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from math import ceil
from statistics import mean
from typing import Annotated, Literal

import torch
from pydantic import AliasChoices, BeforeValidator, Field, model_validator
from torch import Tensor, nn

from gengrad.data.base import Distribution
from gengrad.data.draws import Shuffle, Stream, generator_for
from gengrad.flows.flow import Flow
from gengrad.flows.particles import geodesic_taus, geodesic_times, particle_flow
from gengrad.flows.pool import TrajectoryPool
from gengrad.flows.transports import VelocityTransport
from gengrad.functionals.divergence import sinkhorn_log
from gengrad.functionals.expression import ParticleExpression, build_expression, takes
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.regression import (
    Examples,
    LabelDropout,
    OTDims,
    PlanView,
    classes_in,
    forget_labels,
    matching_loss,
    stratified,
)
from gengrad.ot import SinkhornResult, exact_assignment, sinkhorn_velocity
from gengrad.registry import METHODS, Settings


def _points(given: object) -> object:
    """One message for what is neither a size nor ``all``."""
    if given == "all" or (isinstance(given, int) and not isinstance(given, bool) and given >= 2):
        return given
    raise ValueError("a whole number of at least 2, or all")


@METHODS.register("nsgf")
class NSGF(Method):
    """Velocity-field matching on particle paths of the Sinkhorn divergence (arXiv 2401.14069, algorithm 1).

    X^{k+1} = X^k + eta_k v(X^k), v = sinkhorn_velocity(X^k, Y); the network is regressed on w = v / (1 - t) along the
    path, t the geodesic clock (t_{k+1} - t_k = eta_k (1 - t_k)), so that dx/dt = w runs from 0 to 1 and w stays as
    large as y - x_0 on the whole way. With another ``functional`` the paths are those of its particle flow, and t is
    the share of the flow_steps that are done: flow time in units of flow_steps tau where the steps are equal.
    """

    class Config(Settings):
        # euler: particles are moved and the plan solved again at each step (the paper); geodesic: solved once at the
        # source, straight from there, flow_steps times cheaper
        pool: Literal["euler", "geodesic"] = "geodesic"
        flow_steps: int = Field(5, ge=1, validation_alias=AliasChoices("flow_steps", "jko_steps"))
        # another functional of particles, an expression: its flow of `flow_steps` steps of `tau` in flow time is
        # learned, from draws of the data where it compares with samples (pool: euler, and none of the Sinkhorn
        # settings); none: the Sinkhorn divergence
        functional: ParticleExpression | None = None
        tau: float = Field(0.1, gt=0)
        # each of them may be made of several steps of the particles; each step is `growth` times the one before, and
        # goes on with `momentum` of the last one's way (Polyak's heavy ball), which a flow that slows down needs
        substeps: int = Field(1, ge=1)
        growth: float = Field(1.0, ge=1)
        momentum: float = Field(0.0, ge=0, lt=1)
        # mean: the debiased barycentric velocity of the theory; sample: towards a target point drawn from the plan's
        # row; match: the plan rounded to the best permutation, which its potentials find quickly (epsilon -> 0). Drawn
        # and matched targets never lie between two modes and have the target's law, so they need no self term
        target: Literal["mean", "sample", "match"] = "sample"
        epsilon: float | None = Field(None, gt=0)  # absolute, in units of |x - y|^2 / 2; overrides epsilon_rel
        epsilon_rel: float = Field(0.02, gt=0)  # in units of the mean cost of the batch pair
        # trained at times t = u^time_exponent, u uniform: above 1 the start of the way is seen more often. There the
        # velocity has to sort the mass, and an error made there is carried all the way
        time_exponent: float = Field(1.0, gt=0)
        # where on the clock the flow ends. Below 1 the samples stop on the way (matched: McCann's interpolation), for a
        # population that is to be improved and not replaced
        stop: float = Field(1.0, gt=0, le=1)
        tol: float = Field(1e-2, gt=0)  # relative error of the velocity at which Sinkhorn stops
        # source points in each Sinkhorn problem; all: every point of a finite source, whose one plan says where each
        # goes. Plans of random batches leave that open in high dimension, and the network averages over it
        ot_batch: Annotated[int | Literal["all"], BeforeValidator(_points)] = 256
        target_batch: int | None = Field(None, ge=2)  # target points in it; none: as many
        # how many principal components of the data the cost sees; none: all coordinates. Few make a plan of the same
        # batch tell more of a particle's way, since the wide directions are sorted first; for drawn or matched targets
        ot_dims: OTDims = None
        uses: int = Field(1, ge=1)  # how often each path is trained on before it leaves the pool
        pool_batches: int = Field(1, ge=1)  # OT batches that the pool mixes
        pool_memory_mb: int = Field(1024, ge=1)
        ot_scope: Literal["global", "rows", "local"] = "global"
        label_dropout: LabelDropout = 0.1  # share of the labels hidden from a network that takes classes, for guidance

        @model_validator(mode="before")
        @classmethod
        def _step_by_step(cls, given: object) -> object:
            """Another functional has no plan to go straight along; the settings of the Sinkhorn flow say nothing."""
            if not isinstance(given, dict) or given.get("functional") is None:
                return given
            idle = [key for key in ("epsilon", "epsilon_rel", "target", "tol", "ot_dims", "stop") if key in given]
            if idle and given.get("pool") != "euler":  # a resolved config holds them all
                raise ValueError(f"functional=... takes no {', '.join(idle)}: they are of the Sinkhorn divergence")
            return {**given, "pool": "euler"} if "pool" not in given else given

        @model_validator(mode="after")
        def _matchable(self):
            if self.ot_batch == "all" and self.ot_scope != "global":
                raise ValueError(f"ot_batch=all is one problem of all points: leave out ot_scope={self.ot_scope}")
            if self.functional is not None and self.pool != "euler":
                raise ValueError("functional=... is followed step by step: take pool=euler, or leave it out")
            if self.functional is None and (self.substeps > 1 or self.growth > 1 or self.momentum > 0):
                raise ValueError("substeps, growth and momentum are of another functional=...; give one, or leave them")
            if self.functional is not None:
                last = math.log(self.tau) + (self.flow_steps * self.substeps - 1) * math.log(self.growth)
                if last > math.log(1e12):
                    raise ValueError(f"growth={self.growth:g} takes tau beyond 1e12: take one nearer to 1")
            if self.functional is not None and self.stop < 1:
                raise ValueError("stop is on the Sinkhorn flow's clock: with functional=... take fewer flow_steps")
            if self.target == "match" and (self.ot_scope == "rows" or self.target_batch not in (None, self.ot_batch)):
                raise ValueError("target=match pairs points one to one: leave out target_batch, and ot_scope=rows")
            if self.target == "mean" and self.ot_dims is not None:
                raise ValueError(
                    "ot_dims sees a part of the space, where the debiased mean is no velocity of the whole: use target="
                    "match or sample, or leave out ot_dims"
                )
            return self

    def objections(self, source: Distribution, target: Distribution) -> list[str]:
        if self.config.ot_batch == "all" and not len(source):
            return [f"method.ot_batch=all needs a source of finitely many points, not {source.name!r}: give a number"]
        return []

    def batches(self) -> dict[str, tuple[int, bool]]:
        c = self.config
        if c.ot_batch == "all":  # points of the data may come several times, or not all of them
            return {}
        found = {"method.ot_batch": (c.ot_batch, c.ot_scope != "global")}
        return found | {"method.target_batch": (c.target_batch or c.ot_batch, c.ot_scope == "local")}

    def plans(self, batch_size: int, source_size: int, target_size: int) -> dict[str, tuple[int, int]]:
        c = self.config
        targets = f" with method.target_batch={c.target_batch}" if c.target_batch else ""
        rows = source_size if c.ot_batch == "all" else c.ot_batch
        return {f"method.ot_batch={c.ot_batch}{targets}": (rows, c.target_batch or rows)}

    def refusals(self, network: dict) -> list[str]:
        c = self.config
        if network.get("classes") and (c.ot_scope == "rows" or c.target_batch not in (None, c.ot_batch)):
            return [
                "particles take the classes of the targets one to one where the network takes classes: leave out "
                "method.target_batch, and method.ot_scope=rows"
            ]
        return []

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield SinkhornStage(problem, self.config, until=self.config.stop)


class SinkhornStage(Stage):
    """Fills the pool with particle paths, one OT batch a period, and regresses the network on them.

    The paths run from 0 to ``until`` on the geodesic clock and are trained on from ``start``. Where the network takes
    classes, particle i has the class of target i, and each class is a transport problem of its own.
    """

    name = "nsgf"

    def __init__(self, problem: Problem, config: NSGF.Config, until: float = 1.0, start: float = 0.0):
        if config.ot_batch == "all":
            config = config.model_copy(update={"ot_batch": len(problem.source)})
        self.problem, self.config, self.steps, self.until = problem, config, problem.steps, until
        self.start, self.view = start, PlanView(problem, config.ot_dims)
        self.networks = {"velocity": problem.make_network()}
        self.source = Stream(problem.source, problem.seed, "train/source")
        self.target = Stream(problem.target, problem.seed, "train/target")
        # a path batch is worth this many steps: then the next one enters the pool
        self.period = ceil(config.uses * config.ot_batch / problem.batch_size)
        steps = config.flow_steps if config.pool == "euler" else 1
        self.times = until * torch.tensor(geodesic_times(steps))
        self.compares = config.functional is None or takes(config.functional, "samples")
        self._pool: TrajectoryPool | None = None
        self._newest = -1  # number of the newest path batch in the pool
        self._logs: dict[str, float] = {}
        self._seconds = 0.0

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        return matching_loss(networks["velocity"], self.examples(part, generator)), self.logs()

    def logs(self) -> dict[str, float]:
        """The diagnosis of the newest paths, and the seconds that transport problems took since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return {**self._logs, "ot_seconds": seconds}

    def examples(self, part: Part, generator: torch.Generator) -> Examples:
        """Positions on the pool's paths with the velocity there, t uniform on [start, until]."""
        pool = self._filled(part)
        rows = self._rows(part).to(pool.times.device)
        u = stratified(part.size, generator)[part.rows()] ** self.config.time_exponent
        t = (self.start + (self.until - self.start) * u).to(pool.times.device)
        x_t, w = pool.segments(rows, t)
        found = Examples(x_t, t, w, pool.labels(rows))
        classes = self.problem.classes or 0
        return forget_labels(found, self.config.label_dropout, classes, generator, part.rows(), part.size)

    def transport(self, networks: dict[str, nn.Module]) -> VelocityTransport:
        return VelocityTransport(networks["velocity"], t1=self.until)

    # ------------------------------------------------------------ the pool

    def _filled(self, part: Part) -> TrajectoryPool:
        """The pool as it must be at this step. It is a function of (seed, step) alone: a resumed run makes it anew."""
        c, number = self.config, part.step // self.period
        if self._pool is None:
            self._pool = TrajectoryPool(self.times.to(self.problem.device), c.pool_batches, c.pool_memory_mb * 2**20)
            self._newest = max(number - c.pool_batches, -1)
        while self._newest < number:
            self._newest += 1
            started = time.perf_counter()
            self._pool.add(*self._paths(self._newest, part))
            self._seconds += time.perf_counter() - started
        return self._pool

    def _rows(self, part: Part) -> Tensor:
        """Which particles of the pool this process trains on at this step: all of them in turn, shuffled."""
        share = 1 if self.config.ot_scope == "global" else part.world
        rank = 0 if self.config.ot_scope == "global" else part.rank
        size = part.size // share
        number, step = divmod(part.step, self.period)
        shuffle = Shuffle(len(self._pool), self.problem.seed, f"train/pool/{number}/{rank}")
        rows = shuffle.take(step * size, (step + 1) * size)
        return rows[part.rows() if self.config.ot_scope == "global" else part.within()]

    def _paths(self, number: int, part: Part) -> tuple[Tensor, Tensor | None]:
        """States (len(times), n, *event) of path batch ``number`` and the particles' classes, where they have some.

        ``ot_scope`` says which points a process moves. global: every process solves the whole problem and gets the
        same paths, without communication; rows: its own source points against all targets; local: its own against
        its own.
        """
        c = self.config
        rank, world = (0, 1) if c.ot_scope == "global" else (part.rank, part.world)
        x = self._take(self.source, number, c.ot_batch, rank, world)
        alone = c.ot_scope == "local"
        place = (c.target_batch or c.ot_batch, rank if alone else 0, world if alone else 1)
        y = self._take(self.target, number, *place) if self.compares else x[:0]
        labels = self._take(self.target, number, *place, labels=True) if self.problem.classes else None
        seed = generator_for(self.problem.seed, "train/plan", number, rank).initial_seed()
        generator = torch.Generator(self.problem.device).manual_seed(seed)
        if labels is None:
            states, self._logs = self._flow(x, y, generator)
            return states, None
        states, logs = x.new_empty(len(self.times), *x.shape), []
        for rows in classes_in(labels, len(labels)):
            states[:, rows], log = self._flow(x[rows], y[rows], generator)
            logs.append(log)
        self._logs = together(logs)
        return states, labels

    def _take(self, stream: Stream, number: int, size: int, rank: int, world: int, labels: bool = False) -> Tensor:
        """A process's share of batch ``number`` of a stream cut into batches of ``size``, or the labels of it."""
        rows = Part(0, size, rank, world).rows()
        take = stream.labels if labels else stream.take
        return take(number * size + rows.start, number * size + rows.stop).to(self.problem.device)

    def _descent(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The particle flow of another functional, in equal steps of the clock, and its logs."""
        c = self.config
        functional = build_expression(c.functional, self.problem.target, y)
        taus = [c.tau * c.growth**k for k in range((len(self.times) - 1) * c.substeps)]
        flowed = particle_flow(functional, x, taus, momentum=c.momentum, every=c.substeps)
        return flowed.states, flowed.logs[-1]

    def _flow(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The particle flow X^{k+1} = X^k + eta_k v(X^k) towards y, at the times of the clock, and its logs."""
        if self.config.functional is not None:
            return self._descent(x, y)
        c, shape, y = self.config, x.shape, y.flatten(1)
        x, seen = x.flatten(1), self.view(y)
        states, logs, solved = [x], [], None
        for eta in geodesic_taus(self.times.tolist()):
            solved = sinkhorn_velocity(
                self.view(x),
                seen,
                epsilon=c.epsilon,
                epsilon_rel=c.epsilon_rel,
                tol=c.tol,
                warm_start=solved,
                debias=c.target == "mean",
            )
            x = x + eta * self._velocity(x, y, solved, generator)
            states.append(x)
            logs.append(sinkhorn_log(solved))
        return torch.stack(states).view(len(states), *shape), together(logs)

    def _velocity(self, x: Tensor, y: Tensor, solved: SinkhornResult, generator: torch.Generator) -> Tensor:
        """Where the particles x (n, d) are sent: the mean, a draw or the rounding of their rows of the plan."""
        if self.config.target == "mean":
            return solved.velocity
        if self.config.target == "match":
            return y[exact_assignment(self.view(x), self.view(y), solved.g)] - x
        return y[solved.sample_targets(generator)] - x


def together(logs: list[dict[str, float]]) -> dict[str, float]:
    """Over several solves: the worst marginal error, whether all converged, the mean of the rest."""
    pick = {"marginal_error": max, "converged": min}
    return {key: pick.get(key, mean)([log[key] for log in logs]) for key in logs[-1]}
