"""Percentiles of what was measured, and of what a server's histogram holds."""

import math

import numpy as np
import pytest

from benchmarks.latency import histogram_percentiles, percentiles
from benchmarks.load import lag, lines


def test_percentiles_are_those_of_numpy():
    found = percentiles([3.0, 1.0, 2.0, 10.0])
    assert (found["p50"], found["most"], found["mean"]) == (2.5, 10.0, 4.0)
    assert found["p99"] == np.percentile([1, 2, 3, 10], 99)


def test_a_histogram_gives_percentiles_to_the_width_of_its_buckets():
    values = np.random.default_rng(0).exponential(0.01, 20_000)
    bounds = [*np.arange(0.001, 0.2, 0.001), math.inf]
    buckets = {bound: float((values <= bound).sum()) for bound in bounds}
    found = histogram_percentiles(buckets, values.sum())
    exact = percentiles(list(values))
    for name in ("mean", "p50", "p95", "p99", "most"):
        assert found[name] == pytest.approx(exact[name], abs=0.001)


def test_what_is_beyond_the_last_bound_is_said_to_be_endless():
    found = histogram_percentiles({0.1: 1.0, 0.5: 1.0, math.inf: 2.0}, 9.0)
    assert (found["p99"], found["most"]) == (0.5, math.inf)


def test_the_lag_of_a_run_is_the_difference_of_two_looks():
    name = "sdjax_event_loop_lag_seconds"
    before = {f"{name}_bucket<0.01": 100.0, f"{name}_bucket<+Inf": 101.0, f"{name}_sum": 3.0}
    after = {f"{name}_bucket<0.01": 150.0, f"{name}_bucket<+Inf": 151.0, f"{name}_sum": 3.25}
    found = lag(before, after)
    assert found["mean"] == pytest.approx(0.005)
    assert found["p50"] == pytest.approx(0.005)
    assert found["most"] == 0.01


def test_the_table_says_what_is_wrong():
    row = dict.fromkeys(("mean", "p50", "p95", "p99", "most"), 0.01)
    report = {
        "options": {"jobs": 2, "readers": 1, "steps": 3},
        "jobs": row,
        "seconds": 1.0,
        "events": 5,
        "rows": {"POST /v1/jobs": row},
        "memory": {"1": 2**20, "2": 3 * 2**20},
        "wrong": ["job x is queued"],
    }
    table = "\n".join(lines(report))
    assert "WRONG: job x is queued" in table
    assert "1 MiB after 1 jobs, 3 MiB after 2 jobs" in table
    assert "nothing lost" in "\n".join(lines({**report, "wrong": []}))
