"""The engine's decisions: they are fair, and they follow what was measured."""

import random

import pytest

from sdjax.serve.buckets import bucket
from sdjax.serve.scheduling import BUCKETS_AT_ONCE, PATIENCE, Admission, Blocked, admit, partition, slice_length
from sdjax.serve.stats import Leased, Stats


def test_nobody_waits_nobody_is_admitted():
    assert admit([], {"a"}, Blocked("b", 0.0), 9.0) == Admission(None, None)


def test_the_longest_waiting_is_admitted_while_there_is_room_for_its_bucket():
    assert admit(["b", "a"], {"a"}, None, 0.0) == Admission("b", None)
    assert admit(["b", "a"], set(), None, 0.0) == Admission("b", None)
    assert admit(["a"], {"a", "b"}, None, 0.0) == Admission("a", None)


def test_a_blocked_head_may_be_overtaken_for_a_while_and_then_nobody_is_admitted():
    running = {"a", "b"}
    first = admit(["c", "d", "a"], running, None, 10.0)
    assert first == Admission("a", Blocked("c", 10.0))
    later = admit(["c", "b"], running, first.blocked, 10.0 + PATIENCE)
    assert later == Admission("b", Blocked("c", 10.0))
    assert admit(["c", "b"], running, later.blocked, 10.1 + PATIENCE) == Admission(None, Blocked("c", 10.0))
    assert admit(["c", "b"], {"b"}, later.blocked, 10.1 + PATIENCE) == Admission("c", None)


@pytest.mark.parametrize("seed", range(5))
def test_no_bucket_starves_while_another_floods_the_queue(seed):
    """A simulated engine of 4 slots: jobs last up to a second, and new ones keep some 20 of one bucket waiting."""
    rng = random.Random(seed)
    queue = [("flood", 0.0)] * 4
    running, waits, blocked, now = [], [], None, 0.0
    while now < 120:
        now += 0.05
        running = [(name, end) for name, end in running if end > now]
        queue += [("flood", now)] * max(0, 20 - len(queue))
        if rng.random() < 0.05:
            queue.append((rng.choice(["b", "c", "d"]), now))
        while len(running) < 4:
            waiting = list(dict.fromkeys(name for name, _ in queue))
            chosen, blocked = admit(waiting, {name for name, _ in running}, blocked, now)
            if chosen is None:
                break
            place = next(i for i, (name, _) in enumerate(queue) if name == chosen)
            name, since = queue.pop(place)
            running.append((name, now + rng.uniform(0.1, 1.0)))
            if name != "flood":
                waits.append(now - since)
        assert len({name for name, _ in running}) <= BUCKETS_AT_ONCE
    assert len(waits) > 50
    # Some 20 jobs of half a second are before it on 4 slots, and each change of bucket may cost a drain.
    assert max(waits) < 20 / 4 + 8 * (PATIENCE + 1.0)


def test_rows_are_never_padded_where_a_batch_costs_its_rows():
    cpu = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
    assert [sum(partition(rows, cpu)) for rows in range(1, 17)] == list(range(1, 17))
    assert partition(8, cpu) == (8,)


def test_rows_are_padded_where_a_larger_batch_is_nearly_free():
    accelerator = {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.6}
    assert [partition(rows, accelerator) for rows in (1, 2, 3, 5, 8)] == [(1,), (2,), (4,), (8,), (8,)]
    assert partition(9, accelerator) == (8, 1)


def test_a_batch_size_that_was_measured_slow_is_not_used():
    assert partition(8, {1: 1.0, 2: 1.1, 4: 1.3, 8: 9.0}) == (4, 4)
    assert partition(3, {2: 1.0}) == (2, 2)


@pytest.mark.parametrize("rows", range(1, 20))
def test_every_row_has_a_place(rows):
    sizes = partition(rows, {1: 0.9, 2: 1.0, 8: 3.1})
    assert sum(sizes) >= rows
    assert sum(sizes[:-1]) < rows


def test_a_slice_lasts_as_long_as_it_may_and_one_step_at_least():
    assert slice_length(0.01, 0.25, [100]) == 25
    assert slice_length(0.01, 0.25, [100, 3]) == 3
    assert slice_length(2.0, 0.25, [100]) == 1
    assert slice_length(0.0, 0.25, [7]) == 7


def test_a_bucket_is_size_guidance_and_adapters():
    plain = {"width": 512, "height": 768, "guidance_scale": 7.5, "loras": [], "prompt": "a", "steps": 3}
    lora = {"path": "/adapters/style", "strength": 0.8}
    other = {"path": "/adapters/other", "strength": 0.8}
    assert bucket(plain) == bucket({**plain, "prompt": "b", "steps": 30, "guidance_scale": 2.0, "loras": None})
    different = [
        plain,
        {**plain, "width": 768, "height": 512},
        {**plain, "guidance_scale": 1.0},
        {**plain, "loras": [lora]},
        {**plain, "loras": [{**lora, "strength": 0.7}]},
        {**plain, "loras": [lora, other]},
    ]
    assert len({bucket(request) for request in different}) == len(different)


def stats(step_seconds, **leased):
    counts = dict.fromkeys(("drawing", "pending", "finishing", "slices", "rows", "places", "steps", "compiles"), 0)
    return Stats(slots=2, slice_seconds=0.0, ended={}, step_seconds=step_seconds, leased=leased, **counts)


def test_a_waiting_job_is_complete_when_every_step_up_to_its_last_is_made():
    seen = stats({"small": 0.01, "large": 0.1}, a=Leased("small", 1, 30), b=Leased("large", 2, 5))
    assert seen.eta_queued({"small": 20, "large": 10}) == pytest.approx(0.3 + 0.5 + 0.2 + 1.0)
    assert seen.eta_queued({"never seen": 10}) == pytest.approx(0.3 + 0.5 + 1.0)
    assert stats({}).eta_queued({"small": 10}) is None


def test_a_leased_job_shares_the_device_with_those_beside_it():
    seen = stats({"small": 0.01}, short=Leased("small", 1, 10), long=Leased("small", 1, 50), two=Leased("small", 2, 8))
    assert seen.eta_leased("short") == pytest.approx(0.01 * (10 + 10 + 8))
    assert seen.eta_leased("long") == pytest.approx(0.01 * (10 + 50 + 8))
    assert seen.eta_leased("two") == pytest.approx(0.01 * (4 + 4 + 8))
    assert seen.eta_leased("waiting") is None
