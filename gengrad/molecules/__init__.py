"""Molecules: reading, standardising, scorers, objectives, metrics.

Nothing is imported before it is used: worker processes need little of this room, and no PyTorch. The scorers register
with ``gengrad.molecules.scorers``, the transforms with ``desirability``, the metrics with ``metrics``.
"""

from __future__ import annotations

from importlib import import_module

_PUBLIC = {
    "library": "library",
    "read_molecules": "reading",
    "Standard": "standard",
    "standardise": "standard",
    "prepare_file": "prepare",
    "load_objective": "objective",
    "score_file": "scoring",
    "describe": "metrics",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f"gengrad.molecules.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'gengrad.molecules' has no attribute {name!r}")
