"""What the engine knows of its batches' speeds, on a clock that a made-up device moves."""

from types import SimpleNamespace

import pytest

from sdjax.serve import drawing, programs
from sdjax.serve.drawing import Key
from sdjax.serve.programs import Programs, UnwantedError
from sdjax.serve.scheduling import partition

KEY = Key((), "shapes")
AROUND, STEP = 0.010, {1: 0.010, 2: 0.012}
"""Seconds of what surrounds a slice, and of a step, by the batch's size."""
ONCE = 3.0
"""What the first run of a program takes beside, once."""


@pytest.fixture
def measured(monkeypatch):
    clock, begun = SimpleNamespace(now=0.0), set()

    def walk(pipe, rows, size, calls):
        assert len(rows) == size
        clock.now += AROUND + calls * STEP[size]
        if calls and size not in begun:
            begun.add(size)
            clock.now += ONCE

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


def test_the_first_run_of_a_program_is_no_measurement(measured):
    for size, seconds in measured.step_seconds(KEY).items():
        assert seconds < 2 * STEP[size]


@pytest.mark.parametrize("looks", range(7))
def test_compiling_and_measuring_stop_when_nobody_waits_any_more(monkeypatch, looks):
    calls = []
    monkeypatch.setattr(drawing, "walk", lambda pipe, rows, size, count: calls.append(count))
    monkeypatch.setattr(drawing, "latents", lambda row: 0)
    found = Programs(SimpleNamespace(finish=lambda *_: []), (1,))
    answers = iter([True] * looks)
    row = SimpleNamespace(left=40, request=None)
    if looks < 6:
        with pytest.raises(UnwantedError):
            found.compile(KEY, row, 1, lambda: next(answers, False))
        assert found.step_seconds(KEY) == {}
    else:
        found.compile(KEY, row, 1, lambda: next(answers, False))
        assert found.step_seconds(KEY)
    assert len(calls) == [0, 1, 1, 2, 3, 4, 5][looks]
