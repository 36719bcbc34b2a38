"""Worker processes take a second to start, more on a busy machine; tests that are not about them do without."""

import functools
import json

import pytest

from gengrad.molecules.worker import TASKS, answer
from gengrad.molecules.workers import Answer, Workers


@functools.cache
def work_of(head: bytes):
    told = json.loads(head)
    return TASKS[told["task"]](**told["settings"])


def map_here(self, items):
    """``Workers.map`` in this process, through the same text as with processes."""
    return [Answer(**json.loads(json.dumps(answer(work_of(self.head), json.loads(json.dumps(x)))))) for x in items]


@pytest.fixture(scope="session")
def in_place_of_workers():
    """What to put in the place of ``Workers.map``."""
    return map_here


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(Workers, "map", map_here)


@pytest.fixture(scope="module")
def in_process_for_all():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "map", map_here)
        yield
