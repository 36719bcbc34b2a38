"""Counting CPUs where the system tells what this process may use, and where it does not."""

import os

import pytest

from gengrad.machine import cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinities")
def test_only_the_cpus_that_the_process_may_use_count():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("found", "told"), [(7, 7), (None, 1)])
def test_without_affinities_all_cpus_count_and_an_unknown_number_is_one(monkeypatch, found, told):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: found)
    assert cpus() == told
