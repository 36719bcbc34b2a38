"""Metrics of populations by hand, and what every registered one promises."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest
import torch

from gengrad.molecules.fcd import features, frechet_chemnet
from gengrad.molecules.metrics import METRICS, USUAL, describe, kernel_density, tanimoto, wasserstein_1
from gengrad.molecules.workers import Workers

A = ["CCO", "OCC", "c1ccccc1C", "hello", "c1ccccc1CC", "", "C1CC1"]
B = ["CCO", "c1ccccc1CCC", "CCN"]


pytestmark = pytest.mark.usefixtures("in_process_for_all")
known = functools.cache(lambda *smiles: describe(smiles, (*USUAL, "alerts")))  # a worker takes a second to start


@pytest.fixture(scope="module")
def described(in_process_for_all):
    return known(*A), known(*B)


def metric(name, b, **settings):
    context = {"reference": b} if METRICS.get(name).compares else {}
    return METRICS.build({"name": name, **settings}, **context)


def value(name, a, b, **settings):
    judge = metric(name, b, **settings)
    judge.update(a)
    return judge.compute().item()


def test_the_counts_are_those_of_the_hand(described):
    a, b = described
    assert value("validity", a, b) == pytest.approx(5 / 7)
    assert value("uniqueness", a, b) == pytest.approx(4 / 5)  # ethanol stands twice
    assert value("uniqueness", a, b, first=2) == pytest.approx(1 / 2)
    assert value("novelty", a, b) == pytest.approx(3 / 4)  # ethanol is known
    assert value("scaffold_diversity", a, b) == pytest.approx(3 / 5)  # none, benzene, cyclopropane
    # scaffolds (none, benzene, cyclopropane): here (2, 2, 1), there (2, 1, 0)
    assert value("scaffold_cosine", a, b) == pytest.approx((4 + 2) / (3 * math.sqrt(5)))


def test_tanimoto_by_hand_and_diversity_from_it():
    bits = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.uint8)
    assert torch.allclose(tanimoto(bits, bits), torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1.0]]))
    judge = METRICS.build({"name": "internal_diversity"})
    assert judge.of(bits).item() == pytest.approx(1 - (3 + 2 / 3) / 9)
    judge = METRICS.build({"name": "internal_diversity", "p": 2})
    assert judge.of(bits).item() == pytest.approx(1 - math.sqrt((3 + 2 / 9) / 9))
    assert METRICS.build({"name": "circles", "distance": 0.5}).of(bits).item() == 3
    assert METRICS.build({"name": "circles", "distance": 0.7}).of(bits).item() == 2


def test_one_molecule_many_times_has_no_diversity_and_is_next_to_itself(described):
    a = known(*["CCO"] * 5)
    assert value("internal_diversity", a, a) == 0 and value("nearest_similarity", a, described[1]) == 1
    assert value("circles", a, a) == 1


def test_wasserstein_of_a_shift_is_the_shift_and_of_two_sizes_is_the_integral():
    x = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    assert wasserstein_1(x, x + 0.7).item() == pytest.approx(0.7)
    # uniform on {0, 1} against a point at 0: half of the mass moves by 1
    assert wasserstein_1(torch.tensor([0.0, 1.0]).double(), torch.zeros(1).double()).item() == pytest.approx(0.5)


def test_property_metrics_are_those_of_the_property_and_name_what_was_not_described(described):
    a, b = described
    weights = a.properties["weight"]
    assert value("property_mean", a, b, property="weight") == pytest.approx(weights.mean().item())
    assert value("property_median", a, b, property="weight") == pytest.approx(weights.sort().values[2].item())
    assert value("property_wasserstein", a, a, property="weight") == 0
    with pytest.raises(ValueError, match=r"'tpsa' was not described.*properties="):
        value("property_mean", a, b, property="tpsa")


def test_the_example_of_the_docs_gives_what_it_says(capsys):
    text = (Path(__file__).parents[2] / "docs" / "molecules.md").read_text()
    code = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "describe" in part]
    exec(compile(code[0], "docs/molecules.md", "exec"), {})
    assert "0.5000" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(METRICS))
def test_a_metric_of_two_batches_is_that_of_both_and_of_nothing_is_nan(name, described):
    a, b = described
    judge = metric(name, b)
    judge.update(describe([], (*USUAL, "alerts")))
    assert math.isnan(judge.compute().item())
    judge.reset()
    judge.update(known(*A[:3]))
    judge.update(known(*A[3:]))
    assert judge.compute().item() == pytest.approx(value(name, a, b), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS.get(name).compares])
def test_a_metric_that_compares_asks_for_its_reference(name):
    with pytest.raises(ValueError, match="reference=describe"):
        METRICS.build({"name": name})


def test_a_molecule_that_hangs_is_not_valid_and_the_others_are_described(tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "map", REAL)
    # a worker that sleeps at the SMILES "N", in the place of a molecule that hangs RDKit
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = describe(["CCO", "N", "CCN"], (), timeout=8.0)
    assert found.valid.tolist() == [True, False, True] and found.smiles == ["CCO", "CCN"]


REAL = Workers.map
SLOW = """
import time
from rdkit import Chem
original = Chem.MolFromSmiles
Chem.MolFromSmiles = lambda text, *more: (time.sleep(1000) if text == "N" else None) or original(text, *more)
"""


def test_fragments_alerts_and_canonical_smiles_are_those_of_the_molecules(described):
    a, b = described
    assert a.smiles[1] == "CCO" and len(a.smiles) == 5
    assert value("filters", known("CC=O", "CCO"), b) == 0.5  # an aldehyde is an alert
    # anisole is cut into two pieces by BRICS, ethane into none
    assert len(known("COc1ccccc1").fragments) == 2 and len(known("CC").fragments) == 1
    assert value("fragment_cosine", known("CC", "CC", "COc1ccccc1"), known("CC")) == pytest.approx(2 / math.sqrt(6))


def test_kl_of_two_normals_is_that_of_the_closed_form_and_of_itself_nothing():
    x = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64))
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    h2 = x.std().item() ** 2 * (1 + 1000**-0.4)  # the kernel adds its own variance
    exact = [math.exp(-(u**2) / (2 * h2)) / math.sqrt(2 * math.pi * h2) for u in t.tolist()]
    assert kernel_density(x, t).tolist() == pytest.approx(exact, rel=0.01)
    judge = METRICS.build({"name": "property_kl", "property": "weight"}, reference=known(*A))
    judge.update(known(*A))
    assert judge.compute().item() == pytest.approx(0, abs=1e-12)
    judge.reference = dataclasses.replace(judge.reference, properties={"weight": x})
    # of shifted copies with the range cut off at one deviation beyond: KL = shift^2 / 2 sigma^2
    assert judge.of(x + 0.5).item() == pytest.approx(0.25 / (2 * h2), rel=0.05)


def test_the_frechet_distance_is_refused_for_few_molecules_and_tells_its_floor_where_asked(monkeypatch):
    with pytest.raises(ValueError, match=r"5,000 on either side.*--fcd-at-any-size"):
        frechet_chemnet(["CCO"] * 10, ["CCO"] * 6000)
    # features of one's own: the distance of N(m, 0) from N(0, 0) is m^2, of a set from itself 0
    numbers = {"C" * k: float(k % 2) for k in range(1, 9)}
    monkeypatch.setattr("gengrad.molecules.fcd.features", lambda smiles: torch.tensor([[numbers[s]] for s in smiles]))
    found = frechet_chemnet(list(numbers), list(numbers), any_size=True)
    assert found["fcd"] == pytest.approx(0, abs=1e-9) and found["biased"] and found["floor_n"] == 4
    shifted = frechet_chemnet(["C"] * 4, ["CC"] * 8, any_size=True)
    assert shifted["fcd"] == pytest.approx(1.0) and shifted["floor"] == 0


def test_the_features_of_chemnet_are_those_of_the_package_itself():
    fcd_torch = pytest.importorskip("fcd_torch")
    package = fcd_torch.FCD(device="cpu", canonize=False)
    expected = torch.from_numpy(package.get_predictions(["CCO", "c1ccccc1"]))
    assert torch.allclose(features(["CCO", "c1ccccc1"]), expected, atol=1e-6)
