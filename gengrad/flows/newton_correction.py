"""A learned step corrected by one Newton step of its own objective, where the density is known at the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gengrad.functionals.base import Density, Functional, terms_of
from gengrad.functionals.expression import gradient_of, has_pairs
from gengrad.networks.local_fit import coefficients, scores
from gengrad.networks.set_operator import FOLD, Context, determinant

# how far E <score, y - m> / d may be from -1, and the entries of E score (y - m)' from those of -I, in standard errors
# or outright: beyond that the density has an edge, or its score was not found
LOOSE, ERRORS, EXACT = 0.25, 5.0, 0.02
# at most the way of a correction, of that of the step and of the cloud's scale: at rest all of a step is wrong
FURTHEST, LITTLE = 0.5, 0.02
PAIRED = 256  # particles by which second derivatives are taken where every one meets every other
DOUBT = 2.0  # squared standard errors by which the square of a mean residual is taken to be less
ENOUGH = 4  # particles for each term of a polynomial, at least
NEAR = 1e-4  # of the way of a step, between the gradients whose differences second derivatives are


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
        values, slopes = _monomials(z.clamp(-self.reach, self.reach), self.degree)
        slopes = slopes * (z.abs() <= self.reach)[:, None] / self.scale
        return y + values @ self.coefficients, _turned(self.coefficients, slopes)

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


def scored_push(network: nn.Module, x: Tensor, context: Context, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T x, det DT, grad log rho'(T x)) for x and score (..., n, d), detached; the context that of the measures.

    log rho'(T x) = log rho(x) - log det DT(x), so that grad log rho'(T x) = DT^{-T} (score - grad log det DT).
    """
    if not bool(score.isfinite().any()):  # no measure is smooth
        with torch.no_grad():
            moved, jacobian = network(x, context, jacobian=True)
        return moved, determinant(jacobian), score
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


def is_corrected(functional: Functional, log_density: bool) -> bool:
    """Whether steps of this energy by a network that takes log densities, or does not, are to be corrected.

    Those of the former alone: the latter do not see what their steps make of the density in detail, which grows along a
    rollout, and which the residual is full of. Not where the energy compares with samples, of which some dozens of
    gradients cost more than they are worth (a Sinkhorn divergence's are solved for).
    """
    return log_density and not any(term.takes == "samples" for _, term in terms_of(functional))


@torch.inference_mode(False)
def corrected_push(
    network: nn.Module, functional: Functional, x: Tensor, tau: float, log_rho: Tensor, weights: Sequence[float],
    degree: int,
) -> tuple[Tensor, Tensor, Correction | None]:  # fmt: skip
    """(T x, log rho'(T x), what corrected T) of a cloud x (n, d) with log rho (n,) at it, by a ``degree`` of 1 or more;

    NaN where the map folds.
    """
    x, log_rho = x.detach().clone(), log_rho.clone()  # of no inference mode
    with torch.no_grad():
        context = network.context(x, tau, weights, log_rho)
    if context.marks is None:
        score = scores(x, log_rho)
    else:
        score = context.marks.at(context.away)[..., : x.shape[1]] / (context.marks.unit * context.scale)
    y, det, after = scored_push(network, x, context, score.to(x))
    logs = log_rho - det.log()
    found = correction_of(functional, tau, x, y, Density(logs, after), degree)
    if found is None:
        return y, logs, None
    moved, jacobian = found(y.double())
    return moved.to(y), logs - determinant(jacobian).log().to(logs), found


def correction_of(
    functional: Functional, tau: float, x: Tensor, y: Tensor, density: Density | None, degree: int
) -> Correction | None:
    """One Newton step of J(T) = E |T x - x|^2 / (2 tau) + F(T_# rho) over y -> y + q(y), q a polynomial of at most this

    degree, ``ENOUGH`` particles to a term; none where it is not to be trusted. x, y = T x (n, d): the particles before
    and after; ``density``: log rho' and the score at y, where F needs it, NaN where the map folds.

    At the minimum (y - x) / tau + grad dF/drho'(y) is zero at every particle. So its mean against each term of q, the
    derivative of J there, has no noise of the cloud at the minimum, be the points even or independent ones. The second
    derivatives are those of J on the particles, H = L L'. Of the means in the coordinates of L^{-1} a part is left out,
    as large as their scatter over the particles has it (positive-part James-Stein): what is rough is no reason to go
    anywhere. There is no correction for a density with an edge, of which the integration by parts behind the score is
    not true (E score (y - m)' is then not -I), where F cannot be taken of the particles, and where q would go far, or
    fold.
    """
    x, y = x.double(), y.double()
    if density is not None:
        log_rho, score = density.log.double(), density.score.double()
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
    values, slopes = _monomials(z, degree)
    try:
        residual = (y - x) / tau + gradient_of(functional, y, density)
        bend = _second_derivative(functional, y, density, values, slopes / scale, way)
    except ValueError:  # as where particles coincide and an interaction is infinite
        return None
    bend = bend + torch.kron(values.mT @ values / n, torch.eye(d).to(x)) / tau
    factor, failed = torch.linalg.cholesky_ex(bend)
    if failed:
        return None
    each = torch.linalg.solve_triangular(factor, (values[:, :, None] * residual[:, None]).flatten(1).mT, upper=False)
    slope, doubt = each.mean(1, keepdim=True), each.var(1, keepdim=True) / n
    slope = slope * (1 - DOUBT * doubt / slope.square()).clamp_min(0)  # 0 / 0, a residual of zero, is no slope
    coefficients = -torch.linalg.solve_triangular(factor.mT, slope.nan_to_num(0.0), upper=True).view(-1, d)
    found = Correction(coefficients, centre, scale, z.abs().amax(0))
    moved, jacobian = found(y)
    near = (moved - y).square().mean().sqrt() <= max(FURTHEST * way, LITTLE * float(scale))
    return found if near and bool((torch.linalg.det(jacobian) > FOLD).all()) else None


def _has_no_edge(y: Tensor, score: Tensor) -> bool:
    """Whether E score (y - m)' = -I as far as so many particles can tell, for a smooth density's integral by parts."""
    products = score[:, :, None] * (y - y.mean(0))[:, None]
    off = products.mean(0) + torch.eye(y.shape[-1]).to(y)
    error = products.std(0) / len(y) ** 0.5
    loose = off.diagonal().mean().abs() < LOOSE
    return bool(loose and (off.abs() < (ERRORS * error).clamp_min(EXACT)).all())


def _second_derivative(
    functional: Functional, y: Tensor, density: Density | None, values: Tensor, slopes: Tensor, way: float
) -> Tensor:
    """That of F in the coefficients (terms, d) of q at zero, as a matrix, by central differences of its gradient:

    functionals that take their gradient on the way have no second one by autograd. ``way``: of the step. Where every
    particle meets every other, by some of them, chosen by their places, not by their order.
    """
    log_rho = None if density is None else density.log
    if has_pairs(functional) and len(y) > PAIRED:
        few = y.sum(1).argsort()[torch.arange(PAIRED, device=y.device) * len(y) // PAIRED]
        y, values, slopes, log_rho = (v if v is None else v[few] for v in (y, values, slopes, log_rho))
    count, d = values.shape[1], y.shape[-1]

    def gradient(given: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf, after = given.view(count, d).requires_grad_(True), None
            if log_rho is not None:
                after = Density(log_rho - determinant(_turned(leaf, slopes)).log())
            return torch.autograd.grad(functional(y + values @ leaf, after), leaf)[0].flatten()

    little = NEAR * way * torch.eye(count * d, dtype=y.dtype, device=y.device)
    rows = torch.stack([gradient(one) - gradient(-one) for one in little]) / (2 * NEAR * way)
    return (rows + rows.mT) / 2


def _monomials(z: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """The terms of a polynomial of this degree at z (n, d), (n, terms), and their gradients, (n, terms, d)."""
    columns = z.unbind(-1)
    values, slopes = [torch.ones_like(columns[0])], [torch.zeros_like(z)]
    for chosen in coefficients(z.shape[-1], degree):
        factors = [columns[a] for a in chosen]
        rises = [torch.zeros_like(columns[0]) for _ in columns]
        for place, a in enumerate(chosen):
            rises[a] = rises[a] + math.prod(factors[:place] + factors[place + 1 :])
        values.append(math.prod(factors))
        slopes.append(torch.stack(rises, -1))
    return torch.stack(values, -1), torch.stack(slopes, -2)


def _turned(coefficients: Tensor, slopes: Tensor) -> Tensor:
    """I + Dq (n, d, d) of the coefficients (terms, d) and the gradients of the terms (n, terms, d)."""
    return torch.eye(slopes.shape[-1]).to(slopes) + coefficients.mT @ slopes
