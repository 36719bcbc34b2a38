"""Metrics of populations by hand, and what every registered one promises."""

import math
import re
from pathlib import Path

import pytest
import torch

from gengrad.molecules.metrics import METRICS, describe, tanimoto, wasserstein_1

A = ["CCO", "OCC", "c1ccccc1C", "hello", "c1ccccc1CC", "", "C1CC1"]
B = ["CCO", "c1ccccc1CCC", "CCN"]


@pytest.fixture(scope="module")
def described():
    return describe(A), describe(B)


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
    a = describe(["CCO"] * 5)
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
    judge.update(describe([]))
    assert math.isnan(judge.compute().item())
    judge.reset()
    judge.update(describe(A[:3]))
    judge.update(describe(A[3:]))
    assert judge.compute().item() == pytest.approx(value(name, a, b), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS.get(name).compares])
def test_a_metric_that_compares_asks_for_its_reference(name):
    with pytest.raises(ValueError, match="reference=describe"):
        METRICS.build({"name": name})
