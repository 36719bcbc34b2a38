"""SELFIES rows: what goes in comes out, and every row of symbols is a molecule or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengrad.molecules.library import library
from gengrad.molecules.tokens import END, Alphabet, selfies_of, smiles_of

MOLECULES = library(40)
SYMBOLS = [selfies_of(smiles) for smiles in MOLECULES]
ALPHABET = Alphabet.of(SYMBOLS)


def test_molecules_come_back_from_their_rows():
    rows = ALPHABET.rows([ALPHABET.numbers(symbols) for symbols in SYMBOLS])
    assert rows.shape == (40, ALPHABET.length + 1)
    assert (rows[:, -1] == END).all()  # even the longest has its end
    assert ALPHABET.smiles(rows) == MOLECULES


def test_the_order_of_the_molecules_does_not_change_the_alphabet():
    other = Alphabet.of(SYMBOLS[::-1])
    assert (other.symbols, other.length) == (ALPHABET.symbols, ALPHABET.length)


@given(st.lists(st.integers(1, len(ALPHABET) - 1), min_size=1, max_size=60))
def test_any_row_of_symbols_is_a_molecule_or_nothing_at_all(numbers):
    from rdkit import Chem

    smiles = ALPHABET.smiles(ALPHABET.rows([numbers]))[0]
    mol = Chem.MolFromSmiles(smiles)
    assert smiles == "" or (mol.GetNumHeavyAtoms() > 0 and Chem.MolToSmiles(mol) == smiles)


def test_symbols_without_an_atom_are_no_molecule():
    assert smiles_of([]) == smiles_of(["[Branch1]"]) == ""


@pytest.mark.parametrize(
    "smiles, reason",
    [
        ("C[C@H](F)Cl", None),  # stereo is written as well
        ("CS(=O)(=O)(C)(C)(C)C", "SELFIES"),  # more bonds than its sulphur may have
    ],
)
def test_what_selfies_cannot_write_has_a_reason(smiles, reason):
    if reason is None:
        assert smiles_of(selfies_of(smiles)) == smiles
    else:
        with pytest.raises(ValueError, match=reason):
            selfies_of(smiles)


def test_foreign_symbols_and_too_many_are_refused():
    with pytest.raises(ValueError, match=r"not seen \(\[I\]\)"):
        ALPHABET.numbers(["[C]", "[I]"])
    with pytest.raises(ValueError, match="longer than"):
        ALPHABET.numbers(["[C]"] * (ALPHABET.length + 1))
    with pytest.raises(ValueError, match="alphabet"):
        Alphabet(["[C]", "[C]"], 3)
