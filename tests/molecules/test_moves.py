"""Crossover and mutation: what comes out is one sound molecule, a function of the seed."""

import random

import pytest
import torch
from rdkit import Chem, rdBase

from gengrad.molecules.library import library
from gengrad.molecules.moves import MUTATIONS, RINGS, breed, crossover, sound
from gengrad.molecules.proposers import Graph
from gengrad.registry import PROPOSERS

pytestmark = pytest.mark.usefixtures("in_process_for_all")
LIBRARY = library(40, seed=5)


def kekulised(smiles):
    mol = Chem.MolFromSmiles(smiles)
    Chem.Kekulize(mol, clearAromaticFlags=True)
    return mol


def test_a_child_is_one_canonical_molecule_without_radicals_and_the_same_for_the_same_seed():
    children = [breed(a, b, seed, 0.5, 60) for seed, (a, b) in enumerate(zip(LIBRARY, [*LIBRARY[1:20], *[None] * 21]))]
    assert sum(child is not None for child in children) > 30
    for child in filter(None, children):
        mol = Chem.MolFromSmiles(child)
        assert Chem.MolToSmiles(mol) == child and "." not in child
        assert not any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
    assert breed(LIBRARY[0], LIBRARY[1], 0, 0.5, 60) == children[0] != breed(LIBRARY[0], LIBRARY[1], 1, 0.5, 60)


@pytest.mark.parametrize("edit", MUTATIONS, ids=lambda edit: edit.__name__)
def test_a_mutation_changes_the_molecule_by_what_its_name_says(edit):
    change = {"append_atom": (1, 1), "insert_atom": (1, 1), "delete_atom": (-1, None), "change_atom": (0, 0)}
    change |= {"change_bond": (0, 0), "open_ring": (0, -1), "close_ring": (0, 1)}
    rng, done = random.Random(0), 0
    for smiles in LIBRARY:
        mol = kekulised(smiles)
        made = edit(Chem.RWMol(mol), rng)
        if made is None:
            continue
        done += 1
        atoms, bonds = change[edit.__name__]
        assert made.GetNumAtoms() - mol.GetNumAtoms() == atoms
        assert bonds is None or made.GetNumBonds() - mol.GetNumBonds() == bonds
    assert done > len(LIBRARY) // 2


def test_crossover_joins_a_piece_of_either_parent():
    rng, found = random.Random(1), set()
    with rdBase.BlockLogs():
        for _ in range(60):
            made = crossover(kekulised("FCCCF"), kekulised("ClCCCCl"), rng)
            child = None if made is None else sound(made, set(RINGS), 60)
            if child is not None:
                found.add(Chem.MolToSmiles(child))
    assert {"FCCCCl", "FCCl"} <= found  # a single bond of either was cut
    assert not found & {"FCCCF", "ClCCCCl"}


@pytest.mark.parametrize(
    "smiles", ["C1#CCCCC1", "C1=CC1", "C1=C=CCCC1", "C1CCCCCCCCC1", "CC.CC", "O", "C" * 61, "C(C)(C)(C)(C)C"]
)
def test_what_no_chemist_wants_to_see_is_not_sound(smiles):
    with rdBase.BlockLogs():
        assert sound(Chem.MolFromSmiles(smiles, sanitize=False), set(RINGS), 60) is None


def test_both_proposers_of_molecules_give_n_proposals_of_known_parents_and_the_same_for_the_same_generator():
    for settings in ({"name": "graph"}, {"name": "screen", "library": 60, "nearest": 20}):
        proposer = PROPOSERS.build(settings)
        found = [proposer.propose(LIBRARY[:5], 12, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
        assert len(found[0]) == 12 and all(0 <= p.parent < 5 for p in found[0])
        assert found[0] == found[1] != found[2]


def test_screening_gives_the_nearest_molecules_of_a_file_and_nothing_for_what_is_no_molecule(tmp_path):
    (tmp_path / "shop.smi").write_text("CCCCO\nc1ccccc1\nCCCCCO\nc1ccccc1C\n")
    screen = PROPOSERS.build({"name": "screen", "path": str(tmp_path / "shop.smi"), "nearest": 2})
    found = screen.propose(["CCCCO", "hello", "CCc1ccccc1"], 40, torch.Generator().manual_seed(0))
    first, *rest = ({p.smiles for p in found if p.parent == i} for i in range(3))
    assert "CCCCCO" in first and "CCCCO" not in first  # not itself
    assert rest == [{None}, {"Cc1ccccc1", "c1ccccc1"}]
    (tmp_path / "none.smi").write_text("hello\n")
    with pytest.raises(ValueError, match="no molecule"):
        PROPOSERS.build({"name": "screen", "path": str(tmp_path / "none.smi")}).propose(["C"], 1, torch.Generator())
    with pytest.raises(FileNotFoundError, match="no molecule file at 'nowhere"):
        PROPOSERS.build({"name": "screen", "path": "nowhere.smi"})


def test_the_graph_proposer_mutates_where_there_is_but_one_parent():
    found = Graph().propose(["CCO"], 10, torch.Generator().manual_seed(0))
    assert any(p.smiles not in (None, "CCO") for p in found)
