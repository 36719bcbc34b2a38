"""WHAT is descended: functionals of a particle cloud and their velocities; importing this registers them all."""

from gengrad.functionals.base import Functional
from gengrad.functionals.divergence import SinkhornDivergence
from gengrad.functionals.riesz import EnergyDistance, RieszMMD

__all__ = ["EnergyDistance", "Functional", "RieszMMD", "SinkhornDivergence"]
