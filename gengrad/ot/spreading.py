"""Closed forms of flows that keep their shape: porous medium (Barenblatt) and aggregation; radii and energies."""

from __future__ import annotations

import math

from scipy.optimize import brentq


def barenblatt_constant(m: float, d: int) -> float:
    """a with rho(x) = R^{-d} (a (1 - |x|^2 / R^2))^{1/(m-1)} of unit mass.

    int (1 - |y|^2)^p dy = pi^{d/2} Gamma(p + 1) / Gamma(p + 1 + d/2), p = 1/(m-1).
    """
    p = 1 / (m - 1)
    ball = math.pi ** (d / 2) * math.gamma(p + 1) / math.gamma(p + 1 + d / 2)
    return ball ** (1 - m)


def barenblatt_radius(r_0: float, t: float, m: float, d: int) -> float:
    """R(t) of the porous medium equation from R_0: R^{g} = R_0^{g} + g k t, g = d(m-1) + 2, k = 2am/(m-1) (Vazquez)."""
    g, k = d * (m - 1) + 2, 2 * barenblatt_constant(m, d) * m / (m - 1)
    return (r_0**g + g * k * t) ** (1 / g)


def barenblatt_jko_radius(r: float, tau: float, m: float, d: int, stiffness: float = 0.0) -> float:
    """The implicit step of int rho^m / (m-1) + stiffness E |x|^2 / 2: R' - R = tau (k R'^{1-g} - stiffness R')."""
    g, k = d * (m - 1) + 2, 2 * barenblatt_constant(m, d) * m / (m - 1)

    def excess(new: float) -> float:
        return new - r - tau * (k * new ** (1 - g) - stiffness * new)

    return brentq(excess, 1e-9, r + tau * k * min(r, 1.0) ** (1 - g) + 10 + tau * k, xtol=1e-13)


def barenblatt_energy(r: float, m: float, d: int, stiffness: float = 0.0) -> float:
    """int rho^m / (m-1) + stiffness E |x|^2 / 2 of the profile with radius R."""
    p, a = 1 / (m - 1), barenblatt_constant(m, d)
    # E r^{m-1} = a R^{-d(m-1)} E (1 - s), and E s = (d/2) / (p + 1 + d/2) for s = |x|^2 / R^2 ~ Beta(d/2, p + 1)
    share = (d / 2) / (p + 1 + d / 2)
    return a * r ** (-d * (m - 1)) * (1 - share) / (m - 1) + stiffness * r**2 * share / 2


def barenblatt_continuous_radius(r: float, t: float, m: float, d: int, stiffness: float) -> float:
    """R(t) with a quadratic potential: dR/dt = k R^{1-g} - stiffness R, by the substitution S = R^g."""
    g, k = d * (m - 1) + 2, 2 * barenblatt_constant(m, d) * m / (m - 1)
    if stiffness == 0:
        return barenblatt_radius(r, t, m, d)
    steady = k / stiffness  # dS/dt = g (k - stiffness S)
    return (steady + (r**g - steady) * math.exp(-g * stiffness * t)) ** (1 / g)


# Aggregation with W = |z|^2/2 - log|z|, F = 1/2 E W: the semicircle on the line, the uniform disc in the plane


def aggregation_radius(r_0: float, t: float, d: int) -> float:
    """R(t)^2 = R_*^2 + (R_0^2 - R_*^2) e^{-2t}, R_*^2 = 2 for the semicircle (d = 1), 1 for the disc (d = 2)."""
    steady = {1: 2.0, 2: 1.0}[d]
    return math.sqrt(steady + (r_0**2 - steady) * math.exp(-2 * t))


def aggregation_jko_radius(r: float, tau: float, d: int) -> float:
    """R' = (R + sqrt(R^2 + 4 R_*^2 tau (1 + tau))) / (2 (1 + tau))."""
    steady = {1: 2.0, 2: 1.0}[d]
    return (r + math.sqrt(r**2 + 4 * steady * tau * (1 + tau))) / (2 * (1 + tau))


def aggregation_energy(r: float, d: int) -> float:
    """1/2 E W at radius R: E|z|^2 = 2 E|x|^2; E log|z| = log(R/2) - 1/4 + ... of the shape."""
    if d == 1:  # semicircle: E x^2 = R^2/4, E log|x - x'| = log(R/2) - 1/4
        return r**2 / 8 - (math.log(r / 2) - 0.25) / 2
    return r**2 / 4 - (math.log(r) - 0.25) / 2  # disc: E|x|^2 = R^2/2, E log|x - x'| = log R - 1/4


def ring_radius(d: int) -> float:
    """Radius of the sphere on which W = |z|^4/4 - |z|^2/2 comes to rest: sqrt(d / (2d + 2))."""
    return math.sqrt(d / (2 * d + 2))
