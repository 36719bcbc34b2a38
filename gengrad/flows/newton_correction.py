"""A learned step corrected by one Newton step of its own optimality condition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from gengrad.flows.least_squares import by_place, monomials
from gengrad.functionals.base import Density, Functional, Sum, terms_of
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

    def __call__(self, y: Tensor) -> Tensor:
        """y + q, (n, d)."""
        return y + monomials(self._inside(y)[0], self.degree, 0)[0] @ self.coefficients

    def jacobian(self, y: Tensor) -> Tensor:
        """I + Dq, (n, d, d)."""
        z, inside = self._inside(y)
        slopes = monomials(z, self.degree, 1)[1] * inside[:, None] / self.scale
        return torch.eye(y.shape[-1]).to(y) + self.coefficients.mT @ slopes

    def _inside(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """z (n, d) held within the reach, and which of it was there."""
        z = (y - self.centre) / self.scale
        return z.clamp(-self.reach, self.reach), z.abs() <= self.reach

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
    """Whether steps of this energy are to be corrected.

    Not where it compares with samples, of which some dozens of gradients cost more than they are worth (a Sinkhorn
    divergence's are solved for), nor where a density is in it whose second derivative is not known: internal energies'
    is.
    """
    every = [term for _, term in terms_of(functional)]
    known = all(isinstance(term, InternalEnergy) or not term.needs_density for term in every)
    return known and not any(term.takes == "samples" for term in every)


def residual_of(functional: Functional, tau: float, x: Tensor, y: Tensor, density: Density | None) -> Tensor:
    """(y - x) / tau + grad dF/drho'(y) (n, d), float64: zero at every particle where x -> y is the exact step."""
    y = y.double()
    density = density and Density(density.log.double(), density.score.double())
    return (y - x) / tau + gradient_of(functional, y, density)


def corrections_of(
    functional: Functional, tau: float, x: Tensor, y: Tensor, density: Density | None, degree: int
) -> Iterator[Correction]:
    """One Newton step from q = 0 of the condition that holds at the exact step for every particle,

        r = (y + q - x) / tau + grad dF/drho'(y + q) = 0,   rho' the density of y + q(y),

    tested by polynomials: H(q, p) = -E <r, p> for all polynomials p, q one of them, of at most this degree, ``ENOUGH``
    particles to a term. x, y = T x (n, d): the particles before and after; ``density``: log rho' and the score at y,
    where F needs it, NaN where the map folds. From the highest degree to affine maps, two degrees lower each: the next
    is for whoever finds that one is no better than none; nothing where q is not to be trusted.

    r is the gradient, and H the second derivative along y + q, of J = E |y - x|^2 / (2 tau) + F:

        H(q, p) = E [ <q, p> / tau + <p, D(grad V) q> + (P' - P / rho') div q div p + P / rho' tr(Dq Dp) ],

    V the potentials and interactions of F, P the pressure of its internal energies: these are integrated by parts, so
    that no third derivative of the map is taken (for q = p displacement convexity: McCann 1997; a Galerkin method). J
    over the particles has its minimum elsewhere, for they are not the measure; but r is zero at every one of them, be
    they even or independent, and what is rough of it, of mean zero, moves nothing. There is no correction for a density
    with an edge, whose score inside says nothing of it (E score (y - m)' is then not -I), where F cannot be taken of
    the particles. Degrees at which H is not positive, q would go far, or fold, are passed over.
    """
    x, y = (v.detach().double() for v in (x, y))
    if density is not None:
        log_rho, score = (v.detach().double() for v in (density.log, density.score))
        sound = log_rho.isfinite() & score.isfinite().all(-1)
        if int(sound.sum()) < len(x) / 2:
            return
        x, y, density = x[sound], y[sound], Density(log_rho[sound], score[sound])
        if not _has_no_edge(y, density.score):
            return
    (n, d), way = x.shape, float((y - x).square().mean().sqrt())
    while degree and n < ENOUGH * math.comb(d + degree, d):
        degree -= 1
    if not degree or not way > 0:
        return
    centre = y.mean(0)
    scale = (y - centre).square().mean().sqrt()
    z = (y - centre) / scale
    try:
        residual = residual_of(functional, tau, x, y, density)
        bend = _second_derivative(functional, tau, y, density, Polynomials(z, scale, degree), NEAR * way)
    except ValueError:  # as where particles coincide and an interaction is infinite
        return
    pull = (monomials(z, degree, 0)[0].mT @ residual / n).flatten()
    for k in [*range(degree, 1, -2), 1]:
        count = math.comb(d + k, d)  # terms of low degrees come first
        factor, failed = torch.linalg.cholesky_ex(bend[: count * d, : count * d])
        if failed:
            continue
        solution = -torch.cholesky_solve(pull[: count * d, None], factor)
        found = Correction(solution.view(-1, d), centre, scale, z.abs().amax(0))
        near = (found(y) - y).square().mean().sqrt() <= max(FURTHEST * way, LITTLE * float(scale))
        if bool(near & (torch.linalg.det(found.jacobian(y)) > FOLD).all()):  # not of what is not finite
            yield found


def _has_no_edge(y: Tensor, score: Tensor) -> bool:
    """Whether E score (y - m)' = -I as far as so many particles can tell, for a smooth density's integral by parts."""
    products = score[:, :, None] * (y - y.mean(0))[:, None]
    off = products.mean(0) + torch.eye(y.shape[-1]).to(y)
    error = products.std(0) / len(y) ** 0.5
    loose = off.diagonal().mean().abs() < LOOSE
    return bool(loose and (off.abs() < (ERRORS * error).clamp_min(EXACT)).all())


class Polynomials(NamedTuple):
    """The terms of a polynomial of z = (y - centre) / ``scale``, as functions of y."""

    z: Tensor
    scale: Tensor
    degree: int

    def values(self, rows: Tensor) -> Tensor:
        """(rows, terms)."""
        return monomials(self.z[rows], self.degree, 0)[0]

    def slopes(self, rows: Tensor) -> Tensor:
        """(rows, terms, d)."""
        return monomials(self.z[rows], self.degree, 1)[1] / self.scale


def _second_derivative(
    functional: Functional, tau: float, y: Tensor, density: Density | None, terms: Polynomials, near: float
) -> Tensor:
    """H (terms d, terms d) of polynomials at y (n, d), a mean over at most ``MOST`` of the particles; of energies of

    pairs, which take a gradient for each term, over ``PAIRED``: they are small beside the cost of the way.
    """
    d, every = y.shape[1], terms_of(functional)
    rows = by_place(y, MOST)
    values, eye = terms.values(rows), torch.eye(d).to(y)
    paired = [each for each in every if has_pairs(each[1])]
    single = [each for each in every if not has_pairs(each[1]) and not isinstance(each[1], InternalEnergy)]
    found = values.new_zeros(d, d, values.shape[1], values.shape[1])  # [a, b]: terms along a as p, along b as q
    turns = [_turned(single, y[rows], axis.expand(len(rows), d), near) for axis in eye]
    for a, b in product(range(d), repeat=2):
        found[a, b] = values.mT @ ((eye[a, b] / tau + turns[b][:, a, None]) * values) / len(rows)
    if paired:  # the pull on each particle changes with all of them
        few = by_place(y, PAIRED)
        some = terms.values(few)
        for b in range(d):
            turns = torch.stack([_turned(paired, y[few], value[:, None] * eye[b], near) for value in some.mT], 1)
            found[:, b] += torch.einsum("np,nqa->apq", some, turns) / len(few)
    if density is not None:
        slopes, log_rho = terms.slopes(rows), density.log[rows]
        internal = [(weight, term) for weight, term in every if isinstance(term, InternalEnergy)]
        pressure = sum(weight * term.pressure(log_rho) for weight, term in internal)[:, None] / len(rows)
        slope = sum(weight * term.slope(log_rho) for weight, term in internal)[:, None] / len(rows)
        for a, b in product(range(d), repeat=2):
            found[a, b] += slopes[:, :, b].mT @ (pressure * slopes[:, :, a])
            found[a, b] += slopes[:, :, a].mT @ ((slope - pressure) * slopes[:, :, b])
    whole = found.permute(2, 0, 3, 1).reshape(d * values.shape[1], -1)
    return (whole + whole.mT) / 2


def _turned(terms: list[tuple[float, Functional]], y: Tensor, by: Tensor, near: float) -> Tensor:
    """D(grad V) by (n, d) at y (n, d), V the sum of these energies, by a difference."""
    if not terms:
        return torch.zeros_like(y)
    energy = Sum(terms)
    return (gradient_of(energy, y + near * by, None) - gradient_of(energy, y, None)) / near
