"""HOW a transport is learned, one file per method; importing this registers them all."""

from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.flow_matching import FlowMatching
from gengrad.methods.nsgf import NSGF
from gengrad.methods.nsgf_pp import NSGFPlusPlus
from gengrad.methods.riesz_backward import RieszBackward
from gengrad.methods.riesz_forward import RieszForward
from gengrad.methods.riesz_particles import RieszParticles

__all__ = [
    "NSGF",
    "FlowMatching",
    "Method",
    "NSGFPlusPlus",
    "Part",
    "Problem",
    "RieszBackward",
    "RieszForward",
    "RieszParticles",
    "Stage",
]
