"""A cloud of particles that knows its density: what a flow with log determinants carries from step to step."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gengrad.data.base import Distribution
from gengrad.data.draws import draw, generator_for
from gengrad.data.moments import moved_to
from gengrad.flows.gradient import GradientTransport
from gengrad.flows.transports import Transport
from gengrad.functionals.base import Density
from gengrad.networks.curvature import EXACT, log_det

MATCHED = 4096  # particles whose mean and covariance are made exact together
CHUNK = 8192  # particles moved at once
FURTHER = 2.0  # times as far out as a draw of the source, at most, are its outposts
JUDGED = 4096  # particles whose score is kept in float64


@dataclass
class Cloud:
    """Particles x (n, d) with log rho (n,) and, of the first ``len(score)``, the score grad log rho; float64.

    ``log_rho`` is None where the source has no density, ``score`` also where d is above 64. ``outposts`` are particles
    of their own, with their log rho and score: no sample of rho, but further out, where rho has next to no particles.
    """

    x: Tensor
    log_rho: Tensor | None
    score: Tensor | None
    outposts: Cloud | None = None

    @classmethod
    def of(cls, source: Distribution, n: int, seed: int, probes: int, device: torch.device, outposts: int = 0) -> Cloud:
        """``n`` particles of the source; where its moments are known, blocks of 4096 have them exactly.

        ``outposts`` more lie up to ``FURTHER`` times as far from the mean as others that were drawn.
        """
        x = matched(draw(source, 0, n, seed, "cloud").flatten(1).double(), source.moments())
        cloud = cls.at(x, source, probes, device)
        if outposts:
            y = draw(source, 0, outposts, seed, "cloud/outposts").flatten(1).double()
            u = torch.rand(outposts, 1, generator=generator_for(seed, "cloud/further"), dtype=torch.float64)
            y = x.mean(0) + (1 + (FURTHER - 1) * u) * (y - x.mean(0))
            cloud.outposts = cls.at(y, source, outposts, device)
        return cloud

    @classmethod
    def at(cls, x: Tensor, source: Distribution, probes: int, device: torch.device) -> Cloud:
        """Particles at x (n, d), with the source's density there."""
        log_rho = score = None
        if hasattr(source, "log_density"):
            log_rho = source.log_density(x.view(-1, *source.event_shape)).double().to(device)
            if x.shape[1] <= EXACT:
                leaf = x[:probes].clone().requires_grad_(True)
                (score,) = torch.autograd.grad(source.log_density(leaf.view(-1, *source.event_shape)).sum(), leaf)
                score = score.to(device)
        return cls(x.to(device), log_rho, score)

    def density(self, rows: slice | Tensor = slice(None)) -> Density | None:
        return None if self.log_rho is None else Density(self.log_rho[rows])

    def pushed(self, network: nn.Module, fast: bool = False) -> Cloud:
        """The cloud after x -> grad u(x): log rho(Tx) = log rho(x) - log det H(x), in float64; ``fast``: in float32."""
        parts, generator = [], torch.Generator().manual_seed(0)
        mover = copy.deepcopy(network).float() if fast else network
        with torch.no_grad():
            for x in self.x.float().split(CHUNK) if fast else self.x.split(CHUNK):
                y, volume = mover.moved(x, generator) if self.log_rho is not None else (mover(x), x[:, 0])
                parts.append((y.double(), volume.double()))
        moved, log_dets = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        log_rho = None if self.log_rho is None else self.log_rho - log_dets
        score = None
        if self.score is not None:  # in the precision asked for beyond those that steps are judged on
            halves = [(network, slice(0, JUDGED))]
            if len(self.score) > JUDGED:
                halves.append((mover, slice(JUDGED, len(self.score))))
            score = torch.cat([pushed_score(net, self.x[rows], self.score[rows]) for net, rows in halves])
        return Cloud(moved, log_rho, score)

    def through(self, transport: Transport) -> Cloud:
        """The cloud after a transport that has a density; one that knows no score loses it."""
        after = self._moved(transport)
        after.outposts = None if self.outposts is None else self.outposts._moved(transport)
        return after

    def _moved(self, transport: Transport) -> Cloud:
        if isinstance(transport, GradientTransport):
            # a curved map in the precision of its training, at half the time; the score and affine maps in float64
            return self.pushed(copy.deepcopy(transport.network).double(), fast=not transport.network.is_affine)
        with torch.no_grad():
            log_rho = None if self.log_rho is None else self.log_rho - transport.log_det(self.x)
            score = None
            if self.score is not None and hasattr(transport, "score_after"):
                score = transport.score_after(self.x[: len(self.score)])
            return Cloud(transport.push(self.x), log_rho, score)

    def first(self, n: int) -> Cloud:
        """The first n particles, without outposts."""
        return self.part(0, n)

    def part(self, start: int, stop: int) -> Cloud:
        """Particles ``start`` .. ``stop - 1``, without outposts."""
        log_rho = None if self.log_rho is None else self.log_rho[start:stop]
        return Cloud(self.x[start:stop], log_rho, None if self.score is None else self.score[start:stop])


def pushed_density(network: nn.Module, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T x, log det H(x), grad log rho' at T x) of a map T = grad u with Hessian H; x and score (n, d), detached.

    log rho'(T x) = log rho(x) - log det H(x), so grad log rho' = H^{-1} (grad log rho(x) - grad log det H(x)).
    """
    if network.is_affine:
        q = network.quadratic.detach()
        return (x @ q + network.shift).detach(), log_det(q).expand(len(x)), torch.linalg.solve(q, score.mT).mT
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        moved, hessian = network.gradient_and_hessian(leaf)
        value = log_det(hessian)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    after = torch.linalg.solve(hessian.detach(), (score - gradient)[..., None])[..., 0]
    return moved.detach(), value.detach(), after


def pushed_score(network: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    """grad log rho' at T(x), in the precision of the network."""
    own = next(network.parameters()).dtype
    pairs = zip(x.to(own).split(CHUNK), score.to(own).split(CHUNK))
    return torch.cat([pushed_density(network, points, values)[2] for points, values in pairs]).double()


def standing_for(law: Distribution, n: int, seed: int, stream: str) -> Tensor:
    """``n`` points (n, d), float64, that stand for ``law`` together, for what sees a measure as a cloud.

    As near to it as so many come, where the law has ``even``; else draws, with its moments where it has them.
    """
    if hasattr(law, "even"):
        return law.even(n, generator_for(seed, stream))
    return matched(draw(law, 0, n, seed, stream).flatten(1).double(), law.moments())


def matched(x: Tensor, moments: tuple[Tensor, Tensor] | None) -> Tensor:
    """x (n, d) moved affinely, 4096 at a time, to the given mean and covariance: means over it are far less noisy."""
    if moments is None:
        return x
    return torch.cat([moved_to(block, *moments) for block in x.split(MATCHED)])
