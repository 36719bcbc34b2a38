"""WHAT is descended: functionals of a measure and their velocities; importing this registers them all."""

from gengrad.functionals.base import Density, Functional, Sum
from gengrad.functionals.divergence import SinkhornDivergence
from gengrad.functionals.expression import Expression, build_expression
from gengrad.functionals.interaction import InteractionEnergy
from gengrad.functionals.internal import KL, Entropy, PowerEntropy
from gengrad.functionals.potential import PotentialEnergy
from gengrad.functionals.riesz import MMD, EnergyDistance, RieszMMD
from gengrad.registry import import_all

import_all(__name__, __path__)  # what has a file is registered, also where no name of it is public

__all__ = [
    "KL",
    "MMD",
    "Density",
    "EnergyDistance",
    "Entropy",
    "Expression",
    "Functional",
    "InteractionEnergy",
    "PotentialEnergy",
    "PowerEntropy",
    "RieszMMD",
    "SinkhornDivergence",
    "Sum",
    "build_expression",
]
