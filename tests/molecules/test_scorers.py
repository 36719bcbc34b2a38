"""Scorers: values that can be computed by hand, and what every registered one promises."""

import math

import pytest

import gengrad.molecules.scorers  # noqa: F401 - registers them
from gengrad.molecules.library import library
from gengrad.molecules.properties import ZINC, penalised_parts
from gengrad.registry import SCORERS

SETTINGS = {"similarity": {"to": ["CCO"]}, "substructure": {"smarts": "c1ccccc1"}}
INSIDE = [name for name in SCORERS if not SCORERS.get(name).outside]


def scorer(name, **settings):
    return SCORERS.build({"name": name, **SETTINGS.get(name, {}), **settings})


@pytest.mark.parametrize("name", INSIDE)
def test_a_scorer_gives_one_float_per_string_the_same_alone_and_in_a_batch_and_nan_for_what_is_no_molecule(name):
    smiles = ["CCO", "hello", "c1ccc2[nH]ccc2c1", "", "CCO", "C"]
    values = scorer(name)(smiles)
    assert all(type(value) is float for value in values)
    assert [math.isnan(value) for value in values] == [text in ("hello", "") for text in smiles]
    assert values[0] == values[4] == scorer(name)(["CCO"])[0]
    if scorer(name).unit_interval:
        assert all(0 <= value <= 1 for value in values if value == value)


BY_HAND = [  # scorer, SMILES, value
    ("weight", "O", 2 * 1.008 + 15.999),
    ("heavy_atoms", "CCO", 3),
    ("hbd", "NCC(=O)O", 2),  # the acid's and the amine's
    ("hba", "c1ccncc1", 1),
    ("rings", "c1ccc2ccccc2c1", 2),
    ("rotatable_bonds", "CCCC", 1),
    ("fsp3", "CCc1ccccc1", 2 / 8),
    ("tpsa", "CCO", 20.23),  # Ertl et al. 2000: a hydroxyl oxygen
    ("logp", "C", 0.1441 + 4 * 0.1230),  # Wildman and Crippen 1999: C1 and four H1
    ("substructure", "Cc1ccccc1", 1),
    ("substructure", "CC", 0),
    ("similarity", "OCC", 1),
]


@pytest.mark.parametrize(("name", "smiles", "value"), BY_HAND)
def test_a_property_has_the_value_computed_by_hand(name, smiles, value):
    assert scorer(name)([smiles]) == pytest.approx([value], abs=1e-3)


def test_penalised_logp_takes_off_the_atoms_beyond_six_of_the_largest_ring_and_the_zinc_scale_is_apart():
    from rdkit import Chem

    logp, minus_sa, ring = penalised_parts(Chem.MolFromSmiles("C1CCCCCCC1"))
    assert ring == -2 and scorer("logp")(["C1CCCCCCC1"]) == [logp] and scorer("sa")(["C1CCCCCCC1"]) == [-minus_sa]
    assert scorer("plogp")(["C1CCCCCCC1"])[0] == pytest.approx(logp + minus_sa - 2)
    (a, b), (c, d), (e, f) = ZINC
    expected = (logp - a) / b + (minus_sa - c) / d + (-2 - e) / f
    assert scorer("plogp_zinc")(["C1CCCCCCC1"])[0] == pytest.approx(expected)


def test_similarity_is_to_the_nearest_reference_and_a_pattern_can_be_counted():
    near = scorer("similarity", to=["c1ccccc1", "CCO"])(["CCO", "CCCO"])
    assert near[0] == 1 and near[1] == scorer("similarity")(["CCCO"])[0] < 1
    assert scorer("substructure", smarts="[OX2H]", count=True)(["OCCO"]) == [2]


def test_alerts_are_counted_and_named():
    from rdkit import Chem

    alerts = scorer("alerts", catalogs=["BRENK"])
    assert alerts(["CCO"]) == [0] and alerts(["CC=O"])[0] >= 1
    assert any("aldehyde" in name.lower() for name in alerts.names(Chem.MolFromSmiles("CC=O")))


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("similarity", {"to": []}, "at least 1"),
        ("similarity", {"to": ["hello"]}, "not a SMILES"),
        ("substructure", {"smarts": "((("}, "not a SMARTS"),
        ("alerts", {"catalogs": ["PAIN"]}, "PAINS"),
    ],
)
def test_a_scorer_refuses_settings_that_it_cannot_work_with(name, settings, says):
    with pytest.raises(ValueError, match=says):
        scorer(name, **settings)


def test_the_library_is_a_function_of_its_seed_and_a_longer_one_begins_with_the_shorter():
    from rdkit import Chem

    first = library(60, seed=3)
    assert first == library(100, seed=3)[:60] and len(set(first)) == 60 and first != library(60, seed=4)
    assert [Chem.MolToSmiles(Chem.MolFromSmiles(text)) for text in first] == first
    with pytest.raises(ValueError, match="1 to 1,000,000"):
        library(0)
