"""What the JKO benchmark has beside its flows: Langevin chains, a Fokker-Planck solution, a bootstrap filter."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import diags, kron
from scipy.sparse import eye as identity
from scipy.sparse.linalg import expm_multiply
from torch import Tensor

from gengrad.data import GaussianMixture
from gengrad.evaluation.grid import GridLaw, GridTruth


def gradient_of(potential: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """grad V at every row of x."""
    leaf = x.detach().requires_grad_(True)
    return torch.autograd.grad(potential(leaf).sum(), leaf)[0]


def langevin(potential: Callable, x: Tensor, t: float, steps: int, seed: int) -> Tensor:
    """Unadjusted Langevin: x - h grad V + sqrt(2h) z up to time t, for all chains at once."""
    generator, h = torch.Generator().manual_seed(seed), t / steps
    for _ in range(steps):
        x = x - h * gradient_of(potential, x) + (2 * h) ** 0.5 * torch.randn(x.shape, generator=generator)
    return x


def fokker_planck(target: GaussianMixture, variance: float, t: float, reach: float = 16.0, cells: int = 256) -> float:
    """Symmetric KL to a target in the plane of the exact flow of KL(. | target) at time t, from N(0, variance).

    Finite volumes on [-reach, reach]^2 with rates (pi_j / pi_i)^(1/2) / h^2 between neighbours, which keep pi in
    equilibrium; the time is exact (matrix exponential).
    """
    h = 2 * reach / cells
    axis = torch.linspace(-reach + h / 2, reach - h / 2, cells, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    log_pi = target.log_density(x).double().numpy()
    line = diags([np.ones(cells - 1), np.ones(cells - 1)], [-1, 1])
    pairs = (kron(line, identity(cells)) + kron(identity(cells), line)).tocoo()
    rates = pairs.copy()
    rates.data = np.exp((log_pi[pairs.row] - log_pi[pairs.col]) / 2) / h**2  # from the column's cell to the row's
    generator = rates.tocsr()
    generator = generator - diags(np.asarray(generator.sum(0)).ravel())
    start = np.exp(-x.square().sum(1).numpy() / (2 * variance))
    p = np.maximum(expm_multiply(t * generator, start / start.sum()), 1e-300)
    pi = np.exp(log_pi) / np.exp(log_pi).sum()
    return float(((p / p.sum() - pi) * (np.log(p / p.sum()) - np.log(np.maximum(pi, 1e-300)))).sum())


def weights_alone(target: GaussianMixture, x: Tensor) -> float:
    """Symmetric KL between the modes' weights in a cloud x (by the posterior of each point) and the target's own.

    At most the symmetric KL of the laws (data processing), up to the cloud's noise. Modes of covariance I.
    """
    means, prior = target.modes.to(x), target.mode_weights.to(x)
    scores = torch.stack([(x - mean).square().sum(1) / -2 for mean in means], dim=1) + prior.log()
    found = torch.softmax(scores, dim=1).mean(0)
    return float(((found - prior) * (found / prior).log()).sum())


def mala(log_density: Callable, x: Tensor, steps: int, seed: int) -> tuple[Tensor, float]:
    """Metropolis-adjusted Langevin, preconditioned by the start's covariance, its step adapted in the first quarter.

    Returns the states (steps, n, d) of all chains and the acceptance rate after the adaptation.
    """
    generator = torch.Generator().manual_seed(seed)
    factor, h, kept, taken = torch.linalg.cholesky(torch.cov(x.T) + 1e-9 * torch.eye(x.shape[1])), 0.3, [], []

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        leaf = z.detach().requires_grad_(True)
        value = log_density(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0] @ factor

    value, gradient = evaluate(x)
    for k in range(steps):
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        move = h**2 / 2 * gradient + h * z
        proposal = x + move @ factor.T
        new_value, new_gradient = evaluate(proposal)
        back = (-move - h**2 / 2 * new_gradient) / h
        log_ratio = new_value - value - back.square().sum(1) / 2 + z.square().sum(1) / 2
        accept = torch.rand(len(x), generator=generator).log() < log_ratio
        x = torch.where(accept[:, None], proposal, x)
        value, gradient = torch.where(accept, new_value, value), torch.where(accept[:, None], new_gradient, gradient)
        rate = float(accept.double().mean())
        if k < steps // 4:
            h *= 1.02 if rate > 0.57 else 0.98
        else:
            taken.append(rate)
        kept.append(x)
    return torch.stack(kept), statistics.mean(taken)


def bootstrap_filter(
    potential: Callable, beta: float, truth: GridTruth, start: Tensor, steps: int, seed: int, substeps: int = 50
) -> list[float]:
    """Symmetric KL to the ``truth`` after each step, of a bootstrap particle filter read through a density estimate.

    Particles (n, 1) follow dX = -grad V dt + sqrt(2 / beta) dW by Euler's method, ``substeps`` a step of the truth; at
    an observation they are weighted by its likelihood and drawn again (Gordon, Salmond and Smith 1993).
    """
    generator, x, found = torch.Generator().manual_seed(seed), start.double(), []
    h = truth.tau / substeps
    for k in range(steps):
        for step, value in truth.observations:
            if step == k:
                weights = torch.softmax(-(x[:, 0] - value).square() / (2 * truth.noise**2), 0)
                x = x[torch.multinomial(weights, len(x), replacement=True, generator=generator)]
        for _ in range(substeps):
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x - h * gradient_of(potential, x) + math.sqrt(2 * h / beta) * z
        found.append(truth.symmetric_kl(k + 1, density_estimate(x[:, 0], truth.centres).log_density))
    return found


def density_estimate(x: Tensor, centres: Tensor) -> GridLaw:
    """Gaussian kernels of Silverman's width on the particles x (n,), by their counts in equal cells."""
    width = float(centres[1] - centres[0])
    quartiles = torch.quantile(x, torch.tensor([0.25, 0.75], dtype=x.dtype))
    spread = min(float(x.std()), float(quartiles[1] - quartiles[0]) / 1.34)
    bandwidth = 0.9 * spread * len(x) ** -0.2
    cells = ((x - centres[0]) / width).round().long().clamp(0, len(centres) - 1)
    counts = torch.bincount(cells, minlength=len(centres)).double()
    kernel = (-(centres[:, None] - centres[None]).square() / (2 * bandwidth**2)).exp()
    return GridLaw(centres, kernel @ counts)
