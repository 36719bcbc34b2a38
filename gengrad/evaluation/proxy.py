"""A score of images while they are trained on: FD-classifier of a thousand samples, as a curve over the steps."""

from __future__ import annotations

import json
from pathlib import Path

from gengrad.data.base import FiniteData
from gengrad.data.images import as_bytes
from gengrad.evaluation.features import extractor
from gengrad.evaluation.fid import Statistics, frechet_distance, reference_statistics
from gengrad.files import write_atomically
from gengrad.flows.flow import Flow

SAMPLES = 1000
NAME = "FD-classifier"


def note(folder: Path, flow: Flow, target: FiniteData, nfe: int, step: int) -> list[dict]:
    """Adds this step's score to ``proxy.jsonl`` in the run's folder; returns all rows, one for each step.

    The samples have the same seeds at each step, so that the curve shows the training and not the draw. A step that is
    there already, as after a kill, is replaced. The classifier is trained, and kept, at the first call.
    """
    extract = extractor("classifier", target).to(flow.device)
    found = Statistics.of([extract(as_bytes(flow.sample(SAMPLES, nfe, seed=0)))])
    distance = frechet_distance(found, reference_statistics(as_bytes(target.held_out), extract))
    file = folder / "proxy.jsonl"
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = [row for row in before if row["step"] < step] + [{"step": step, NAME: distance, "nfe": nfe}]
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows
