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

LOOSE = 0.25  # how far E <score, y - m> / d may be from -1: beyond that the density has an edge, or points are too few
FAR = 0.5  # of the way of a step, at most the way of its correction
CURVED, PAIRED = 1024, 256  # particles by which second derivatives are taken, where every one meets every other too
ENOUGH = 4  # particles for each term of a polynomial, at least
NEAR = 1e-4  # of the way of a step, between the gradients whose differences second derivatives are


@dataclass(frozen=True)
class Correction:
    """y -> y + q(y), q a polynomial of (y - ``centre``) / ``scale``: coefficients (terms, d), centre (d,), scale ()."""

    coefficients: Tensor
    centre: Tensor
    scale: Tensor

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y + q(y) and I + Dq(y), (n, d) and (n, d, d)."""
        values, slopes = _monomials((y - self.centre) / self.scale, self.degree)
        eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        return y + values @ self.coefficients, eye + _turned(self.coefficients, slopes / self.scale)

    @property
    def degree(self) -> int:
        terms, d = self.coefficients.shape
        return next(k for k in range(terms) if math.comb(d + k, d) == terms)

    @classmethod
    def none(cls, d: int, degree: int) -> Correction:
        """q = 0."""
        return cls(torch.zeros(math.comb(d + degree, d), d), torch.zeros(d), torch.ones(()))

    def packed(self) -> Tensor:
        """(terms + 2, d): the coefficients, the centre and the scale."""
        return torch.cat([self.coefficients, self.centre[None], self.scale.expand(1, len(self.centre))])

    @classmethod
    def unpacked(cls, rows: Tensor) -> Correction:
        return cls(rows[:-2], rows[-2], rows[-1, 0])


def pushed_density(network: nn.Module, x: Tensor, context: Context, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T x, det DT, grad log rho'(T x)) for x and score (measures, n, d), detached; the context that of the measures.

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


def is_corrected(functional: Functional) -> bool:
    """Whether steps of this energy can be corrected: not where it compares with samples, whose gradients are solved

    for to some percent, each at the price of many steps.
    """
    return not any(term.takes == "samples" for _, term in terms_of(functional))


def corrected_push(
    network: nn.Module, functional: Functional, x: Tensor, tau: float, log_rho: Tensor | None,
    weights: Sequence[float], degree: int,
) -> tuple[Tensor, Tensor | None, Correction | None]:  # fmt: skip
    """(T x, log rho'(T x), what corrected T) of a cloud x (n, d) with log rho (n,) at it, by a ``degree`` of 1 or more;

    NaN where the map folds. An energy of particles needs no log rho, which is carried where it is given.
    """
    with torch.no_grad():
        context = network.context(x, tau, weights, log_rho)
    if functional.needs_density:
        y, det, after = pushed_density(network, x, context, scores(x, log_rho).to(x))
        logs, density = log_rho - det.log(), Density(log_rho - det.log(), after)
    else:
        with torch.no_grad():
            y, logs, density = network(x, context), None, None
            if log_rho is not None:
                logs = log_rho - determinant(network(x, context, jacobian=True)[1]).log()
    found = correction_of(functional, tau, x, y, density, degree)
    if found is None:
        return y, logs, None
    moved, jacobian = found(y.double())
    return moved.to(y), None if logs is None else logs - determinant(jacobian).log().to(logs), found


def correction_of(
    functional: Functional, tau: float, x: Tensor, y: Tensor, density: Density | None, degree: int
) -> Correction | None:
    """One Newton step of J(T) = E |T x - x|^2 / (2 tau) + F(T_# rho) over y -> y + q(y), q a polynomial; none where it

    is not to be trusted. x, y = T x (n, d): the particles before and after; ``density``: log rho' and the score at y,
    where F needs it, NaN where the map folds.

    At the minimum (y - x) / tau + grad dF/drho'(y) is zero at every particle. So its mean against each term of q, the
    derivative of J there, has no noise of the cloud at the minimum, be the points even or independent ones. The second
    derivatives are those of J on the particles, differences of its gradients. There is no correction for a density with
    an edge, of which the integration by parts behind the score is not true (E <score, y - m> is then not -d), and where
    q would go far, or fold.
    """
    x, y = x.double(), y.double()
    if density is not None:
        log_rho, score = density.log.double(), density.score.double()
        sound = log_rho.isfinite() & score.isfinite().all(-1)
        if int(sound.sum()) < len(x) / 2:
            return None
        x, y, density = x[sound], y[sound], Density(log_rho[sound], score[sound])
        stein = (density.score * (y - y.mean(0))).sum(-1).mean() / x.shape[-1]
        if not abs(float(stein) + 1) < LOOSE:
            return None
    way = float((y - x).square().mean().sqrt())
    if not way > 0 or len(x) < ENOUGH * math.comb(x.shape[-1] + degree, degree):
        return None
    centre = y.mean(0)
    scale = (y - centre).square().mean().sqrt()
    residual = (y - x) / tau + gradient_of(functional, y, density)
    values, slopes = _monomials((y - centre) / scale, degree)
    slope, slopes = (values.mT @ residual / len(x)).flatten(), slopes / scale
    few = slice(None, None, math.ceil(len(x) / (PAIRED if has_pairs(functional) else CURVED)))
    log_rho = None if density is None else density.log[few]
    bend = _second_derivative(
        functional, y[few], log_rho, values[few], slopes[few], float((y - x).square().mean().sqrt())
    )
    bend = bend + torch.kron(values.mT @ values / len(x), torch.eye(x.shape[-1]).to(x)) / tau
    factor, failed = torch.linalg.cholesky_ex(bend)
    if failed:
        return None
    found = Correction(-torch.cholesky_solve(slope[:, None], factor).view(values.shape[1], -1), centre, scale)
    moved, jacobian = found(y)
    near = (moved - y).square().mean().sqrt() <= FAR * way
    return found if near and bool((determinant(jacobian) > FOLD).all()) else None


def _second_derivative(
    functional: Functional, y: Tensor, log_rho: Tensor | None, values: Tensor, slopes: Tensor, way: float
) -> Tensor:
    """That of F in the coefficients (terms, d) of q at zero, as a matrix, by central differences of its gradient:

    functionals that take their gradient on the way have no second one by autograd. ``way``: of the step.
    """
    count, d = values.shape[1], y.shape[-1]
    eye = torch.eye(d, dtype=y.dtype, device=y.device)

    def gradient(given: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf, density = given.view(count, d).requires_grad_(True), None
            if log_rho is not None:
                density = Density(log_rho - determinant(eye + _turned(leaf, slopes)).log())
            return torch.autograd.grad(functional(y + values @ leaf, density), leaf)[0].flatten()

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
    """Dq (n, d, d) of the coefficients (terms, d) and the gradients of the terms (n, terms, d)."""
    return coefficients.mT @ slopes
