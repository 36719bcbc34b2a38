"""Scores of samples beside their floors: transport distances and the tables that report them."""

from gengrad.evaluation.report import format_table, table_row
from gengrad.evaluation.transport import (
    ModeCoverage,
    Reference,
    energy_distance,
    evaluate_transport,
    mode_coverage,
    sliced_w2_squared,
    wasserstein2,
)

__all__ = [
    "ModeCoverage",
    "Reference",
    "energy_distance",
    "evaluate_transport",
    "format_table",
    "mode_coverage",
    "sliced_w2_squared",
    "table_row",
    "wasserstein2",
]
