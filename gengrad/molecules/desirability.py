"""Transforms of a property to a desirability in [0, 1], and how desirabilities are put together.

The sigmoids have the shapes and default constants that users of REINVENT know. All of them work on tensors of any
shape, pass NaN on, and have a gradient wherever the formula has one.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gengrad.registry import TRANSFORMS, Configured, Settings

FLOOR = 1e-8  # a desirability of 0 counts as this in the geometric mean


class Transform(Configured):
    """x -> s in [0, 1], elementwise."""

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Interval(Settings):
    """``low`` < ``high``, in the units of the property."""

    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must lie below high={self.high:g}")
        return self


def sigmoid_10(x: Tensor) -> Tensor:
    """1 / (1 + 10^-x)."""
    return torch.sigmoid(math.log(10) * x)


@TRANSFORMS.register("sigmoid")
class Sigmoid(Transform):
    """s = 1 / (1 + 10^(-10 k (x - (low + high) / 2) / (high - low))): 1/2 in the middle, near 1 from ``high`` on."""

    class Config(Interval):
        k: float = Field(0.5, gt=0)

    def __call__(self, x):
        low, high, k = self.config.low, self.config.high, self.config.k
        return sigmoid_10(10 * k * (x - (low + high) / 2) / (high - low))


@TRANSFORMS.register("reverse_sigmoid")
class ReverseSigmoid(Sigmoid):
    """One minus the sigmoid: near 1 up to ``low``, near 0 from ``high`` on."""

    def __call__(self, x):
        return 1 - super().__call__(x)


@TRANSFORMS.register("double_sigmoid")
class DoubleSigmoid(Transform):
    """Near 1 between ``low`` and ``high``, 1/2 at both (the slopes permitting).

    s = max(0, sigma(coef_si (x - low) / coef_div) - sigma(coef_se (x - high) / coef_div)), sigma(x) = 1 / (1 + 10^-x).
    """

    class Config(Interval):
        coef_div: float = Field(100.0, gt=0)
        coef_si: float = Field(150.0, gt=0)
        coef_se: float = Field(150.0, gt=0)

    def __call__(self, x):
        c = self.config
        rise = sigmoid_10(c.coef_si * (x - c.low) / c.coef_div)
        fall = sigmoid_10(c.coef_se * (x - c.high) / c.coef_div)
        return (rise - fall).clamp(min=0)


@TRANSFORMS.register("step")
class Step(Transform):
    """1 where ``low`` <= x <= ``high``, else 0; either end may be left out."""

    class Config(Settings):
        low: float | None = None
        high: float | None = None

        @model_validator(mode="after")
        def _ordered(self):
            if self.low is None and self.high is None:
                raise ValueError("give low, high or both")
            if self.low is not None and self.high is not None and self.low > self.high:
                raise ValueError(f"low={self.low:g} must not lie above high={self.high:g}")
            return self

    def __call__(self, x):
        return torch.where(x.isnan(), x, within(x, self.config.low, self.config.high).to(x.dtype))


@TRANSFORMS.register("linear")
class Linear(Transform):
    """s = (x - low) / (high - low), cut off at 0 and 1."""

    class Config(Interval):
        pass

    def __call__(self, x):
        return ((x - self.config.low) / (self.config.high - self.config.low)).clamp(0, 1)


@TRANSFORMS.register("reverse_linear")
class ReverseLinear(Linear):
    """One minus the linear ramp."""

    def __call__(self, x):
        return 1 - super().__call__(x)


@TRANSFORMS.register("gaussian")
class Gaussian(Transform):
    """s = exp(-(x - mean)^2 / (2 deviation^2))."""

    class Config(Settings):
        mean: float
        deviation: float = Field(gt=0)

    def __call__(self, x):
        return torch.exp(-((x - self.config.mean) ** 2) / (2 * self.config.deviation**2))


@TRANSFORMS.register("identity")
class Identity(Transform):
    """s = x, for a scorer whose values lie in [0, 1]."""

    def __call__(self, x):
        return x


def within(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Whether low <= x <= high, where given; False for NaN."""
    return (x >= (-math.inf if low is None else low)) & (x <= (math.inf if high is None else high))


def in_order(at_least: float | None, at_most: float | None) -> None:
    """Raises ``ValueError`` for bounds that nothing lies within."""
    if at_least is not None and at_most is not None and at_least > at_most:
        raise ValueError(f"at_least={at_least:g} must not lie above at_most={at_most:g}")


class Bounds(Settings):
    """From ``at_least`` to ``at_most``; one of the two may be left out."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _some(self):
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most or both")
        in_order(self.at_least, self.at_most)
        return self

    def hold(self, values: Tensor) -> Tensor:
        """Which of the values lie within, bool; False for NaN."""
        return within(values, self.at_least, self.at_most)

    def __str__(self) -> str:
        ends = (("at least", self.at_least), ("at most", self.at_most))
        return " and ".join(f"{name} {end:g}" for name, end in ends if end is not None)


def weighted_log(s: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i log max(s_i, 1e-8) / sum_i w_i over the s_i (n, k) that are not NaN, (n,); NaN where none is left."""
    known = ~s.isnan()
    w = weights * known
    logs = torch.where(known, s, torch.ones_like(s)).clamp(min=FLOOR).log()
    return (w * logs).sum(1) / w.sum(1)


def geometric_mean(s: Tensor, weights: Tensor) -> Tensor:
    """prod_i s_i^(w_i / sum w), (n, k) -> (n,): each s_i at least 1e-8, NaN left out and the weights renormalised."""
    return weighted_log(s, weights).exp()


def arithmetic_mean(s: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i s_i / sum w, (n, k) -> (n,): NaN left out and the weights renormalised."""
    w = weights * ~s.isnan()
    return (w * s.nan_to_num(0.0)).sum(1) / w.sum(1)


MEANS = {"geometric_mean": geometric_mean, "arithmetic_mean": arithmetic_mean}
