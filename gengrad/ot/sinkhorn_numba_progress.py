"""What a sweep of the fused path tells: residual, rates and errors; and the accelerated step that it leads to.

The letters and constants of `sinkhorn_core`, whose classes Anderson and Progress these functions are. They are inlined
where they are used, and numba's cache does not see a change of them: delete `__pycache__` after one.
"""

from __future__ import annotations

import math

import numpy as np

from .numba_math import F, inner, largest, log32
from .sinkhorn_core import LIMIT, PROBATION


@inner
def residual(b, c, r):
    """r = log(b / c), bounded; returns its rms under b, and the marginal error."""
    size, marginal = F(0.0), F(0.0)
    for j in range(b.shape[0]):
        marginal += abs(c[j] - b[j])
        ratio = log32(largest(b[j], F(1e-37))) - log32(largest(c[j], F(1e-30)))
        ratio = -largest(-largest(ratio, F(-LIMIT)), F(-LIMIT))
        r[j] = ratio if b[j] > F(0.0) else F(0.0)
        size += b[j] * r[j] * r[j]
    return math.sqrt(size), marginal


@inner
def solve_small(gram, rhs, k):
    """Solve the symmetric positive definite k x k system in place by Cholesky; gram and rhs are destroyed."""
    for i in range(k):
        for j in range(i + 1):
            total = gram[i, j]
            for l in range(j):
                total -= gram[i, l] * gram[j, l]
            gram[i, j] = math.sqrt(max(total, 1e-300)) if i == j else total / gram[j, j]
    for i in range(k):
        for l in range(i):
            rhs[i] -= gram[i, l] * rhs[l]
        rhs[i] /= gram[i, i]
    for i in range(k - 1, -1, -1):
        for l in range(i + 1, k):
            rhs[i] -= gram[l, i] * rhs[l]
        rhs[i] /= gram[i, i]


@inner
def anderson_step(s, r, c, ds, dr, count, reach):
    """s <- s + r - (dS + dR) gamma, gamma minimising |sqrt(c) (r - dR gamma)| (see `sinkhorn_core.Anderson`)."""
    m = s.shape[0]
    k = min(count, ds.shape[0])
    gram, rhs, w = np.zeros((k, k)), np.zeros(k), np.empty(m, F)
    trace = 0.0
    for p in range(k):
        for j in range(m):
            w[j] = c[j] * dr[p, j]
        for q in range(p, k):
            total = F(0.0)
            for j in range(m):
                total += w[j] * dr[q, j]
            gram[p, q] = gram[q, p] = total
        total = F(0.0)
        for j in range(m):
            total += w[j] * r[j]
        rhs[p] = total
        trace += gram[p, p]
    for p in range(k):
        gram[p, p] += 1e-6 * max(trace, 1e-30)
    solve_small(gram, rhs, k)
    w[:] = F(0.0)
    for p in range(k):
        g = F(rhs[p])
        for j in range(m):
            w[j] += g * (ds[p, j] + dr[p, j])
    longest = F(1e-37)
    for j in range(m):
        longest = largest(longest, F(abs(w[j])))
    scale = F(min(reach / longest, 1.0))
    for j in range(m):
        s[j] += r[j] - scale * w[j]


@inner
def rms_gap(u, v, a):
    """Root of the weighted mean square of the rows of u - v."""
    total = 0.0
    for i in range(u.shape[0]):
        square = F(0.0)
        for q in range(u.shape[1]):
            square += (u[i, q] - v[i, q]) ** 2
        total += a[i] * square
    return math.sqrt(total)


@inner
def moment_gap(zt, c, b):
    """|sum_j (c_j - b_j) z_j|: the mean error of the barycentric map, through the probes."""
    square = 0.0
    for q in range(zt.shape[0]):
        total = F(0.0)
        for j in range(b.shape[0]):
            total += (c[j] - b[j]) * zt[q, j]
        square += total * total
    return math.sqrt(square)


@inner
def watched_rate(rate, s, s_old, r, r_old, c):
    """The slowest rate, with what the last step tells of it (see `sinkhorn_core.Progress.watch`)."""
    total, mean, square, inner = F(0.0), F(0.0), F(0.0), F(0.0)
    for j in range(s.shape[0]):
        total += c[j]
        mean += c[j] * (s[j] - s_old[j])
    mean /= total
    for j in range(s.shape[0]):
        d = s[j] - s_old[j] - mean
        square += c[j] * d * d
        inner += c[j] * d * (r[j] - r_old[j])
    found = 1.0 + inner / max(square, F(1e-30))
    if 1e-6 < square < 1.0 and found < 1.0:
        return max(rate, min(found, 1 - 1e-4))
    return rate


@inner
def least_left(rate, before, now, age):
    """What iterations `before` to `now` leave of the slowest mode at best (see `sinkhorn_core.Progress.error`)."""
    if age < PROBATION:
        return 0.9999 if rate > 0.8 else max(rate, 0.25)
    if now - before < 2:
        return max(rate, 0.25)
    angle = math.acosh(max(2 / min(max(rate, 1e-6), 1 - 1e-9) - 1, 1.0))
    top = math.exp(-(now - before) * angle) + math.exp(-(now + before) * angle)
    return max(top / (1 + math.exp(-2 * now * angle)), 0.5)
