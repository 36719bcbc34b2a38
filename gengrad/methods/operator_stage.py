"""The training of a learned JKO operator: batches of fresh measures and of those that it has moved so far."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from gengrad.data.draws import generator_for
from gengrad.data.families import clouds
from gengrad.flows.density_cloud import standing_for
from gengrad.flows.newton_correction import is_corrected
from gengrad.flows.operator import energies_of
from gengrad.flows.operator_family import family_of
from gengrad.flows.operator_transport import OperatorTransport, anchored, push
from gengrad.flows.transports import Transport
from gengrad.functionals.base import Functional
from gengrad.functionals.expression import build_expression, has_pairs, reweighted, takes
from gengrad.methods.base import Part, Problem, Stage
from gengrad.methods.jko_affine import JKOProblem
from gengrad.methods.operator_loss import evened, loss_by_log_det, loss_by_score, scored_push, step_loss, taken
from gengrad.methods.state_buffer import StateBuffer
from gengrad.networks.kernels import Marks
from gengrad.networks.set_operator import FOLD
from gengrad.registry import Settings, settings_of

SEEN = 256  # fresh measures by which the range of the training family is told
EVERY = 8  # optimiser steps between two pushes of a part of the buffer


def _between(low: float, high: float, generator: torch.Generator) -> float:
    """Drawn evenly in the logarithm."""
    return math.exp(math.log(low) + math.log(high / low) * float(torch.rand((), generator=generator)))


def _rows(values: Tensor | Marks | None, which: Tensor) -> Tensor | Marks | None:
    return values.rows(which) if isinstance(values, Marks) else None if values is None else values[which]


class OperatorStage(Stage):
    """The operator's training: batches of measures, of which the buffer's grow older as the operator moves them."""

    name = "operator"

    def __init__(self, problem: Problem, config: Settings):
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
        self.states = StateBuffer(self._clouds, config.buffer, self._energy, self._found, problem.seed)
        self.blocks: dict[int, tuple[Tensor, ...]] = {}  # of fresh measures, by number

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        if self.config.rollout and part.piece == 0 and part.step and part.step % EVERY == 0:
            self._advance(part)
        *batch, ages = self._batch(part, generator)
        jko, network = self._problem(generator), networks["operator"]
        which = self._told(part.size, generator)[part.rows()].to(batch[0].device)
        # parameters that no measure asks for have a gradient too, a zero: several processes wait for all of them
        loss = 0.0 * sum(p.sum() for p in network.parameters())
        for rows, known in ((which, True), (~which, False)):
            if rows.any():
                some = self._loss(jko, network, *(values[rows] for values in batch), told=known)
                loss = loss + rows.double().mean().float() * some
        dropped = self.states.dropped / max(self.states.advanced, 1)
        return loss, {"age": float(ages.float().mean()), "horizon": self._horizon(part.step), "dropped": dropped}

    def _loss(self, jko: JKOProblem, network: nn.Module, *batch: Tensor, told: bool) -> Tensor:
        """The loss of measures whose log densities the network is ``told``, all of them, or not."""
        *batch, found = batch
        seen, (x, log_rho, score, weight) = batch[0][:, : self.seen], (values[:, self.seen :] for values in batch)
        if not jko.needs_density:
            return step_loss(jko, x, network(x, seen, jko.tau, jko.weights))
        # what wraps the network passes forward alone
        known = self.networks["operator"].marks(seen, jko.tau, batch[1][:, : self.seen], found) if told else None
        if has_pairs(jko.functional):
            return loss_by_log_det(jko, network, x, seen, log_rho, known)
        return self._mixed(jko, network, x, seen, log_rho, score, weight, known)

    def _mixed(self, jko: JKOProblem, network: nn.Module, *batch: Tensor) -> Tensor:
        """The loss by scores where measures have one, and by log det for the others, each by its share."""
        x, seen, log_rho, score, weight, known = batch
        operator = self.networks["operator"]
        with torch.no_grad():
            context = operator.context(seen, jko.tau, jko.weights, known)
        moved, det, after = scored_push(operator, x, context, score)
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
        """Which of so many measures (count,) the network is told the log densities of."""
        if not self.networks["operator"].config.log_density:
            return torch.zeros(count, dtype=torch.bool)
        return torch.rand(count, generator=generator) >= self.config.untold

    def _batch(self, part: Part, generator: torch.Generator) -> list[Tensor]:
        """Clouds, log densities, scores, weights, what is ``_found`` and ages: this process's rows of the batch, fresh

        measures first.
        """
        fresh = part.size if not self.config.rollout else math.ceil(self.config.fresh * part.size)
        batch = [*self._fresh(fresh, part.step, generator), torch.zeros(fresh, dtype=torch.long)]
        if fresh < part.size:
            rows, states = self.states.pick(part.size - fresh, generator), self.states
            older = (states.x, states.log_rho, states.score, states.weight, states.found, states.age)
            batch = [torch.cat([new, old[rows]]) for new, old in zip(batch, older)]
        return [values[part.rows()].to(self.problem.device) for values in batch]

    def _fresh(self, count: int, step: int, generator: torch.Generator) -> list[Tensor]:
        """Fresh measures for a batch, of the latest ``reuse`` blocks of as many; each ``reuse`` steps there is a new

        one. Blocks are functions of seed and number, so that a run that goes on has the same.
        """
        if self.config.reuse == 1 or not count:
            new = self._clouds(count, generator)
            return [*new, self._found(*new[:2])]
        first = step // self.config.reuse
        latest = range(first, first + self.config.reuse)
        self.blocks = {number: self.blocks.get(number) for number in latest}
        for number, block in self.blocks.items():
            if block is None:
                new = self._clouds(count, generator_for(self.problem.seed, "operator/fresh", number))
                self.blocks[number] = *new, self._found(*new[:2])
        rows = torch.randperm(count * len(latest), generator=generator)[:count]
        return [torch.cat(values)[rows] for values in zip(*self.blocks.values())]

    def _found(self, x: Tensor, log_rho: Tensor) -> Tensor:
        """What networks that take log densities look up in clouds; of others nothing, (clouds, 0)."""
        network = self.networks["operator"]
        if not network.config.log_density:
            return x[:, 0, :0]
        return network.columns(x[:, : self.seen], log_rho[:, : self.seen])

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

        def move(*state: Tensor) -> tuple[Tensor, ...]:
            which = self._told(len(state[0]), generator)
            after = tuple(torch.empty_like(values) for values in state[:3])
            for rows, known in ((which, True), (~which, False)):
                if rows.any():
                    given = (values[rows].to(self.problem.device) for values in state)
                    for values, new in zip(after, self._moved(network, jko, *given, told=known)):
                        values[rows] = new.cpu()
            return after

        count = max(1, self.config.buffer // 4)
        energy = partial(self._energy, functional=jko.functional) if self.config.weights else None
        self.states.advance(move, count, self._horizon(part.step), energy)

    def _moved(
        self, network: nn.Module, jko: JKOProblem, x: Tensor, log_rho: Tensor, score: Tensor, found: Tensor, told: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, log rho and score of states after a step, of which the network is ``told`` the log densities or not."""
        seen, n, known = x[:, : self.seen], self.seen, None
        if not self.functional.needs_density:
            return push(network, x, jko.tau, particles=seen, weights=jko.weights)[0], log_rho, score
        own = None  # of networks that take none nobody asks for log densities at the context's particles
        if network.config.log_density:
            own = log_rho[:, :n]
            known = network.marks(seen, jko.tau, own, found) if told else None
        ahead, carried = push(network, seen, jko.tau, own, seen, jko.weights, known)
        with torch.no_grad():
            context = network.context(seen, jko.tau, jko.weights, known)
        y, det, after = scored_push(network, x[:, n:], context, score[:, n:])
        # a fold has a NaN, so that the state is dropped
        carried = log_rho[:, :n] if carried is None else carried
        both = (ahead, y), (carried, log_rho[:, n:] - det.log()), (score[:, :n], after)
        return tuple(torch.cat(halves, 1) for halves in both)

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

    def transport(self, networks: dict[str, nn.Module]) -> Transport:
        """The operator, with the source's cloud moved by it as the anchors of samples."""
        c, p, network = self.config, self.problem, networks["operator"]
        fresh = self._clouds(SEEN, generator_for(p.seed, "operator/family"))[0]
        family = family_of(torch.cat([fresh, self.states.x])[:, : self.seen])
        data = settings_of(p.target) if takes(c.functional, "density") else None
        correction = c.correction if is_corrected(self.functional) else 0
        settings = (c.tau, c.functional, data, family, c.taus, c.weights, correction)
        x = standing_for(p.source, c.anchors, p.seed, "operator/anchors").float().to(p.device)
        log_rho = None
        if self.functional.needs_density and hasattr(p.source, "log_density"):
            log_rho = p.source.log_density(x.cpu().double()).to(p.device)
        samples = self.samples.to(p.device)
        transport = OperatorTransport(network, x[None], samples, *settings)
        states, known, corrected = anchored(transport, x, log_rho, c.jko_steps)
        known = known if network.config.log_density else None
        return OperatorTransport(network, states, samples, *settings, known, corrected)
