"""Where mass starts and ends: toy densities, Gaussians, digits, arrays; importing this registers them all."""

from gengrad.data.arrays import Array
from gengrad.data.base import Distribution, FiniteData
from gengrad.data.digits import Digits
from gengrad.data.draws import Stream, draw, generator_for
from gengrad.data.gaussians import Gaussian, GaussianMixture, StandardNormal, Uniform
from gengrad.data.toy2d import (
    Checkerboard,
    EightGaussians,
    Moons,
    Pinwheel,
    SwissRoll,
    TwentyFiveGaussians,
    TwoSpirals,
)

__all__ = [
    "Array",
    "Checkerboard",
    "Digits",
    "Distribution",
    "EightGaussians",
    "FiniteData",
    "Gaussian",
    "GaussianMixture",
    "Moons",
    "Pinwheel",
    "StandardNormal",
    "Stream",
    "SwissRoll",
    "TwentyFiveGaussians",
    "TwoSpirals",
    "Uniform",
    "draw",
    "generator_for",
]
