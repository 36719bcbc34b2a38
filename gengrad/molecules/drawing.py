"""Structures as SVG: alone, or one drawn like the one it came from, with what is new in it marked."""

from __future__ import annotations

from rdkit import Chem
from rdkit.Chem import rdDepictor, rdFMCS
from rdkit.Chem.Draw import rdMolDraw2D

SIZE = (260, 210)
MOST = 100  # heavy atoms that are drawn
NEW = (0.69, 0.82, 0.93)  # behind the atoms that the parent does not have
SECONDS = 1  # for a common substructure


def structure(smiles: str, size: tuple[int, int] = SIZE) -> str | None:
    """A SMILES that is known to be readable as SVG; None for one too large to draw."""
    mol = Chem.MolFromSmiles(smiles)
    if mol is None or mol.GetNumHeavyAtoms() > MOST:
        return None
    rdDepictor.Compute2DCoords(mol)
    return _svg(mol, [], [], size)


def beside(parent: str, child: str, size: tuple[int, int] = SIZE) -> tuple[str, str] | None:
    """Both as SVG, the child turned as its parent, its atoms and bonds outside their common substructure marked.

    The common substructure is the largest found within a second; without one of three atoms each is drawn by itself.
    """
    a, b = Chem.MolFromSmiles(parent), Chem.MolFromSmiles(child)
    if a is None or b is None or max(a.GetNumHeavyAtoms(), b.GetNumHeavyAtoms()) > MOST:
        return None
    rdDepictor.Compute2DCoords(a)
    rdDepictor.Compute2DCoords(b)
    common = rdFMCS.FindMCS([a, b], timeout=SECONDS, ringMatchesRingOnly=True, completeRingsOnly=True)
    pattern = Chem.MolFromSmarts(common.smartsString) if common.numAtoms >= 3 else None
    at = (a.GetSubstructMatch(pattern), b.GetSubstructMatch(pattern)) if pattern is not None else ((), ())
    if not at[0] or not at[1]:
        return _svg(a, [], [], size), _svg(b, [], [], size)
    rdDepictor.GenerateDepictionMatching2DStructure(b, a, list(zip(*at)))
    new = [i for i in range(b.GetNumAtoms()) if i not in at[1]]
    bonds = [x.GetIdx() for x in b.GetBonds() if x.GetBeginAtomIdx() in new or x.GetEndAtomIdx() in new]
    return _svg(a, [], [], size), _svg(b, new, bonds, size)


def _svg(mol: Chem.Mol, atoms: list[int], bonds: list[int], size: tuple[int, int]) -> str:
    drawer = rdMolDraw2D.MolDraw2DSVG(*size)
    options = drawer.drawOptions()
    options.clearBackground = False
    options.padding = 0.03
    options.bondLineWidth = 1.6
    options.highlightBondWidthMultiplier = 12
    options.fixedFontSize = 13
    options.maxFontSize = 14
    colour = {"highlightAtomColors": {i: NEW for i in atoms}, "highlightBondColors": {i: NEW for i in bonds}}
    rdMolDraw2D.PrepareAndDrawMolecule(drawer, mol, highlightAtoms=atoms, highlightBonds=bonds, **colour)
    drawer.FinishDrawing()
    return drawer.GetDrawingText()
