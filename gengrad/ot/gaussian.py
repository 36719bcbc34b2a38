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


def gaussian_entropic_cost(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, epsilon: float
) -> Tensor:
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
