"""One step of the JKO scheme with an input-convex network: its training, and the map that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gengrad.data.base import Distribution
from gengrad.data.draws import Shuffle
from gengrad.flows.density_cloud import Cloud, pushed_density
from gengrad.flows.gradient import GradientTransport
from gengrad.flows.operator_transport import OperatorTransport
from gengrad.flows.transports import Transport
from gengrad.functionals.base import Density, Functional, terms_of
from gengrad.functionals.expression import gradient_of, has_pairs
from gengrad.methods import jko_warm as warm
from gengrad.methods.base import Part, Problem, Stage
from gengrad.methods.jko_affine import JKOProblem, NoMinimumError, solve_affine
from gengrad.networks.curvature import EXACT

if TYPE_CHECKING:
    from gengrad.methods.jko_icnn import JKOICNN

PROBES = 4096  # particles on which a step is judged
PAIRS = 2048  # ... where every one of them meets every other
CURVED = 8192  # particles for the affine solve where each has its own Hessian; half of them above d = 16
BLOCKS = 8  # of the probes, on which two maps are compared
SURE, SURE_ALONE = 2.0, 4.0  # standard errors by which a map has to be better: beside the residual, and without it
RISE = 1e-3  # relative rise of the energy in a step that ends the run: more than the noise of the probes


class JKOStage(Stage):
    """One step: from rho_k, held as a cloud, to its JKO minimiser."""

    def __init__(
        self, problem: Problem, config: JKOICNN.Config, functional_of: Callable[[Distribution], Functional],
        cloud: Cloud, k: int, before: nn.Module | None, operator: OperatorTransport | None = None,
    ):  # fmt: skip
        self.problem, self.config, self.k, self.cloud = problem, config, k, cloud
        self.name = f"step_{k + 1}"
        self.functional_of, functional = functional_of, functional_of(problem.target)
        self.jko = JKOProblem(functional, config.tau)
        self.pairs = has_pairs(functional)
        self.probes = cloud.first(PAIRS if self.pairs else PROBES)
        network = problem.make_network() if before is None else copy.deepcopy(before)
        network = network.to(problem.device).train().requires_grad_(True)
        network.whiten(cloud.x)
        if config.start == "affine":
            self._solve_affine(network)
        self.initial = copy.deepcopy(network).requires_grad_(False)
        self.at_rest, self.at_start = self._judge(None), self._judge(self.initial)
        self._or_affine()
        self.networks = {"potential": network if operator is None else self._warmed(network, operator)}
        self.solved = self.at_start["residual"] is not None and self.at_start["residual"] <= config.tol
        self.steps = 0 if self.solved else steps_of(k, config.jko_steps, problem.steps)
        # particles with a score give gradients that vanish with the residual, one by one
        self.scored = self.jko.needs_density and cloud.score is not None and not _is_singular(functional)
        self.train = self._train_on(cloud)
        self._order = Shuffle(len(self.train.x), problem.seed, f"train/cloud/{k}")
        self._done, self.record = 0, {}

    def _or_affine(self) -> None:
        """Where the bends of the step before make a map worse than none, as near equilibrium, an affine map starts.

        Training begins with these bends all the same: they stand where this step needs some.
        """
        if self.initial.is_affine or self.config.start != "affine":
            return
        if self.at_start["parts"].mean() > self.at_rest["parts"].mean():
            with torch.no_grad():
                self.initial.scales.zero_()
            self._solve_affine(self.initial)
            self.at_start = self._judge(self.initial)

    def _train_on(self, cloud: Cloud) -> Cloud:
        """The particles that batches are drawn from; outposts after the others."""
        own = cloud.first(len(cloud.score) if self.scored else len(cloud.x))
        self.own = len(own.x)
        if cloud.outposts is None:
            return own
        if not self.scored or self.pairs:
            raise ValueError(
                f"outposts={self.config.outposts}: particles that are no sample of the source can teach a map only "
                "where its gradient is known one by one: a functional with a density (entropy, kl) in which particles "
                "do not meet, and a source with a smooth log density in at most 64 dimensions; set outposts to 0"
            )
        far = cloud.outposts
        return Cloud(
            *(torch.cat(pair) for pair in ((own.x, far.x), (own.log_rho, far.log_rho), (own.score, far.score)))
        )

    def objective(
        self, networks: dict[str, nn.Module], part: Part, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        rows = self._order.take(part.step * part.size, (part.step + 1) * part.size)[part.rows()]
        rows, self._done = rows.to(self.cloud.x.device), part.step + 1
        jko, target = self.jko, self.problem.target.estimate(generator)
        if target is not self.problem.target:
            jko = JKOProblem(self.functional_of(target), jko.tau)
        x = self.train.x[rows].float().view(-1, *self.problem.source.event_shape)
        log_rho = self.train.log_rho[rows].float() if jko.needs_density else None
        if self.scored:
            score, own = self.train.score[rows], rows < self.own
            own = own if own.any() else torch.ones_like(own)
            energy, distance, slope = self._by_score(jko, networks["potential"], x, log_rho, score, own)
        else:
            y, log_det = networks["potential"](x), None
            if jko.needs_density:
                y, log_det = networks["potential"](x, log_det=True, generator=generator)
            energy, distance, slope = jko.energy(y, log_rho, log_det), jko.distance(x, y), 0.0
        logs = {"energy": energy.item(), "move": 2 * distance.item()}
        return jko.tau * energy + distance + slope, logs

    def _by_score(
        self, jko: JKOProblem, potential: nn.Module, x: Tensor, log_rho: Tensor, score: Tensor, own: Tensor
    ) -> tuple:
        """(F, E|Tx - x|^2 / 2, 0 with the gradient of tau F + E|Tx - x|^2 / 2 in the weights); F, E over ``own``.

        That gradient is E <tau grad dF/drho (Tx) + Tx - x, dT>, the internal energies' part integrated by parts: equal
        on average to the one through log det, but zero particle by particle at the minimum, where the other is noise.
        """
        y = potential(x)
        moved, log_det, after = pushed_density(self.networks["potential"], x.flatten(1), score.float())
        density = Density(log_rho - log_det, after.view_as(x))
        field = jko.tau * gradient_of(jko.functional, moved.view_as(x), density) + (moved.view_as(x) - x)
        slope = (field * y).flatten(1).sum(1).mean()
        with torch.no_grad():
            x, moved = x[own], moved.view_as(x)[own]
            energy = jko.functional(moved, Density(density.log[own], after.view_as(field)[own]))
        return energy, jko.distance(x, moved), slope - slope.detach()

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
        before = self.at_rest["energy"]
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

    def _warmed(self, network: nn.Module, operator: OperatorTransport) -> nn.Module:
        """The network fitted to the operator's step, where that is the better start."""
        x, log_rho = self.cloud.x, self.cloud.log_rho
        found = warm.fitted(network, operator, x, self.config.tau, self.config.fit, log_rho)
        self._solve_affine(found)
        judged = self._judge(found)
        if is_better(judged, self.at_start):
            self.initial, self.at_start = copy.deepcopy(found).requires_grad_(False), judged
            return found
        return network

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
    Where there is no residual, the objective alone has to be surer: by chance it says so at one step of hundreds.
    """
    gain = start["parts"] - judged["parts"]
    noise = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else gain.new_zeros(())
    blind = start["residual"] is None or judged["residual"] is None
    if blind or abs(gain.mean()) > SURE * noise:
        return bool(gain.mean() > (SURE_ALONE if blind else SURE) * noise)
    return judged["residual"] < start["residual"]


def steps_of(k: int, count: int, total: int) -> int:
    """The share of ``total`` optimiser steps that step k gets: the first, which begins from nothing, three shares."""
    share = max(1, total // (count + 2))
    return total - (count - 1) * share if k == 0 and total > count else share


def _is_singular(functional: Functional) -> bool:
    return any(getattr(term, "singular", False) for _, term in terms_of(functional))
