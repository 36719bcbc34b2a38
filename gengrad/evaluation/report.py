"""Results as a table that reads well both as text and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# column -> metric of ``evaluate_transport``, the order of the table
COLUMNS = {
    "W2": "w2",
    "W2² - floor²": "w2_squared_minus_floor_squared",
    "SW2²": "sw2_squared",
    "energy": "energy_distance",
    "modes hit": "modes_hit",
    "in radius": "within_radius",
    "mass error": "mass_error",
}


def format_number(value: object) -> str:
    """Three significant figures for floats, ``-`` for None, anything else as it prints."""
    if value is None:
        return "-"
    if not isinstance(value, float) or value == 0 or not math.isfinite(value):
        return str(value)
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, 2 - exponent)}f}" if -4 <= exponent < 5 else f"{value:.2e}"


def with_error(summary: Mapping) -> str:
    """``mean ± std`` of a metric, in the decimals of the mean."""
    mean, std = summary["mean"], summary["std"]
    text = format_number(float(mean))
    if std is None:
        return text
    return f"{mean:.2e} ± {std:.0e}" if "e" in text else f"{text} ± {std:.{len(text.partition('.')[2])}f}"


def table_row(result: Mapping, **labels: object) -> dict[str, str]:
    """One result of ``evaluate_transport`` as a row of text: ``labels`` first, then each metric and the floors."""
    row = {key: format_number(value) for key, value in labels.items()}
    if result.get("nfe") is not None:
        row["NFE"] = str(result["nfe"])
    for column, metric in COLUMNS.items():
        if metric in result:
            row[column] = with_error(result[metric])
            if metric in ("w2", "sw2_squared"):
                row[f"{column} floor"] = with_error(result[metric]["floor"])
    return row


def image_row(result: Mapping, distance: str) -> dict[str, str]:
    """One result of an image evaluation as a row of text: the NFE, other networks' evaluations, the ``distance``."""
    row = {"NFE": str(result["nfe"]), **{name: f"{count:g}" for name, count in result.get("others", {}).items()}}
    row[distance] = with_error(result[distance])
    if "floor" in result[distance]:
        row["floor"] = with_error(result[distance]["floor"])
    scores = {name: value for name, value in result.items() if isinstance(value, Mapping) and "mean" in value}
    return row | {name: with_error(value) for name, value in scores.items() if name != distance}


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Aligned Markdown of rows that map columns to values; numbers to the right, a missing value is ``-``.

    Columns come in the order in which the rows first name them; ``""`` for no rows.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    cells = [[format_number(row.get(column)) for column in columns] for row in rows]
    right = [all(cell[:1] in "-+.0123456789" for cell in column) for column in zip(*cells)]
    widths = [max(3, *map(len, column)) for column in zip(columns, *cells)]

    def line(entries: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                entry.rjust(width) if to_right else entry.ljust(width)
                for entry, width, to_right in zip(entries, widths, right)
            )
            + " |"
        )

    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right)]
    return "\n".join(line(entries) for entries in [columns, rule, *cells])
