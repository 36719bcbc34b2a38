"""Tables: three significant figures, aligned, with a dash where there is nothing."""

import pytest

from gengrad.evaluation import format_table, table_row
from gengrad.evaluation.report import format_number, with_error


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"),
        (0.01234, "0.0123"),
        (0.000757, "0.000757"),
        (0.999951, "1.000"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (1e-5, "1.00e-05"),
        (-0.0123, "-0.0123"),
        (0.0, "0.0"),
        (7, "7"),
        ("nsgf", "nsgf"),
        (None, "-"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_three_significant_figures(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.5114, 0.0203, "0.511 ± 0.020"),
        (12.34, 0.5, "12.3 ± 0.5"),
        (0.5, None, "0.500"),
        (1e-6, 2e-7, "1.00e-06 ± 2e-07"),
    ],
)
def test_an_error_has_the_decimals_of_its_mean(mean, std, text):
    assert with_error({"mean": mean, "std": std}) == text


def test_a_table_is_aligned_markdown_with_numbers_to_the_right():
    rows = [{"method": "nsgf", "NFE": 5, "W2": 0.5114}, {"method": "flow matching", "NFE": 100}]
    assert format_table(rows).splitlines() == [
        "| method        | NFE |    W2 |",
        "| ------------- | --: | ----: |",
        "| nsgf          |   5 | 0.511 |",
        "| flow matching | 100 |     - |",
    ]


def test_a_table_of_nothing_is_empty():
    assert format_table([]) == ""


def test_a_row_of_a_result_names_labels_first_and_floors_beside_their_scores():
    summary = {"mean": 0.5, "std": 0.01, "floor": {"mean": 0.4, "std": None}}
    row = table_row({"nfe": 5, "w2": summary, "energy_distance": summary}, method="nsgf")
    assert list(row) == ["method", "NFE", "W2", "W2 floor", "energy"]
    assert row["NFE"] == "5" and row["W2"] == "0.500 ± 0.010" and row["W2 floor"] == "0.400"
