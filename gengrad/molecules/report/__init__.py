"""One self-contained HTML file about a population before and after: no script, nothing fetched from elsewhere."""

from __future__ import annotations

from pathlib import Path

from gengrad.files import write_atomically
from gengrad.molecules.report.figures import histograms, progress, structures
from gengrad.molecules.report.folder import Folder, read_folder
from gengrad.molecules.report.tables import (
    facts,
    lead_rows,
    metric_rows,
    objective_rows,
    provenance,
    reconstruction_rows,
    story,
    yield_rows,
)


def write_report(
    folder: str | Path, out: str | Path, *, title: str | None = None, processes: int = 1, timeout: float = 10.0
) -> dict:
    """Reads what a search or a flow left in ``folder`` and writes ``out``; returns {"missing": {file: what it lacks}}.

    population_before.csv, population_after.csv, steps.csv, objective.yaml, reconstruction.json, flow.json, run.json,
    leads.csv and metrics.json are taken where they are; the report says what is not there. Raises ``ValueError`` when
    there is neither a population nor steps.csv, or a file cannot be read.
    """
    found = read_folder(Path(folder), processes, timeout)
    write_atomically(Path(out), page(found, title).encode("utf-8"))
    return {"missing": found.missing}


def page(found: Folder, title: str | None = None) -> str:
    """The HTML text; every value from a file is escaped by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gengrad.molecules.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best, galleries = structures(found)
    asked, watched = histograms(found)
    return environment.get_template("page.html").render(
        title=title or f"Population report: {found.path.resolve().name}",
        story=story(found),
        facts=facts(found),
        missing=found.missing,
        objective=objective_rows(found),
        best=best,
        galleries=galleries,
        asked=asked,
        watched=watched,
        progress=progress(found),
        yields=yield_rows(found),
        leads=lead_rows(found),
        metrics=metric_rows(found),
        reconstruction=reconstruction_rows(found),
        provenance=provenance(found),
    )
