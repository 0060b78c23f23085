"""Which job is drawn when, and what is told of it meanwhile."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from sdjax.serve import drawing, scheduling
from sdjax.serve.programs import Programs
from sdjax.serve.store import FINAL
from tests.serve.conftest import wait_for
from tests.serve.engine.jobs import drawn_by_library, pixels


def test_after_ready_nothing_is_compiled(start, submit, ended):
    engine = start()
    photo = Image.new("RGB", (64, 64), "red")
    before = engine.stats().compiles
    jobs = [
        submit(),
        submit(prompt="a large green star under a black ring", steps=9, sampler="heun", guidance_scale=7.0),
        submit(guidance_scale=0.0, num_images=3, preview_every=2),
        submit({"input_image": photo}, operation="image_transform", strength=0.7),
        submit({"init_image": photo, "mask_image": photo.convert("L")}, operation="image_inpaint", strength=0.9),
    ]
    ended(jobs)
    assert engine.stats().compiles == before


def test_a_size_that_was_not_foreseen_is_compiled_beside_the_others(pipe, store, start, submit, ended, monkeypatch):
    """It takes longer than a lease, and those that run go on meanwhile."""
    start(lease_seconds=2.0)
    compile_program, go = Programs.compile, threading.Event()

    def slow_compiler(self, key, row, size, *rest):
        assert go.wait(300)
        compile_program(self, key, row, size, *rest)

    monkeypatch.setattr(Programs, "compile", slow_compiler)
    wide = submit(width=48, height=32, guidance_scale=0.0)
    wait_for(lambda: store.job(wide.id).state == "running", seconds=60)
    others = [submit(seed=seed) for seed in range(3)]
    ended(others)
    time.sleep(2.5)
    assert store.job(wide.id).state == "running"
    go.set()
    ended([wide], seconds=240)
    assert (store.job(wide.id).state, store.job(wide.id).attempts) == ("complete", 1)
    assert pixels(store, wide).shape == (32, 48, 3)
    np.testing.assert_array_equal(pixels(store, wide), drawn_by_library(pipe, wide))


@pytest.mark.parametrize("slow", ["compile", "prepare"])
def test_what_is_compiled_for_one_size_keeps_no_other_size_waiting(store, start, submit, ended, monkeypatch, slow):
    """Three sizes compile, as many pictures of each as there are slots: the known size and a new one are drawn."""
    start(slots=2)
    owner = Programs if slow == "compile" else drawing
    function, go = getattr(owner, slow), threading.Event()

    def slow_for_wide_ones(*args):
        request = args[2].request if slow == "compile" else args[2][0]
        if request.settings["width"] == 48:
            assert go.wait(300)
        return function(*args)

    monkeypatch.setattr(owner, slow, slow_for_wide_ones)
    wide = [submit(width=48, height=height, num_images=2) for height in (32, 40, 48)]
    wait_for(lambda: all(store.job(job.id).state == "running" for job in wide), seconds=60)
    more = submit(width=48, height=32)
    others = [submit(seed=seed) for seed in range(2)] + [submit(guidance_scale=0.0), submit(width=32, height=32)]
    assert [event.name for event in ended(others)] == ["complete"] * 4
    assert [store.job(job.id).state for job in (*wide, more)] == ["running"] * 3 + ["queued"]
    go.set()
    assert [event.name for event in ended([*wide, more], seconds=240)] == ["complete"] * 4


def test_a_job_that_is_cancelled_while_it_is_compiled_for_stops_that(store, start, submit, ended, monkeypatch):
    engine = start()
    walk, go, walks = drawing.walk, threading.Event(), []

    def slow_walk(pipe, rows, size, calls):
        if rows[0].request.settings["width"] == 56:
            walks.append(calls)
            assert go.wait(300)
        return walk(pipe, rows, size, calls)

    monkeypatch.setattr(drawing, "walk", slow_walk)
    wide = submit(width=56, height=32)
    wait_for(lambda: walks, seconds=60)
    assert store.cancel(wide.id).state == "cancelled"
    wait_for(lambda: engine.stats().ended["gone"] == 1, seconds=60)
    go.set()
    ended([submit(seed=seed, steps=20) for seed in range(2)])
    assert walks == [0]
    again = submit(width=56, height=32)
    assert ended([again], seconds=240)[0].name == "complete"


def test_a_new_job_joins_those_that_run(store, start, submit, ended):
    start()
    long = submit(steps=150)
    wait_for(lambda: any(event.name == "progress" for event in store.events(long.id)), seconds=60)
    short = submit(steps=2)
    ended([short])
    assert store.job(long.id).state == "running"
    ended([long])


def test_a_lone_bucket_does_not_starve_behind_a_flood(store, start, submit, ended, monkeypatch):
    monkeypatch.setattr(scheduling, "BUCKETS_AT_ONCE", 1)
    monkeypatch.setattr(scheduling, "PATIENCE", 0.2)
    start(slots=2)
    flood = [submit(seed=i, steps=10) for i in range(4)]
    lone = submit(guidance_scale=0.0)
    flood += [submit(seed=i, steps=10) for i in range(4, 20)]
    ended([lone])
    assert sum(store.job(job.id).state == "queued" for job in flood) >= 6
    ended(flood)


def test_a_job_that_lost_its_process_is_drawn_alone(store, start, submit, ended):
    first, suspect, third = (submit(seed=seed, steps=30) for seed in range(3))
    store.cancel(first.id)
    store.lease(None, 1, owner="a process that dies", seconds=0)
    fourth = submit(seed=4, steps=30)
    engine = start()
    most = 0
    while store.job(suspect.id).state not in FINAL:
        if store.job(suspect.id).state == "running":
            most = max(most, engine.stats().drawing)
    ended([third, fourth])
    assert most <= 1
    assert (store.job(suspect.id).state, store.job(suspect.id).attempts) == ("complete", 2)
    assert max(store.job(job.id).started for job in (third, fourth)) >= store.job(suspect.id).finished - 0.5


def test_a_story_tells_of_steps_in_order_and_ends_with_timings(store, start, submit, ended):
    start()
    job = submit(steps=40, seed=2**64 - 1, num_images=2)
    (last,) = ended([job])
    events = store.events(job.id)
    steps = [event.data["step"] for event in events if event.name == "progress"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40
    assert all(event.data["total"] == 40 for event in events if event.name == "progress")
    assert next(event for event in events if event.data.get("step") == 40).data["percent"] == 100.0
    assert last.data["seeds"] == [2**64 - 1, 0]
    assert last.data["seed"] == 2**64 - 1
    assert set(last.data["timings"]) == {"queued", "prepare", "denoise", "decode", "encode"}
    assert min(last.data["timings"].values()) >= 0, last.data["timings"]
    assert store.job(job.id).timings == last.data["timings"]


def test_what_was_measured_tells_when_a_waiting_job_will_be_complete(store, start, submit, ended):
    engine = start(slots=2)
    jobs = [submit(steps=30, seed=seed) for seed in range(6)]
    wait_for(lambda: sum(event.name == "progress" for event in store.events(jobs[0].id)) > 1, seconds=60)
    stats = engine.stats()
    waits = [stats.eta_leased(jobs[0].id), stats.eta_queued(store.ahead(jobs[5].id))]
    ended(jobs)
    assert 0 < waits[0] < waits[1]
    assert engine.stats().eta_leased(jobs[5].id) is None


def test_slices_steps_and_rows_are_counted(start, submit, ended):
    engine = start(slots=2)
    before = engine.stats()
    ended([submit(steps=6), submit(steps=10, num_images=2)])
    stats = engine.stats()
    pictures_steps = 6 + 2 * 10
    assert stats.steps - before.steps <= pictures_steps <= 2 * (stats.steps - before.steps)
    assert 0 < stats.slices - before.slices <= stats.rows - before.rows <= stats.places - before.places
    assert stats.slice_seconds > before.slice_seconds
    assert stats.leased == {}
