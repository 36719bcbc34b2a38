"""Molecules: reading, standardising, scorers and objectives; importing this registers the scorers.

Worker processes import this room, so nothing here loads PyTorch; ``objective``, ``scoring`` and ``metrics`` do.
"""

from gengrad.molecules.library import library
from gengrad.molecules.outside import Program, PythonFile
from gengrad.molecules.prepare import prepare, prepare_file
from gengrad.molecules.properties import Scorer
from gengrad.molecules.reading import Row, read_molecules
from gengrad.molecules.references import Alerts, Similarity, Substructure
from gengrad.molecules.standard import Standard, standardise

__all__ = [
    "Alerts",
    "Program",
    "PythonFile",
    "Row",
    "Scorer",
    "Similarity",
    "Standard",
    "Substructure",
    "library",
    "prepare",
    "prepare_file",
    "read_molecules",
    "standardise",
]
