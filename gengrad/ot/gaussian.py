"""Closed forms of transport between Gaussians N(m, S), in NumPy-free PyTorch; the cost is |x - y|^2 / 2."""

from __future__ import annotations

import torch
from torch import Tensor


def _root(s: Tensor, name: str) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix (..., d, d)."""
    if s.ndim < 2 or s.shape[-1] != s.shape[-2]:
        raise ValueError(f"gaussian: {name} has shape {tuple(s.shape)}; a covariance is (..., d, d).")
    values, vectors = torch.linalg.eigh((s + s.mT) / 2)
    if bool((values < -1e-5 * values.abs().amax(-1, keepdim=True)).any()):
        raise ValueError(
            f"gaussian: {name} has the eigenvalue {float(values.min()):.3g}; a covariance has none below zero."
        )
    return (vectors * values.clamp_min(0.0).sqrt()[..., None, :]) @ vectors.mT


def bures_map(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> tuple[Tensor, Tensor]:
    """The optimal map T(x) = mean_y + K (x - mean_x) between Gaussians, as (K, offset) with T(x) = K x + offset.

    K = S_x^{-1/2} (S_x^{1/2} S_y S_x^{1/2})^{1/2} S_x^{-1/2} (Dowson and Landau 1982). Shapes (d,), (d, d). cov_x
    must be invertible; ValueError if a covariance is not square or not positive semidefinite.
    """
    root = _root(cov_x, "cov_x")
    inverse = torch.linalg.inv(root)
    k = inverse @ _root(root @ cov_y @ root, "cov_y") @ inverse
    return k, mean_y - (k @ mean_x[..., None])[..., 0]


def gaussian_w2(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    """W_2, the root of inf E |x - y|^2 (no half): |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x^{1/2} S_y S_x^{1/2})^{1/2})."""
    root = _root(cov_x, "cov_x")
    cross = _root(root @ cov_y @ root, "cov_y")
    trace = (cov_x + cov_y - 2 * cross).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.sqrt(((mean_x - mean_y).square().sum(-1) + trace).clamp_min(0.0))


def gaussian_entropic_cost(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, epsilon: float) -> Tensor:
    """OT_eps between Gaussians: min E |x - y|^2 / 2 + eps KL(P | N_x x N_y).

    Janati, Muzellec, Peyre, Cuturi 2020 (arXiv 2006.02572), theorem 1, whose cost is |x - y|^2 and whose strength is
    2 sigma^2; here sigma^2 = epsilon and everything is halved:
    (|m_x - m_y|^2 + tr S_x + tr S_y - tr D + d eps (1 - log 2 eps) + eps log det(D + eps I)) / 2,
    D = (4 S_x^{1/2} S_y S_x^{1/2} + eps^2 I)^{1/2}.
    """
    if not epsilon > 0:
        raise ValueError(
            f"gaussian_entropic_cost: epsilon is {epsilon}; it must be positive (gaussian_w2 is the limit)."
        )
    d = cov_x.shape[-1]
    eye = torch.eye(d, dtype=cov_x.dtype, device=cov_x.device)
    root = _root(cov_x, "cov_x")
    big_d = _root(4 * root @ cov_y @ root + epsilon**2 * eye, "cov_y")
    traces = (cov_x + cov_y - big_d).diagonal(dim1=-2, dim2=-1).sum(-1)
    entropy = d * epsilon * (1 - torch.log(torch.as_tensor(2.0 * epsilon, dtype=cov_x.dtype)))
    logdet = torch.linalg.slogdet(big_d + epsilon * eye).logabsdet
    return ((mean_x - mean_y).square().sum(-1) + traces + entropy + epsilon * logdet) / 2


def gaussian_kl(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    """KL(N_x | N_y) = (tr(S_y^{-1} S_x) - d - log det(S_y^{-1} S_x) + |m_x - m_y|^2_{S_y^{-1}}) / 2."""
    ratio = torch.linalg.solve(cov_y, cov_x)
    away = mean_x - mean_y
    white = torch.linalg.solve(cov_y, away[..., None])[..., 0]
    trace = ratio.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace - cov_x.shape[-1] - torch.linalg.slogdet(ratio).logabsdet + (away * white).sum(-1)) / 2


def ornstein_uhlenbeck(
    mean: Tensor, cov: Tensor, a: Tensor, b: Tensor, temperature: float, t: float
) -> tuple[Tensor, Tensor]:
    """(m_t, S_t) of dX = -A (X - b) dt + sqrt(2 temperature) dW from N(mean, cov); A (d, d) positive semidefinite.

    m_t = b + e^{-At} (m - b), S_t = e^{-At} S e^{-At} + temperature A^{-1} (I - e^{-2At}); 2 temperature t I for A = 0.
    """
    values, vectors = torch.linalg.eigh((a + a.mT) / 2)
    decay = (vectors * (-values * t).exp()) @ vectors.mT
    # (1 - e^{-2 lambda t}) / lambda, 2 t where lambda is 0
    small = values.abs() < 1e-12
    gained = torch.where(small, 2 * t, -torch.expm1(-2 * values * t) / torch.where(small, 1.0, values))
    return b + decay @ (mean - b), decay @ cov @ decay + temperature * (vectors * gained) @ vectors.mT


def gaussian_jko_step(
    mean: Tensor, cov: Tensor, a: Tensor, b: Tensor, temperature: float, tau: float
) -> tuple[Tensor, Tensor]:
    """The exact implicit step of F = E (x-b)'A(x-b)/2 + temperature Ent from N(mean, cov): (m', S').

    M = I + tau A, c = tau temperature: m' = M^{-1}(m + tau A b), Q = M^{-1/2}(S + 2cM)M^{-1/2},
    Z = (Q + (Q^2 - 4c^2 I)^{1/2}) / 2, S' = M^{-1/2} Z M^{-1/2}; whether S and A commute or not.
    """
    eye = torch.eye(len(mean), dtype=cov.dtype, device=cov.device)
    m, c = eye + tau * a, tau * temperature
    root = torch.linalg.inv(_root(m, "I + tau A"))
    q = root @ (cov + 2 * c * m) @ root
    z = (q + _root(q @ q - 4 * c**2 * eye, "Q^2 - 4 c^2 I")) / 2
    return torch.linalg.solve(m, mean + tau * a @ b), root @ z @ root
