"""A learned step corrected by one Newton step of its own optimality condition, where the density is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gengrad.flows.least_squares import monomials, shrunk
from gengrad.functionals.base import Density, Functional, terms_of
from gengrad.functionals.expression import gradient_of, has_pairs
from gengrad.networks.set_operator import FOLD

# how far E <score, y - m> / d may be from -1, and the entries of E score (y - m)' from those of -I, in standard errors
# or outright: beyond that the density has an edge, or its score was not found
LOOSE, ERRORS, EXACT = 0.25, 5.0, 0.02
# at most the way of a correction, of that of the step and of the cloud's scale: at rest all of a step is wrong
FURTHEST, LITTLE = 0.5, 0.02
MOST, PAIRED = 4096, 256  # particles whose condition is solved; where every one meets every other
ENOUGH = 4  # particles for each term of a polynomial, at least
NEAR = 1e-6  # of the way of a step, between the residuals whose differences are derivatives


@dataclass(frozen=True)
class Correction:
    """y -> y + q(z), q a polynomial of z = (y - ``centre``) / ``scale`` with ``coefficients`` (terms, d).

    Beyond ``reach`` (d,), the largest |z| of the cloud in each coordinate, z counts as that: nothing is known there.
    """

    coefficients: Tensor
    centre: Tensor
    scale: Tensor
    reach: Tensor

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y + q and I + Dq, (n, d) and (n, d, d)."""
        z = (y - self.centre) / self.scale
        values, slopes, _ = monomials(z.clamp(-self.reach, self.reach), self.degree)
        slopes = slopes * (z.abs() <= self.reach)[:, None] / self.scale
        return y + values @ self.coefficients, torch.eye(y.shape[-1]).to(y) + self.coefficients.mT @ slopes

    @property
    def degree(self) -> int:
        terms, d = self.coefficients.shape
        return next(k for k in range(terms) if math.comb(d + k, d) == terms)

    def packed(self, degree: int) -> Tensor:
        """The coefficients of a polynomial of this degree, centre, scale and reach, (terms + 3, d)."""
        d = len(self.centre)
        none = self.coefficients.new_zeros(math.comb(d + degree, d) - len(self.coefficients), d)
        return torch.cat([self.coefficients, none, self.centre[None], self.scale.expand(1, d), self.reach[None]])

    @classmethod
    def unpacked(cls, rows: Tensor) -> Correction:
        return cls(rows[:-3], rows[-3], rows[-2, 0], rows[-1])

    @classmethod
    def none(cls, d: int) -> Correction:
        """q = 0."""
        return cls(torch.zeros(1, d), torch.zeros(d), torch.ones(()), torch.ones(d))


def is_corrected(functional: Functional) -> bool:
    """Whether steps of this energy are to be corrected: where it has a density, and does not compare with samples, of

    which some dozens of gradients cost more than they are worth (a Sinkhorn divergence's are solved for).
    """
    return functional.needs_density and not any(term.takes == "samples" for _, term in terms_of(functional))


def correction_of(
    functional: Functional, tau: float, x: Tensor, y: Tensor, density: Density | None, degree: int
) -> Correction | None:
    """One Newton step from q = 0 of the condition that holds at the exact step for every particle,

        r = (y + q - x) / tau + grad dF/drho'(y + q) = 0,   rho' the density of y + q(y),

    q a polynomial of at most this degree, ``ENOUGH`` particles to a term: the least squares of E |r + Dr q|^2, without
    what is doubtful (``shrunk``). x, y = T x (n, d): the particles before and after; ``density``: log rho' and the
    score at y, where F needs it, NaN where the map folds. None where q is not to be trusted.

    The condition is that of the minimum of J(T) = E |T x - x|^2 / (2 tau) + F(T_# rho). J over the particles has its
    minimum elsewhere, for they are not the measure; but r is zero at every one of them, be they even or independent.
    Dr follows the particles: of a change q, log rho' changes by -div q there, and the score s by -Dq' s - grad div q;
    the rest by differences. There is no correction for a density with an edge, whose score inside says nothing of it
    (E score (y - m)' is then not -I), where F cannot be taken of the particles, where affine maps have no minimum, and
    where q would go far, or fold.
    """
    x, y = (v.detach().double() for v in (x, y))
    if density is not None:
        log_rho, score = (v.detach().double() for v in (density.log, density.score))
        sound = log_rho.isfinite() & score.isfinite().all(-1)
        if int(sound.sum()) < len(x) / 2:
            return None
        x, y, density = x[sound], y[sound], Density(log_rho[sound], score[sound])
        if not _has_no_edge(y, density.score):
            return None
    (n, d), way = x.shape, float((y - x).square().mean().sqrt())
    while degree and n < ENOUGH * math.comb(d + degree, d):
        degree -= 1
    if not degree or not way > 0:
        return None
    centre = y.mean(0)
    scale = (y - centre).square().mean().sqrt()
    z = (y - centre) / scale
    try:
        residual = (y - x) / tau + gradient_of(functional, y, density)
        rows, turns = _derivative(functional, tau, y, density, z, scale, degree, NEAR * way)
    except ValueError:  # as where particles coincide and an interaction is infinite
        return None
    sizes = turns.norm(dim=0).clamp_min(1e-30)
    if not bool(turns.isfinite().all() & residual.isfinite().all()):
        return None
    found = -shrunk(turns / sizes, residual[rows].flatten()) / sizes
    found = Correction(found.view(-1, d), centre, scale, z.abs().amax(0))
    affine = monomials(z[rows], 1)[0][:, :, None, None] * torch.eye(d).to(y)  # (n, 1 + d, d, d)
    bend = affine.permute(0, 3, 1, 2).reshape(len(turns), -1).mT @ turns[:, : (1 + d) * d]
    moved, jacobian = found(y)
    near = (moved - y).square().mean().sqrt() <= max(FURTHEST * way, LITTLE * float(scale))
    convex = torch.linalg.cholesky_ex(bend + bend.mT)[1] == 0
    return found if near and bool(convex & (torch.linalg.det(jacobian) > FOLD).all()) else None


def _has_no_edge(y: Tensor, score: Tensor) -> bool:
    """Whether E score (y - m)' = -I as far as so many particles can tell, for a smooth density's integral by parts."""
    products = score[:, :, None] * (y - y.mean(0))[:, None]
    off = products.mean(0) + torch.eye(y.shape[-1]).to(y)
    error = products.std(0) / len(y) ** 0.5
    loose = off.diagonal().mean().abs() < LOOSE
    return bool(loose and (off.abs() < (ERRORS * error).clamp_min(EXACT)).all())


def _derivative(
    functional: Functional, tau: float, y: Tensor, density: Density | None, z: Tensor, scale: Tensor, degree: int,
    near: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Numbers (k,) of the particles that are taken, and by how much their residual changes with each coefficient of q,

    (k d, terms d). By some of the particles where there are many, chosen by their places, not by their order.
    """
    pairs, most = has_pairs(functional), PAIRED if has_pairs(functional) else MOST
    rows = torch.arange(len(y), device=y.device)
    if len(y) > most:
        rows = y.sum(1).argsort()[torch.arange(most, device=y.device) * len(y) // most]
        y, z, density = y[rows], z[rows], density and Density(density.log[rows], density.score[rows])
    values, slopes, bends = monomials(z, degree)
    slopes, bends, (k, d) = slopes / scale, bends / scale**2, y.shape
    # of the term t in coordinate i: the change of y, (t, i, k, d), and so on; the one that is none comes first
    eye = torch.eye(d).to(y)
    changes = [(values.mT[:, None, :, None] * eye[:, None]).flatten(0, 1)]
    if density is not None:
        changes.append(-slopes.permute(1, 2, 0).flatten(0, 1))
        turned = slopes.transpose(0, 1)[:, None] * density.score.mT[:, :, None] + bends.permute(1, 2, 0, 3)
        changes.append(-turned.flatten(0, 1))
    given = [y] if density is None else [y, density.log, density.score]
    moved = [v + near * torch.cat([torch.zeros_like(c[:1]), c]) for v, c in zip(given, changes)]
    clouds = zip(*moved) if pairs else [[v.flatten(0, 1) for v in moved]]  # by itself each particle, or each cloud
    gradients = torch.cat([gradient_of(functional, v[0], Density(*v[1:]) if v[1:] else None) for v in clouds])
    gradients = gradients.view(-1, k, d)
    turns = (gradients[1:] - gradients[:1]) / near + changes[0] / tau
    return rows, turns.flatten(1).mT
