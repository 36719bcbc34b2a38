"""Crossover and mutation of molecules as graphs, after the graph-based genetic algorithm of Jensen (2019).

Molecules are edited in their Kekule form; what comes out is canonical SMILES or nothing. Randomness is Python's
``random.Random``: this file runs in worker processes, which have no PyTorch.
"""

from __future__ import annotations

import random

from rdkit import Chem, rdBase

ELEMENTS = ("C", "N", "O", "F", "S", "Cl", "Br")
WEIGHTS = (6, 3, 3, 1, 1, 1, 0.5)  # about as often as in drugs
VALENCE = {"C": 4, "N": 3, "O": 2, "F": 1, "S": 2, "Cl": 1, "Br": 1}
SINGLE, DOUBLE, TRIPLE = Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE
TRIES = 10  # edits tried before a pair of parents is given up
RINGS = range(3, 8)  # ring sizes that a child may have, beside those of its parents


def breed(first: str, second: str | None, seed: int, mutation_rate: float, max_atoms: int) -> str | None:
    """A child of two molecules, mutated with probability ``mutation_rate``, or of one, mutated; None if none came out.

    A function of its arguments: the same child in whatever process.
    """
    rng = random.Random(seed)
    with rdBase.BlockLogs():
        parents = [_kekulised(smiles) for smiles in (first, second) if smiles is not None]
        sizes = set(RINGS) | {len(ring) for mol in parents for ring in mol.GetRingInfo().AtomRings()}
        child = parents[0]
        if len(parents) == 2:
            child = _first(lambda: crossover(*parents, rng), sizes, max_atoms)
            if child is None:
                return None
        if len(parents) == 1 or rng.random() < mutation_rate:
            base = _kekulised(Chem.MolToSmiles(child))
            child = _first(lambda: mutate(base, rng), sizes, max_atoms)
        return None if child is None else Chem.MolToSmiles(child)


def _kekulised(smiles: str) -> Chem.Mol:
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise ValueError(f"not a SMILES: {smiles}")
    Chem.Kekulize(mol, clearAromaticFlags=True)
    return mol


def _first(edit, sizes: set[int], max_atoms: int) -> Chem.Mol | None:
    """The first sound molecule among ``TRIES`` edits."""
    for _ in range(TRIES):
        made = edit()
        mol = None if made is None else sound(made, sizes, max_atoms)
        if mol is not None:
            return mol
    return None


def sound(mol: Chem.Mol, sizes: set[int], max_atoms: int) -> Chem.Mol | None:
    """The molecule sanitised, or None: in one piece, with carbon, of known ring sizes, without strained multiple bonds.

    Strained: a triple bond or two double bonds at one atom of a ring, a double bond in a ring of three or four.
    """
    mol = Chem.Mol(mol)
    if mol.GetNumAtoms() > max_atoms or len(Chem.GetMolFrags(mol)) != 1:
        return None
    try:
        Chem.SanitizeMol(mol)
    except (Chem.AtomValenceException, Chem.KekulizeException, Chem.MolSanitizeException):
        return None
    rings = mol.GetRingInfo().AtomRings()
    if any(len(ring) not in sizes for ring in rings) or all(atom.GetSymbol() != "C" for atom in mol.GetAtoms()):
        return None
    for bond in mol.GetBonds():
        small = bond.IsInRingSize(3) or bond.IsInRingSize(4)
        if bond.IsInRing() and (bond.GetBondType() == TRIPLE or (small and bond.GetBondType() == DOUBLE)):
            return None
    for atom in mol.GetAtoms():
        # the sulfur of a ring's sulfone has two double bonds, out of the ring
        doubles = [b for b in atom.GetBonds() if b.GetBondType() == DOUBLE]
        if atom.IsInRing() and len(doubles) > 1 and any(b.IsInRing() for b in doubles):
            return None
    return mol


# ------------------------------------------------------------------ crossover


def crossover(first: Chem.Mol, second: Chem.Mol, rng: random.Random) -> Chem.Mol | None:
    """A piece of each, joined: cut at a bond outside rings or through a ring, with equal chance."""
    cut = rng.choice((_cut_chain, _cut_ring))
    pieces = [cut(first, rng), cut(second, rng)]
    if None in pieces:
        return None
    (a, ends_a), (b, ends_b) = (rng.choice(piece) for piece in pieces)
    joined = Chem.RWMol(Chem.CombineMols(a, b))
    ends_b = [end + a.GetNumAtoms() for end in rng.sample(ends_b, len(ends_b))]
    if len({*zip(ends_a, ends_b)}) < len(ends_a):  # twice the same two atoms
        return None
    for x, y in zip(ends_a, ends_b):
        joined.AddBond(x, y, SINGLE)
    return joined.GetMol()


def _cut_chain(mol: Chem.Mol, rng: random.Random):
    """Two pieces, each (molecule, [atom]), by cutting a single bond outside rings; None without one."""
    bonds = [b.GetIdx() for b in mol.GetBonds() if b.GetBondType() == SINGLE and not b.IsInRing()]
    return _pieces(mol, [rng.choice(bonds)]) if bonds else None


def _cut_ring(mol: Chem.Mol, rng: random.Random):
    """Two pieces, each (molecule, [atom, atom]), by cutting two single bonds of one ring; None without such a ring."""
    single = {b.GetIdx() for b in mol.GetBonds() if b.GetBondType() == SINGLE}
    rings = [[i for i in ring if i in single] for ring in mol.GetRingInfo().BondRings()]
    rings = [ring for ring in rings if len(ring) > 1]
    return _pieces(mol, rng.sample(rng.choice(rings), 2)) if rings else None


def _pieces(mol: Chem.Mol, bonds: list[int]):
    """The two fragments with the atoms at which they were cut (one cut twice stands there twice), or None."""
    cut = Chem.FragmentOnBonds(mol, bonds, addDummies=False)
    ends = [(mol.GetBondWithIdx(b).GetBeginAtomIdx(), mol.GetBondWithIdx(b).GetEndAtomIdx()) for b in bonds]
    for end in (end for pair in ends for end in pair):
        cut.GetAtomWithIdx(end).SetNoImplicit(False)  # what the cut has freed is filled with hydrogens again
    found, places = [], []
    pieces = Chem.GetMolFrags(cut, asMols=True, sanitizeFrags=False, fragsMolAtomMapping=places)
    if len(pieces) != 2:
        return None
    for piece, atoms in zip(pieces, places):
        at = [atoms.index(end) for pair in ends for end in pair if end in atoms]
        found.append((piece, at))
    return found if all(len(at) == len(bonds) for _, at in found) else None


# ------------------------------------------------------------------ mutation


def mutate(mol: Chem.Mol, rng: random.Random) -> Chem.Mol | None:
    """One random edit; None where it has no place in this molecule."""
    edit = rng.choices(MUTATIONS, MUTATION_WEIGHTS)[0]
    return edit(Chem.RWMol(mol), rng)


def append_atom(mol: Chem.RWMol, rng: random.Random):
    """A new atom on one that has hydrogen, by a single or, with hydrogens enough, a double bond."""
    places = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetTotalNumHs() > 0]
    if not places:
        return None
    place, symbol = rng.choice(places), rng.choices(ELEMENTS, WEIGHTS)[0]
    most = min(mol.GetAtomWithIdx(place).GetTotalNumHs(), VALENCE[symbol], 2)
    mol.AddBond(place, mol.AddAtom(Chem.Atom(symbol)), DOUBLE if most == 2 and rng.random() < 0.2 else SINGLE)
    return mol


def insert_atom(mol: Chem.RWMol, rng: random.Random):
    """A new atom into a single bond: chains grow, rings become larger."""
    bonds = [b for b in mol.GetBonds() if b.GetBondType() == SINGLE]
    if not bonds:
        return None
    bond = rng.choice(bonds)
    ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
    mol.RemoveBond(*ends)
    new = mol.AddAtom(Chem.Atom(rng.choices(("C", "N", "O", "S"), (6, 3, 3, 1))[0]))
    for end in ends:
        mol.AddBond(end, new, SINGLE)
    return mol


def delete_atom(mol: Chem.RWMol, rng: random.Random):
    """An atom with at most two neighbours goes; the neighbours are joined."""
    atoms = [atom for atom in mol.GetAtoms() if atom.GetDegree() <= 2]
    if mol.GetNumAtoms() < 2 or not atoms:
        return None
    atom = rng.choice(atoms)
    neighbours = [n.GetIdx() for n in atom.GetNeighbors()]
    if len(neighbours) == 2:
        if mol.GetBondBetweenAtoms(*neighbours) is not None:
            return None
        mol.AddBond(*neighbours, SINGLE)
    mol.RemoveAtom(atom.GetIdx())
    return mol


def change_atom(mol: Chem.RWMol, rng: random.Random):
    """An uncharged atom becomes another element that its bonds allow."""
    atoms = [atom for atom in mol.GetAtoms() if not atom.GetFormalCharge() and atom.GetSymbol() in VALENCE]
    if not atoms:
        return None
    atom = rng.choice(atoms)
    used = sum(int(bond.GetBondTypeAsDouble()) for bond in atom.GetBonds())
    fitting = [e for e in ELEMENTS if e != atom.GetSymbol() and VALENCE[e] >= used]
    if not fitting:
        return None
    atom.SetAtomicNum(Chem.Atom(rng.choices(fitting, [WEIGHTS[ELEMENTS.index(e)] for e in fitting])[0]).GetAtomicNum())
    atom.SetNoImplicit(False)
    atom.SetNumExplicitHs(0)
    return mol


def change_bond(mol: Chem.RWMol, rng: random.Random):
    """A bond becomes one order higher, where both ends have hydrogen, or lower."""
    choices = []
    for bond in mol.GetBonds():
        if bond.GetBondType() in (SINGLE, DOUBLE) and all(
            atom.GetTotalNumHs() > 0 for atom in (bond.GetBeginAtom(), bond.GetEndAtom())
        ):
            choices.append((bond, DOUBLE if bond.GetBondType() == SINGLE else TRIPLE))
        if bond.GetBondType() in (DOUBLE, TRIPLE):
            choices.append((bond, SINGLE if bond.GetBondType() == DOUBLE else DOUBLE))
    if not choices:
        return None
    bond, order = rng.choice(choices)
    for atom in (bond.GetBeginAtom(), bond.GetEndAtom()):
        atom.SetNoImplicit(False)
        atom.SetNumExplicitHs(0)
    bond.SetBondType(order)
    return mol


def open_ring(mol: Chem.RWMol, rng: random.Random):
    """A single bond of a ring goes."""
    bonds = [b for b in mol.GetBonds() if b.IsInRing() and b.GetBondType() == SINGLE]
    if not bonds:
        return None
    bond = rng.choice(bonds)
    mol.RemoveBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())
    return mol


def close_ring(mol: Chem.RWMol, rng: random.Random):
    """A single bond between two atoms with hydrogen that are two to six bonds apart: a ring of three to seven."""
    free = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetTotalNumHs() > 0]
    distance = Chem.GetDistanceMatrix(mol)
    pairs = [(a, b) for a in free for b in free if a < b and 2 <= distance[a, b] <= 6]
    if not pairs:
        return None
    large = [pair for pair in pairs if distance[pair] >= 4]  # rings of five and more, mostly
    mol.AddBond(*rng.choice(large if large and rng.random() < 0.8 else pairs), SINGLE)
    return mol


MUTATIONS = (append_atom, insert_atom, delete_atom, change_atom, change_bond, open_ring, close_ring)
MUTATION_WEIGHTS = (3, 2, 2, 3, 1, 0.5, 1)
