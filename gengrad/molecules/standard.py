"""Standardisation: from what a file says to one canonical SMILES, or the reason why not."""

from __future__ import annotations

from functools import lru_cache

from pydantic import Field
from rdkit import Chem, rdBase
from rdkit.Chem.MolStandardize import rdMolStandardize

from gengrad.registry import Settings


class Standard(Settings):
    """What is done to a molecule. ``max_length`` in characters of SMILES, ``max_atoms`` heavy atoms."""

    stereo: bool = False  # keep it
    isotopes: bool = False  # keep them
    charges: bool = False  # keep them, where they can be neutralised
    salts: bool = False  # keep all fragments
    max_length: int = Field(1000, ge=1)
    max_atoms: int = Field(100, ge=1)
    elements: list[str] = ["H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Se", "Br", "I"]


def standardise(kind: str, text: str, settings: Standard) -> tuple[str, list[str]]:
    """The canonical SMILES of ``text`` and what was changed; ``kind`` is ``"smiles"`` or ``"molblock"``.

    Fragments, isotopes, charges, stereo in this order: the largest fragment (most heavy atoms, then weight) stands for
    a salt. Raises ``ValueError`` with the reason why a molecule is refused. Lengths and atoms are looked at before
    anything whose time grows with them.
    """
    with rdBase.BlockLogs():
        mol = parse(kind, text, settings)
        changes = []
        if not settings.salts:
            mol = _note(mol, largest_fragment(mol), changes, "fragments removed")
        check_atoms(mol, settings)
        if not settings.isotopes and any(atom.GetIsotope() for atom in mol.GetAtoms()):
            mol = _note(mol, without_isotopes(mol), changes, "isotopes removed")
        if not settings.charges and any(atom.GetFormalCharge() for atom in mol.GetAtoms()):
            before = [atom.GetFormalCharge() for atom in mol.GetAtoms()]
            neutral = _uncharger().uncharge(mol)
            same = before == [atom.GetFormalCharge() for atom in neutral.GetAtoms()]  # a nitro group stays as it is
            mol = mol if same else _note(mol, neutral, changes, "charges neutralised")
        smiles = Chem.MolToSmiles(mol)
        if not settings.stereo and any(sign in smiles for sign in "@/\\"):
            Chem.RemoveStereochemistry(mol)
            changes.append("stereo removed")
            smiles = Chem.MolToSmiles(mol)
    return smiles, changes


def parse(kind: str, text: str, settings: Standard) -> Chem.Mol:
    """The sanitised molecule of a SMILES or an SDF record; raises ``ValueError``. The caller blocks RDKit's log."""
    if not text.strip():
        raise ValueError("empty")
    if kind == "molblock":
        mol = Chem.MolFromMolBlock(text)
        if mol is None:
            raise ValueError(_diagnosis(Chem.MolFromMolBlock(text, sanitize=False), "not a readable SDF record"))
        return mol
    if len(text) > settings.max_length:
        raise ValueError(f"longer than {settings.max_length} characters ({len(text)})")
    mol = Chem.MolFromSmiles(text)
    if mol is None:
        raise ValueError(_diagnosis(Chem.MolFromSmiles(text, sanitize=False), "not a SMILES"))
    return mol


def _diagnosis(raw: Chem.Mol | None, otherwise: str) -> str:
    """What is wrong with a molecule that could be read, though not sanitised."""
    problems = Chem.DetectChemistryProblems(raw) if raw is not None else []
    return problems[0].Message() if problems else otherwise


def check_atoms(mol: Chem.Mol, settings: Standard) -> None:
    """Refuses wildcards, foreign elements, too many atoms, and a molecule without any carbon atom."""
    symbols = {atom.GetSymbol() for atom in mol.GetAtoms()}
    if "*" in symbols:
        raise ValueError("a wildcard atom (*)")
    if not mol.GetNumHeavyAtoms():
        raise ValueError("no heavy atom")
    if "C" not in symbols:
        raise ValueError("no carbon atom")
    if mol.GetNumHeavyAtoms() > settings.max_atoms:
        raise ValueError(f"more than {settings.max_atoms} heavy atoms ({mol.GetNumHeavyAtoms()})")
    foreign = sorted(symbols - set(settings.elements))
    if foreign:
        raise ValueError(f"element {', '.join(foreign)}")


def largest_fragment(mol: Chem.Mol) -> Chem.Mol:
    """The fragment with most heavy atoms; then the heaviest; then the first."""
    if len(Chem.GetMolFrags(mol)) < 2:
        return mol
    from rdkit.Chem.Descriptors import MolWt

    return max(Chem.GetMolFrags(mol, asMols=True), key=lambda part: (part.GetNumHeavyAtoms(), MolWt(part)))


def without_isotopes(mol: Chem.Mol) -> Chem.Mol:
    """The same with natural isotopes; deuterium becomes an implicit hydrogen."""
    for atom in mol.GetAtoms():
        atom.SetIsotope(0)
    return Chem.RemoveHs(mol)


@lru_cache(1)
def _uncharger() -> rdMolStandardize.Uncharger:
    return rdMolStandardize.Uncharger()


def _note(before: Chem.Mol, after: Chem.Mol, changes: list[str], what: str) -> Chem.Mol:
    if after is not before:
        changes.append(what)
    return after
