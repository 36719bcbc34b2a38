"""The JKO scheme with input-convex networks: one convex potential for each implicit step, densities carried along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Literal, NoReturn

import torch
from pydantic import AliasChoices, Field, model_validator
from torch import Tensor, nn

from gengrad.data.base import Distribution
from gengrad.data.draws import Shuffle, generator_for
from gengrad.flows.density_cloud import Cloud, pushed_density
from gengrad.flows.flow import Flow
from gengrad.flows.gradient import GradientTransport
from gengrad.flows.transports import Transport
from gengrad.functionals.base import Density, Functional
from gengrad.functionals.expression import Expression, build_expression, gradient_of, needs_density, takes
from gengrad.functionals.interaction import InteractionEnergy
from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.jko_affine import JKOProblem, NoMinimumError, solve_affine
from gengrad.networks.curvature import EXACT
from gengrad.registry import METHODS, Settings

PROBES = 4096  # particles on which a step is judged
SCORED = 32_768  # particles whose score is carried along, and trained on where the functional has a density
PAIRS = 2048  # ... where every one of them meets every other
CURVED = 8192  # particles for the affine solve where each has its own Hessian; half of them above d = 16
BLOCKS = 8  # of the probes, on which two maps are compared
RISE = 1e-3  # relative rise of the energy in a step that ends the run: more than the noise of the probes


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
        tol: float = Field(1e-4, ge=0)  # E|residual|^2 / E|velocity|^2 at which a step counts as solved; 0: never
        target_samples: int = Field(2048, ge=2)  # of the data, for functionals that compare with samples

        @model_validator(mode="after")
        def _has_minima(self):
            for term in self.functional:
                if term["weight"] < 0 and needs_density([term]):
                    raise ValueError(
                        f"{term['name']} of weight {term['weight']:g} falls without bound as mass concentrates: no "
                        "step has a minimum, whatever tau; give it a positive weight"
                    )
            return self

    def least_nfe(self) -> int:
        return self.config.jko_steps

    def stages(self, problem: Problem, flow: Flow) -> Iterator[Stage]:
        yield from self.steps(problem, flow, {})

    def steps(self, problem: Problem, flow: Flow, updates: dict[int, Callable]) -> Iterator[Stage]:
        """The stages; ``updates[k](flow, cloud)`` gives a transport that comes before step k, with no training."""
        functional, carried, position = self._functional_of(problem), Carried(problem, self.config.cloud), 0
        for k in range(self.config.jko_steps):
            if k in updates:
                if position == len(flow.transports):
                    flow.transports.append(updates[k](flow, carried.up_to(flow)))
                position += 1
            if position < len(flow.transports):
                yield Finished(k)  # by an earlier call
            else:
                yield JKOStage(problem, self.config, functional, carried.up_to(flow), k, _last_network(flow))
            position += 1

    def _functional_of(self, problem: Problem) -> Callable[[Distribution], Functional]:
        """target -> the functional towards it; the samples that it may take are the same for all."""
        c = self.config
        if needs_density(c.functional) and not hasattr(problem.source, "log_density"):
            raise ValueError(
                f"the functional needs a density, and source {problem.source.name!r} has none: start from a source "
                "with a log density (normal, gaussian, gaussian_mixture, uniform), or use functionals of particles"
            )
        samples = None
        if takes(c.functional, "samples"):
            samples = problem.target.sample(c.target_samples, generator_for(problem.seed, "functional/target"))
            samples = samples.to(problem.device)
        return lambda target: build_expression(c.functional, target, samples)


class Carried:
    """The cloud at the end of a flow that grows: pushed once by each transport, from the source on when resumed."""

    def __init__(self, problem: Problem, size: int):
        self.problem, self.size, self.count, self.cloud = problem, size, 0, None

    def up_to(self, flow: Flow) -> Cloud:
        if self.cloud is None:
            p = self.problem
            self.cloud = Cloud.of(p.source, self.size, p.seed, SCORED, p.device)
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


class JKOStage(Stage):
    """One step: from rho_k, held as a cloud, to its JKO minimiser."""

    def __init__(
        self, problem: Problem, config: JKOICNN.Config, functional_of: Callable[[Distribution], Functional],
        cloud: Cloud, k: int, before: nn.Module | None,
    ):  # fmt: skip
        self.problem, self.config, self.k, self.cloud = problem, config, k, cloud
        self.name = f"step_{k + 1}"
        self.functional_of, functional = functional_of, functional_of(problem.target)
        self.jko = JKOProblem(functional, config.tau)
        self.pairs = _has_pairs(functional)
        self.probes = cloud.first(PAIRS if self.pairs else PROBES)
        network = problem.make_network() if before is None else copy.deepcopy(before)
        network = network.to(problem.device).train().requires_grad_(True)
        network.whiten(cloud.x)
        if config.start == "affine":
            self._solve_affine(network)
        self.networks = {"potential": network}
        self.initial = copy.deepcopy(network).requires_grad_(False)
        self.at_start = self._judge(self.initial)
        self.solved = self.at_start["residual"] is not None and self.at_start["residual"] <= config.tol
        self.steps = 0 if self.solved else steps_of(k, config.jko_steps, problem.steps)
        # particles with a score give gradients that vanish with the residual, one by one
        self.scored = self.jko.needs_density and cloud.score is not None and not _is_singular(functional)
        count = len(cloud.score) if self.scored else len(cloud.x)
        self._order = Shuffle(count, problem.seed, f"train/cloud/{k}")
        self._done, self.record = 0, {}

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        rows = self._order.take(part.step * part.size, (part.step + 1) * part.size)[part.rows()]
        rows, self._done = rows.to(self.cloud.x.device), part.step + 1
        jko, target = self.jko, self.problem.target.estimate(generator)
        if target is not self.problem.target:
            jko = JKOProblem(self.functional_of(target), jko.tau)
        x = self.cloud.x[rows].float().view(-1, *self.problem.source.event_shape)
        log_rho = self.cloud.log_rho[rows].float() if jko.needs_density else None
        if self.scored:
            energy, distance, slope = self._by_score(jko, networks["potential"], x, log_rho, self.cloud.score[rows])
        else:
            y, log_det = networks["potential"](x), None
            if jko.needs_density:
                y, log_det = networks["potential"](x, log_det=True, generator=generator)
            energy, distance, slope = jko.energy(y, log_rho, log_det), jko.distance(x, y), 0.0
        logs = {"energy": energy.item(), "move": 2 * distance.item()}
        return jko.tau * energy + distance + slope, logs

    def _by_score(self, jko: JKOProblem, potential: nn.Module, x: Tensor, log_rho: Tensor, score: Tensor) -> tuple:
        """(F, E|Tx - x|^2 / 2, 0 with the gradient of tau F + E|Tx - x|^2 / 2 in the weights).

        That gradient is E <tau grad dF/drho (Tx) + Tx - x, dT>, the internal energies' part integrated by parts: equal
        on average to the one through log det, but zero particle by particle at the minimum, where the other is noise.
        """
        y = potential(x)
        moved, log_det, after = pushed_density(self.networks["potential"], x.flatten(1), score.float())
        density = Density(log_rho - log_det, after.view_as(x))
        field = jko.tau * gradient_of(jko.functional, moved.view_as(x), density) + (moved.view_as(x) - x)
        slope = (field * y).flatten(1).sum(1).mean()
        with torch.no_grad():
            energy = jko.functional(moved.view_as(x), density)
        return energy, jko.distance(x, moved.view_as(x)), slope - slope.detach()

    def transport(self, networks: dict[str, nn.Module]) -> Transport:
        """The better of two maps on the same particles: the start, and the trained one with its affine part redone."""
        network, found, trained = self.initial, self.at_start, False
        if not self.solved:
            learned = copy.deepcopy(networks["potential"])
            if self._done >= self.steps:  # not for a checkpoint on the way
                self._solve_affine(learned)
            judged = self._judge(learned)
            if is_better(judged, self.at_start):
                network, found, trained = learned, judged, True
        before = self._judge(None)["energy"]
        self.record = {
            "step": self.k + 1,
            "tau": self.jko.tau,
            "time": (self.k + 1) * self.jko.tau,
            "energy_before": before,
            "energy": found["energy"],
            "move": found["move"],
            "residual": found["residual"],
            "trained": trained,
        }
        if self._done >= self.steps:
            self._refuse_rise(before, found["energy"])
        return GradientTransport(network, self.record)

    def summary(self) -> dict[str, float]:
        return {
            key: float(self.record[key])
            for key in ("time", "energy", "move", "residual", "trained")
            if self.record.get(key) is not None
        }

    @torch.no_grad()
    def _solve_affine(self, network: nn.Module) -> None:
        """Gives the network the best affine part beyond its phi."""
        if not network.is_affine and network.d > EXACT:
            return  # Hessians of that size are not assembled
        # with a curved potential every particle has a Hessian of its own
        most = len(self.cloud.x) if network.is_affine else CURVED // (1 + (network.d > 16))
        most = min(PAIRS if self.pairs else most, self.config.affine_cloud)
        try:
            q, b = solve_affine(self.jko, network, self.cloud.first(most))
        except NoMinimumError:
            raise ValueError(
                f"{self.name}: mass flies off to infinity, the step has no minimum. Where the energy is concave, tau "
                f"times its curvature must stay below 1: take a smaller tau (now {self.jko.tau:g}); the flow of the "
                f"{self.k} steps before is kept"
            ) from None
        network.set_affine(q, b)

    def _refuse_rise(self, before: float, after: float) -> None:
        if after - before > RISE * (1 + abs(before)):
            raise ValueError(
                f"{self.name}: the energy rose from {before:.6g} to {after:.6g}, which a JKO step cannot do: the step "
                f"is not solved. Give it more train.steps, or a smaller tau (now {self.jko.tau:g}), below which a "
                f"concave part of the energy no longer wins; the flow of the {self.k} steps before is kept"
            )

    def _judge(self, network: nn.Module | None) -> dict:
        """Energy, E|T x - x|^2, objective and relative residual of a map on the probes; of the identity for None.

        The residual is E |(T x - x) / tau + grad dF/drho (T x)|^2 / E |(T x - x) / tau|^2, zero at the exact step. None
        without a score, and for singular interactions, whose force between particles has no variance.
        """
        before, tau = self.probes, self.jko.tau
        after = before if network is None else before.pushed(copy.deepcopy(network).double())
        shape = (-1, *self.problem.source.event_shape)
        with torch.no_grad():
            density = None if after.log_rho is None else Density(after.log_rho)
            energy = float(self.jko.functional(after.x.view(shape), density))
            distance = float(self.jko.distance(before.x, after.x))
            parts = [
                tau * self.jko.functional(y.view(shape), None if density is None else Density(density.log[rows]))
                + self.jko.distance(before.x[rows], y)
                for rows in torch.arange(len(after.x)).to(after.x.device).chunk(BLOCKS)
                if len(y := after.x[rows]) > 1
            ]
        residual = None
        smooth = not _is_singular(self.jko.functional)
        if network is not None and smooth and (after.score is not None or not self.jko.needs_density):
            count = len(before.x) if after.score is None else min(len(after.score), len(before.x))
            if after.score is not None:
                density = Density(after.log_rho[:count], after.score[:count].view(shape))
            field = gradient_of(self.jko.functional, after.x[:count].view(shape), density).flatten(1)
            speed = (after.x[:count] - before.x[:count]) / tau
            residual = float((speed + field).square().sum() / speed.square().sum().clamp_min(1e-300))
        return {"energy": energy, "move": 2 * distance, "parts": torch.stack(parts), "residual": residual}


def is_better(judged: dict, start: dict) -> bool:
    """Whether a trained map is better than the start: by the objective, or where its noise hides that by the residual.

    Near the minimum the difference of two objectives is of second order in that of the maps, but its noise of first:
    blocks of particles say how large it is. The residual vanishes there particle by particle, and has no such noise.
    """
    gain = start["parts"] - judged["parts"]
    noise = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else gain.new_zeros(())
    if abs(gain.mean()) > 2 * noise or start["residual"] is None or judged["residual"] is None:
        return bool(gain.mean() > 2 * noise)
    return judged["residual"] < start["residual"]


def steps_of(k: int, count: int, total: int) -> int:
    """The share of ``total`` optimiser steps that step k gets: the first, which begins from nothing, three shares."""
    share = max(1, total // (count + 2))
    return total - (count - 1) * share if k == 0 and total > count else share


def _is_singular(functional: Functional) -> bool:
    terms = functional.terms if hasattr(functional, "terms") else [(1.0, functional)]
    return any(getattr(term, "singular", False) for _, term in terms)


def _has_pairs(functional: Functional) -> bool:
    """Whether the functional's cost grows with the square of the number of particles."""
    terms = functional.terms if hasattr(functional, "terms") else [(1.0, functional)]
    return any(isinstance(term, InteractionEnergy) or term.takes == "samples" for _, term in terms)
