"""HOW a transport is learned, one file per method; importing this registers them all."""

from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.flow_matching import FlowMatching
from gengrad.methods.jko_filter import JKOFilter
from gengrad.methods.jko_icnn import JKOICNN
from gengrad.methods.jko_operator import JKOOperator
from gengrad.methods.nsgf import NSGF
from gengrad.methods.nsgf_pp import NSGFPlusPlus
from gengrad.methods.particles import Particles
from gengrad.methods.riesz_backward import RieszBackward
from gengrad.methods.riesz_forward import RieszForward
from gengrad.registry import import_all

import_all(__name__, __path__)  # what has a file is registered, also where no name of it is public

__all__ = [
    "JKOICNN",
    "NSGF",
    "FlowMatching",
    "JKOFilter",
    "JKOOperator",
    "Method",
    "NSGFPlusPlus",
    "Part",
    "Particles",
    "Problem",
    "RieszBackward",
    "RieszForward",
    "Stage",
]
