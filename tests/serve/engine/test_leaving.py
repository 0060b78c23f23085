"""Jobs that are cancelled, and engines that end or lose what they draw."""

import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sdjax.serve.engine import GenerationEngine
from tests.serve.conftest import wait_for
from tests.serve.engine.jobs import drawn_by_library, pixels


def test_a_cancelled_job_leaves_at_once_and_its_neighbours_do_not_notice(pipe, store, start, submit, ended):
    engine = start()
    for i in range(3):
        neighbour, job = submit(seed=i, steps=40), submit(steps=150)
        wait_for(lambda job=job: any(event.name == "progress" for event in store.events(job.id)), seconds=60)
        gone = engine.stats().ended["gone"]
        assert store.cancel(job.id).state == "cancelled"
        wait_for(lambda gone=gone: engine.stats().ended["gone"] > gone, seconds=60)
        assert store.job(neighbour.id).state == "running"
        (last,) = ended([neighbour])
        assert last.name == "complete"
        np.testing.assert_array_equal(pixels(store, neighbour), drawn_by_library(pipe, neighbour))
        assert [event.name for event in store.events(job.id)][-1] == "cancelled"


@pytest.mark.parametrize("times", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_cancel_near_the_last_step_ends_in_one_way(store, start, submit, ended, times):
    start()
    for i in range(times):
        job = submit(steps=2, guidance_scale=0.0, seed=i)
        time.sleep(0.003 * (i % 25))
        answer = store.cancel(job.id)
        ended([job])
        names = [event.name for event in store.events(job.id)]
        assert names.count("complete") + names.count("cancelled") == 1
        assert names[-1] == store.job(job.id).state == answer.state


def test_a_waiting_job_that_is_cancelled_never_begins(store, start, submit, ended):
    start(slots=1)
    first, second, third = submit(steps=60), submit(steps=5), submit(steps=5)
    wait_for(lambda: store.job(first.id).state == "running", seconds=60)
    store.cancel(second.id)
    assert [event.name for event in ended([first, third])] == ["complete", "complete"]
    assert store.job(second.id).started is None


def test_draining_lets_the_running_finish_and_gives_the_waiting_back(store, start, submit):
    engine = start(slots=1)
    running, waiting = submit(steps=80), submit()
    wait_for(lambda: any(event.name == "progress" for event in store.events(running.id)), seconds=60)
    engine.drain(60)
    assert store.job(running.id).state == "complete"
    assert (store.job(waiting.id).state, store.job(waiting.id).attempts) == ("queued", 0)
    engine.drain(0)


def test_what_does_not_finish_in_time_is_given_back_and_drawn_by_the_next(pipe, store, start, submit, ended):
    engine = start()
    jobs = [submit(steps=40, seed=seed) for seed in range(3)]
    wait_for(lambda: any(event.name == "progress" for event in store.events(jobs[0].id)), seconds=60)
    engine.drain(0.0)
    assert [store.job(job.id).state for job in jobs] == ["queued"] * 3
    assert [store.job(job.id).attempts for job in jobs] == [0] * 3
    start()
    ended(jobs)
    for job in jobs:
        np.testing.assert_array_equal(pixels(store, job), drawn_by_library(pipe, job))


def test_an_engine_can_be_drained_before_it_is_ready(pipe, store, submit):
    job = submit()
    engine = GenerationEngine(pipe, store)
    engine.start()
    engine.drain(0.0)
    engine.wait_until_ready()
    assert store.job(job.id).state == "queued"


def test_an_engine_whose_jobs_were_taken_stops_drawing_them(store, start, submit, ended, monkeypatch):
    engine = start(lease_seconds=0.3)
    monkeypatch.setattr(engine._leases, "tell", lambda events: None)  # frozen, as the store sees it
    job = submit(steps=150)
    wait_for(lambda: store.job(job.id).state == "running", seconds=60)
    (taken,) = wait_for(lambda: store.lease(None, 1, owner="other", seconds=60), seconds=60)
    assert taken.job.id == job.id
    monkeypatch.undo()
    wait_for(lambda: engine.stats().ended["gone"] == 1, seconds=60)
    assert store.finish(job.id, taken.fence, [("png", b"the other's")], data={})
    assert store.image(job.id, 0) == ("png", b"the other's")
    assert [event.name for event in store.events(job.id)].count("complete") == 1


@pytest.mark.slow
def test_five_hundred_jobs_leave_no_memory_behind(store, start, submit, ended):
    engine = start()

    def draw(count):
        jobs = []
        for i in range(count):
            wrong = {"sampler": "no such"} if i % 10 == 3 else {}
            jobs.append(submit(seed=i, steps=1, guidance_scale=0.0, **wrong))
            if i % 10 == 7:
                store.cancel(jobs[-1].id)
            if i % 50 == 49:
                ended(jobs)
        ended(jobs)

    draw(150)
    before, threads = memory(), threading.active_count()
    draw(350)
    assert memory() - before < 40e6
    assert threading.active_count() <= threads
    stats = engine.stats()
    assert stats.ended["error"] == 50
    assert stats.ended["complete"] + stats.ended["gone"] <= 450
    assert (stats.drawing, stats.pending, stats.finishing) == (0, 0, 0)


def memory():
    """Resident bytes; where the system doesn't say, the most that there ever were."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
