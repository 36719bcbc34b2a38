"""HOW a transport is learned, one file per method; importing this registers them all."""

from gengrad.methods.base import Method, Part, Problem, Stage
from gengrad.methods.flow_matching import FlowMatching
from gengrad.methods.nsgf import NSGF
from gengrad.methods.nsgf_pp import NSGFPlusPlus

__all__ = ["NSGF", "FlowMatching", "Method", "NSGFPlusPlus", "Part", "Problem", "Stage"]
