"""WHAT is descended: functionals of a particle cloud and their velocities; importing this registers them all."""

from gengrad.functionals.base import Functional
from gengrad.functionals.divergence import EnergyDistance, SinkhornDivergence

__all__ = ["EnergyDistance", "Functional", "SinkhornDivergence"]
