"""A learned step corrected by one Newton step of its own optimality condition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gengrad.flows.least_squares import by_place, monomials
from gengrad.functionals.base import Density, Functional, terms_of
from gengrad.functionals.expression import gradient_of, has_pairs
from gengrad.functionals.internal import InternalEnergy
from gengrad.networks.set_operator import FOLD

# how far E <score, y - m> / d may be from -1, and the entries of E score (y - m)' from those of -I, in standard errors
# or outright: beyond that the density has an edge, or its score was not found
LOOSE, ERRORS, EXACT = 0.25, 5.0, 0.02
# at most the way of a correction, of that of the step and of the cloud's scale: at rest all of a step is wrong
FURTHEST, LITTLE = 2.0, 0.02
MOST, PAIRED = 4096, 256  # particles of which second derivatives are means; where every one meets every other
ENOUGH = 40  # particles for each term of a polynomial, at least: those of high degrees are led by the outermost
NEAR = 1e-6  # of the way of a step, between the gradients whose differences are derivatives


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
        values, slopes = monomials(z.clamp(-self.reach, self.reach), self.degree, 1)
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
    """Whether steps of this energy are to be corrected: where it does not compare with samples, of which some dozens of

    gradients cost more than they are worth (a Sinkhorn divergence's are solved for).
    """
    return not any(term.takes == "samples" for _, term in terms_of(functional))


def residual_of(functional: Functional, tau: float, x: Tensor, y: Tensor, density: Density | None) -> Tensor:
    """(y - x) / tau + grad dF/drho'(y) (n, d), float64: zero at every particle where x -> y is the exact step."""
    y = y.double()
    density = density and Density(density.log.double(), density.score.double())
    return (y - x) / tau + gradient_of(functional, y, density)


def correction_of(
    functional: Functional, tau: float, x: Tensor, y: Tensor, density: Density | None, degree: int
) -> Correction | None:
    """One Newton step from q = 0 of the condition that holds at the exact step for every particle,

        r = (y + q - x) / tau + grad dF/drho'(y + q) = 0,   rho' the density of y + q(y),

    tested by polynomials: H(q, p) = -E <r, p> for all polynomials p, q one of them, of at most this degree, ``ENOUGH``
    particles to a term. x, y = T x (n, d): the particles before and after; ``density``: log rho' and the score at y,
    where F needs it, NaN where the map folds. None where q is not to be trusted.

    r is the gradient, and H the second derivative along y + q, of J = E |y - x|^2 / (2 tau) + F:

        H(q, p) = E [ <q, p> / tau + <p, D(grad V) q> + (P' - P / rho') div q div p + P / rho' tr(Dq Dp) ],

    V the potentials and interactions of F, P the pressure of its internal energies: these are integrated by parts, so
    that no third derivative of the map is taken (for q = p displacement convexity: McCann 1997; a Galerkin method). J
    over the particles has its minimum elsewhere, for they are not the measure; but r is zero at every one of them, be
    they even or independent, and what is rough of it, of mean zero, moves nothing. There is no correction for a density
    with an edge, whose score inside says nothing of it (E score (y - m)' is then not -I), where F cannot be taken of
    the particles, and where H is not positive. Where q would go far, or fold, it is sought two degrees lower.
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
    values, slopes = monomials(z, degree, 1)
    try:
        residual = residual_of(functional, tau, x, y, density)
        bend = _second_derivative(functional, tau, y, density, values, slopes / scale, NEAR * way)
    except ValueError:  # as where particles coincide and an interaction is infinite
        return None
    pull = (values.mT @ residual / n).flatten()
    for k in range(degree, 0, -2):
        count = math.comb(d + k, d)  # terms of low degrees come first
        factor, failed = torch.linalg.cholesky_ex(bend[: count * d, : count * d])
        if failed:
            continue
        solution = -torch.cholesky_solve(pull[: count * d, None], factor)
        found = Correction(solution.view(-1, d), centre, scale, z.abs().amax(0))
        moved, jacobian = found(y)
        near = (moved - y).square().mean().sqrt() <= max(FURTHEST * way, LITTLE * float(scale))
        if bool(near & (torch.linalg.det(jacobian) > FOLD).all()):  # not of what is not finite
            return found
    return None


def _has_no_edge(y: Tensor, score: Tensor) -> bool:
    """Whether E score (y - m)' = -I as far as so many particles can tell, for a smooth density's integral by parts."""
    products = score[:, :, None] * (y - y.mean(0))[:, None]
    off = products.mean(0) + torch.eye(y.shape[-1]).to(y)
    error = products.std(0) / len(y) ** 0.5
    loose = off.diagonal().mean().abs() < LOOSE
    return bool(loose and (off.abs() < (ERRORS * error).clamp_min(EXACT)).all())


def _second_derivative(
    functional: Functional, tau: float, y: Tensor, density: Density | None, values: Tensor, slopes: Tensor, near: float
) -> Tensor:
    """H (terms d, terms d) of terms with ``values`` (n, terms) and gradients ``slopes`` (n, terms, d) at y (n, d).

    Means over some of the particles where there are many.
    """
    pairs = has_pairs(functional)
    rows = by_place(y, PAIRED if pairs else MOST)
    y, values, slopes = y[rows], values[rows], slopes[rows]
    density = density and Density(density.log[rows], density.score[rows])
    (n, terms), d = values.shape, y.shape[1]
    eye, start = torch.eye(d).to(y), gradient_of(functional, y, density)

    def turned(by: Tensor) -> Tensor:
        """D(grad V) by (n, d); what the density is made of cancels."""
        return (gradient_of(functional, y + near * by, density) - start) / near

    def block(a: int, b: int) -> Tensor:
        """The terms along a as p, and along b as q, (terms, terms)."""
        found = values.mT @ (eye[a, b] / tau * values)
        found += values.mT @ (turns[b][:, :, a] if pairs else turns[b][:, a, None] * values)
        if density is not None:
            found += slopes[:, :, b].mT @ (pressure * slopes[:, :, a])
            found += slopes[:, :, a].mT @ ((slope - pressure) * slopes[:, :, b])
        return found / n

    if pairs:  # the pull on each particle changes with all of them
        turns = [torch.stack([turned(value[:, None] * axis) for value in values.mT], 1) for axis in eye]
    else:
        turns = [turned(axis.expand_as(y)) for axis in eye]
    if density is not None:
        pressure = slope = torch.zeros_like(density.log)[:, None]
        for weight, term in terms_of(functional):
            if isinstance(term, InternalEnergy):
                pressure = pressure + weight * term.pressure(density.log)[:, None]
                slope = slope + weight * term.slope(density.log)[:, None]
    found = torch.stack([torch.stack([block(a, b) for b in range(d)], -1) for a in range(d)], 1)
    found = found.reshape(terms * d, terms * d)
    return (found + found.mT) / 2
