"""Importing this registers every scorer, and loads no PyTorch: worker processes do it."""

from gengrad.molecules.outside import Program, PythonFile
from gengrad.molecules.properties import Scorer
from gengrad.molecules.references import Alerts, Similarity, Substructure

__all__ = ["Alerts", "Program", "PythonFile", "Scorer", "Similarity", "Substructure"]
