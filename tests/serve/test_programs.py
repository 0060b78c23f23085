"""What the engine knows of its batches' speeds, on a clock that a made-up device moves."""

from types import SimpleNamespace

import pytest

from sdjax.serve import drawing, programs
from sdjax.serve.drawing import Key
from sdjax.serve.programs import Programs
from sdjax.serve.scheduling import partition

KEY = Key((), "shapes")
AROUND, STEP = 0.010, {1: 0.010, 2: 0.012}
"""Seconds of what surrounds a slice, and of a step, by the batch's size."""


@pytest.fixture
def measured(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def walk(pipe, rows, size, calls):
        assert len(rows) == size
        clock.now += AROUND + calls * STEP[size]

    monkeypatch.setattr(drawing, "walk", walk)
    monkeypatch.setattr(drawing, "latents", lambda row: 0)
    monkeypatch.setattr(programs, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    found = Programs(SimpleNamespace(finish=lambda *_: []), (1, 2))
    for size in (1, 2):
        found.compile(KEY, SimpleNamespace(left=40, request=None), size)
    return found


def test_a_step_is_measured_in_slices_as_long_as_the_engine_makes(measured):
    # A single call would take it for 0.020 s.
    assert measured.step_seconds(KEY)[1] == pytest.approx(STEP[1], rel=0.1)
    assert partition(2, measured.step_seconds(KEY)) == (2,)
    assert partition(1, measured.step_seconds(KEY)) == (1,)


def test_a_batch_that_was_slow_for_once_is_tried_again(measured):
    for _ in range(5):
        measured.measured(KEY, 2, 1.0)
    assert partition(2, measured.step_seconds(KEY)) == (1, 1)
    for _ in range(200):
        measured.measured(KEY, 1, STEP[1])
    assert partition(2, measured.step_seconds(KEY)) == (2,)
