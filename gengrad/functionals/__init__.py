"""WHAT is descended: functionals of a measure and their velocities; importing this registers them all."""

from gengrad.functionals.base import Density, Functional, Sum
from gengrad.functionals.divergence import SinkhornDivergence
from gengrad.functionals.expression import Expression, build_expression
from gengrad.functionals.interaction import InteractionEnergy
from gengrad.functionals.internal import KL, Entropy, PowerEntropy
from gengrad.functionals.potential import PotentialEnergy
from gengrad.functionals.riesz import EnergyDistance, RieszMMD

__all__ = [
    "KL",
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
