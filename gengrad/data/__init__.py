"""Where mass starts and ends: toy densities, Gaussians, images, arrays; importing this registers them all."""

from gengrad.data.arrays import Array
from gengrad.data.base import Distribution, FiniteData
from gengrad.data.digits import Digits
from gengrad.data.diracs import Diracs
from gengrad.data.draws import Keyed, Stream, draw, generator_for
from gengrad.data.gaussians import Gaussian, GaussianMixture, StandardNormal, Uniform
from gengrad.data.image_density import ImageDensity
from gengrad.data.image_folder import ImageFolder
from gengrad.data.images import CIFAR10, MNIST, FashionMNIST, ImageArray
from gengrad.data.posterior import LogisticPosterior
from gengrad.data.profiles import Ball, Barenblatt, Semicircle
from gengrad.data.riesz_profile import RieszProfile
from gengrad.data.space import Space
from gengrad.data.toy2d import (
    Checkerboard,
    EightGaussians,
    Moons,
    Pinwheel,
    SwissRoll,
    TwentyFiveGaussians,
    TwoSpirals,
)
from gengrad.registry import import_all

import_all(__name__, __path__)  # what has a file is registered, also where no name of it is public

__all__ = [
    "CIFAR10",
    "MNIST",
    "Array",
    "Ball",
    "Barenblatt",
    "Checkerboard",
    "Digits",
    "Diracs",
    "Distribution",
    "EightGaussians",
    "FashionMNIST",
    "FiniteData",
    "Gaussian",
    "GaussianMixture",
    "ImageArray",
    "ImageDensity",
    "ImageFolder",
    "Keyed",
    "LogisticPosterior",
    "Moons",
    "Pinwheel",
    "RieszProfile",
    "Semicircle",
    "Space",
    "StandardNormal",
    "Stream",
    "SwissRoll",
    "TwentyFiveGaussians",
    "TwoSpirals",
    "Uniform",
    "draw",
    "generator_for",
]
