"""The symmetric self problem of the fused path, on one triangle of its kernel; see `sinkhorn_self`."""

from __future__ import annotations

import math

import numpy as np

from .numba_math import F, exp32, exp_any, inner, jit, largest, log32


@jit
def self_kernel(dot, x, xt, half, inv_eps, kernel):
    """exp(-|x_i - x_j|^2 / (2 eps)) in the upper triangle, by differences where the products are not stored."""
    n = half.shape[0]
    for i in range(n):
        row, other, hi = (
            kernel[i, i:],
            half[i:],
            half[i],
        )  # slices: loops from zero are the ones that vectorise
        if dot.shape[0] > 0:
            products = dot[i, i:]
            for j in range(row.shape[0]):
                row[j] = (products[j] - hi - other[j]) * inv_eps
        else:
            for k in range(xt.shape[0]):
                xi, xk, scale = xt[k, i], xt[k, i:], F(-0.5) * inv_eps
                for j in range(row.shape[0]):
                    gap = (xi - xk[j]) * (xi - xk[j]) * scale
                    row[j] = gap if k == 0 else row[j] + gap
        row[0] = F(0.0)
        for j in range(row.shape[0]):
            row[j] = exp32(-largest(-row[j], F(0.0)))


@jit
def bound_sums(dot, half, root):
    """The sums of `sinkhorn_self.skip_bound` from the products z z' (upper triangle), |z|^2 / 2 and sqrt(a)."""
    n = half.shape[0]
    mass, square, rows = 0.0, 0.0, np.zeros(n, F)
    for i in range(n):
        row, below, other, weights = dot[i, i + 1 :], rows[i + 1 :], half[i + 1 :], root[i + 1 :]
        hi, wi, near_mass, near_row = half[i], root[i], F(0.0), F(0.0)
        for j in range(row.shape[0]):
            gap = largest(hi + other[j] - row[j], F(0.0))
            far = largest(gap, F(0.5))
            near = F(math.sqrt(F(2.0) * far)) * exp32(-far)  # t exp(-t^2 / 2), at its largest below t = 1
            near_mass += weights[j] * exp32(-gap)
            near_row += weights[j] * near
            below[j] += wi * near
        rows[i] += near_row
        mass += 2.0 * wi * near_mass
    for i in range(n):
        square += rows[i] * rows[i]  # (sqrt(a_i) rows_i)^2 / a_i
    return mass, square


@inner
def symmetric_times(kernel, u, out):
    """out = K u, K symmetric and stored in its upper triangle."""
    n = u.shape[0]
    out[:] = F(0.0)
    for i in range(n):
        row, other, below = kernel[i, i + 1 :], u[i + 1 :], out[i + 1 :]
        ui, total = u[i], kernel[i, i] * u[i]
        for j in range(row.shape[0]):
            total += row[j] * other[j]
        for j in range(row.shape[0]):
            below[j] += row[j] * ui
        out[i] += total


@jit
def solve_self(kernel, u, a, spread, rate, goal, residual_goal, max_iter):
    """u <- u (a / (u K u))^theta in place, at a total mass of one; see `sinkhorn_self.solve_self`.

    Returns K u, the iterations, the error, and the mean diagonal of the plan's normalised rows.
    """
    n = a.shape[0]
    ku, r, before = np.empty(n, F), np.empty(n, F), np.zeros(n, F)
    k, theta = 0, 1.0
    while True:
        k += 1
        symmetric_times(kernel, u, ku)
        total = F(0.0)
        for i in range(n):
            total += u[i] * ku[i]
        one, log_total = F(1.0) / F(math.sqrt(total)), log32(total)
        size, inner, square = F(0.0), F(0.0), F(0.0)
        for i in range(n):
            ratio = log32(largest(a[i], F(1e-37))) - log32(largest(u[i] * ku[i], F(1e-37))) + log_total
            r[i] = ratio if a[i] > F(0.0) else F(0.0)
            size += a[i] * r[i] * r[i]
            inner += a[i] * r[i] * before[i]
            square += a[i] * before[i] * before[i]
            u[i] *= one
            ku[i] *= one
        size = F(math.sqrt(size))
        if k >= max_iter or (size * spread <= goal and size <= residual_goal):
            diagonal = F(0.0)
            for i in range(n):
                diagonal += a[i] * u[i] / ku[i]
            return ku, k, size * spread, diagonal
        if k > 1:
            seen = (1.0 - inner / max(square, 1e-37)) / theta - 1.0
            rate = max(rate, min(seen, 1.0))
        theta = 2.0 / (2.0 + rate)
        for i in range(n):
            before[i] = r[i]
            u[i] *= exp_any(largest(-largest(-F(theta) * r[i], F(-60.0)), F(-60.0)))


@jit
def log_ratio(u, a, eps, h):
    """Fills in h = eps log(u / a); returns <a, h>."""
    inner = 0.0
    for i in range(u.shape[0]):
        h[i] = eps * (log32(largest(u[i], F(1e-37))) - log32(largest(a[i], F(1e-37))))
        inner += a[i] * h[i]
    return inner


@jit
def symmetric_averages(kernel, u, ku, xt, out):
    """out (n, p) = sum_j K_ij u_j x_j / (K u)_i for xt (p, n), in one reading of the upper triangle."""
    n, p = u.shape[0], xt.shape[0]
    w, columns = np.empty((p, n), F), np.zeros((p, n), F)
    for q in range(p):
        for j in range(n):
            w[q, j] = u[j] * xt[q, j]
    for i in range(n):
        row = kernel[i, i + 1 :]
        for q in range(p):
            other, below, wi = w[q, i + 1 :], columns[q, i + 1 :], w[q, i]
            total = kernel[i, i] * wi
            for j in range(row.shape[0]):
                total += row[j] * other[j]
                below[j] += row[j] * wi
            columns[q, i] += total
    for i in range(n):
        for q in range(p):
            out[i, q] = columns[q, i] / ku[i]


TILE = 8  # rows of a tile that is turned over in cache


@jit
def mirror_blocks(kernel, size):
    """Fills in the lower triangle of the diagonal blocks of `size` rows from the upper one, tile by tile."""
    n = kernel.shape[0]
    for first in range(0, n, size):
        last = min(first + size, n)
        for top in range(first, last, TILE):
            bottom = min(top + TILE, last)
            for i in range(top, bottom):
                for j in range(top, i):
                    kernel[i, j] = kernel[j, i]
            for left in range(first, top, TILE):
                for j in range(left, left + TILE):
                    source = kernel[j, top:bottom]
                    for i in range(source.shape[0]):
                        kernel[top + i, j] = source[i]
