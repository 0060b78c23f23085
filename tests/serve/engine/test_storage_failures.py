"""Whatever raises wherever: each job goes on, waits again, or ends, and the engine keeps none."""

import hashlib
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax.serve import batches, drawing, finisher, intake, patience, slices
from sdjax.serve import engine as engine_module
from sdjax.serve.batches import Batches
from sdjax.serve.buckets import bucket
from sdjax.serve.engine import GenerationEngine
from sdjax.serve.finisher import Finisher
from sdjax.serve.intake import Intake
from sdjax.serve.leases import Leases
from sdjax.serve.preparer import Preparer
from sdjax.serve.previews import Previews
from sdjax.serve.programs import Programs
from sdjax.serve.readiness import Readiness
from sdjax.serve.scheduling import SLICE_SECONDS
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.storage import StorageError
from sdjax.serve.store import FINAL
from sdjax.serve.work import Works
from tests.serve.conftest import wait_for
from tests.serve.engine.jobs import REQUEST, drawn_by_library, pixels

CALLS = ("waiting", "lease", "tick", "finish", "fail", "release", "blob")
PHASES = [
    (drawing, "requests"),
    (drawing, "prepare"),
    (drawing, "key"),
    (drawing, "walk"),
    (drawing, "latents"),
    (drawing, "estimate"),
    (sdjax.Pipeline, "finish"),
    (Programs, "step_seconds"),
    (Programs, "next_size"),
    (Programs, "measured"),
    (batches, "partition"),
    (slices, "slice_length"),
    (intake, "admit"),
    (finisher, "encode"),
    (Finisher, "finish"),
    (Finisher, "fail"),
    (Finisher, "preview"),
    (Previews, "picture"),
    (Preparer, "prepare"),
    (Preparer, "compile_larger"),
    (Readiness, "prepared"),
    (Readiness, "compile"),
    (Readiness, "is_known"),
    (Intake, "fill"),
    (Intake, "reconcile"),
    (Leases, "take"),
    (Leases, "tell"),
    (Leases, "held"),
    (Works, "add"),
    (Works, "active"),
    (Works, "waiting"),
    (Works, "walked"),
    (Batches, "join"),
    (Batches, "draw"),
    (Batches, "decode"),
    (GenerationEngine, "_listen"),
    (GenerationEngine, "_tell"),
    (GenerationEngine, "_count"),
    (GenerationEngine, "_fail"),
    (Batches, "finish"),
]


def no_space():
    return OSError("no space")


def storage_full():
    return StorageError("full")


def our_fault():
    return RuntimeError("a fault in /usr/lib/secret.py")


class Failing:
    """A function that raises so many times, each time anew, and counts how often it did."""

    def __init__(self, function, error, times):
        self.function, self.error, self.left, self.raised = function, error, times, 0
        self.guard = threading.Lock()

    def __call__(self, *args, **kwargs):
        with self.guard:
            fails = self.left > 0
            self.left -= fails
            self.raised += fails
        if fails:
            raise self.error()
        return self.function(*args, **kwargs)

    def __get__(self, instance, owner):
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)


@pytest.fixture(scope="module")
def running(pipe, tmp_path_factory):
    """One engine for all these tests: each leaves it as it found it, or the next one shows that it didn't."""
    store = SqliteStore(tmp_path_factory.mktemp("store"))
    engine = GenerationEngine(pipe, store, batch_sizes=(1, 2), slots=4, lease_seconds=2.0)
    engine.start()
    engine.wait_until_ready()
    yield store, engine
    engine.drain(0.0)
    store.close()


@pytest.fixture
def quick(monkeypatch):
    """Short pauses."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(engine_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(engine_module, "FAILED_TURNS", 5)


def submit(store, photo=None, **options):
    request, blobs = {**REQUEST, "preview_every": 2, **options}, {}
    if photo is not None:
        blobs = {digest_of(photo): photo}
        request |= {"operation": "image_transform", "strength": 0.7, "input_image": {"blob": digest_of(photo)}}
    return store.submit(request, bucket=bucket(request), blobs=blobs)


def digest_of(content):
    return hashlib.sha256(content).hexdigest()


def png():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(file, "PNG")
    return file.getvalue()


def jobs_of_every_kind(store):
    """Two buckets, several pictures, one that starts from a picture, one that fails."""
    return [
        submit(store, seed=1, steps=12),
        submit(store, seed=2, steps=9, guidance_scale=0.0),
        submit(store, seed=3, steps=4, num_images=2),
        submit(store, seed=4, photo=png()),
        submit(store, seed=5, sampler="no such"),
    ]


def wait_for_ends(store, engine, jobs, seconds=60):
    wait_for(lambda: all(store.job(job.id).state in FINAL for job in jobs), seconds)
    wait_for(lambda: not engine._works and not engine._leases.held(), 10)
    stats = engine.stats()
    assert (stats.drawing, stats.pending, stats.finishing, stats.unstored) == (0, 0, 0, 0)
    return [store.job(job.id).state for job in jobs]


@pytest.mark.parametrize("error", [no_space, storage_full, our_fault])
@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_fails_three_times_delays_jobs_and_ends_none(running, quick, pipe, monkeypatch, call, error):
    store, engine = running
    failing = Failing(getattr(store, call), error, 3)
    monkeypatch.setattr(store, call, failing)
    if call == "release":  # it is called for a job that is to be drawn alone, while others are drawn
        jobs = [submit(store, seed=seed, steps=30) for seed in range(2)]
        suspect = submit(store, seed=9)
        wait_for(lambda: engine._works.live(suspect.id), 60)
        work = engine._works.live(suspect.id)
        engine._put(suspect.id, engine._finisher.give_back, work)
        jobs.append(suspect)
        expected = ["complete"] * 3
    else:
        jobs = jobs_of_every_kind(store)
        expected = ["complete"] * 4 + ["error"]
    is_blamed = call == "blob" and error is not storage_full
    if is_blamed:
        expected[3] = "error"  # no store raises that: a fault of ours
    assert wait_for_ends(store, engine, jobs) == expected
    assert failing.raised == (1 if is_blamed else 3)
    assert [store.job(job.id).attempts for job in jobs] == [1] * len(jobs)
    for job in jobs[:2]:
        np.testing.assert_array_equal(pixels(store, job), drawn_by_library(pipe, job))


def test_a_store_that_fails_between_two_cuts_drops_no_picture(running, quick, pipe, monkeypatch):
    """Two buckets draw, and the store fails each time that progress is told."""
    store, engine = running
    jobs = [submit(store, seed=seed, steps=150, guidance_scale=3.0 * (seed % 2)) for seed in range(4)]
    wait_for(lambda: len(engine._works.active()) == 2, 60)
    failing = Failing(store.tick, no_space, 3)
    monkeypatch.setattr(store, "tick", failing)
    assert wait_for_ends(store, engine, jobs, 120) == ["complete"] * 4
    assert failing.raised == 3
    for job in jobs:
        np.testing.assert_array_equal(pixels(store, job), drawn_by_library(pipe, job))


@pytest.mark.parametrize(("owner", "name"), PHASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_part_of_the_engine_that_raises_three_times_loses_no_job(running, quick, monkeypatch, owner, name):
    store, engine = running
    failing = Failing(getattr(owner, name), our_fault, 3)
    monkeypatch.setattr(owner, name, failing)
    wait_for_ends(store, engine, jobs_of_every_kind(store))
    monkeypatch.undo()
    after = submit(store, seed=7)
    assert wait_for_ends(store, engine, [after]) == ["complete"]


DRAWING = [phase for phase in PHASES if phase[0] in (drawing, batches, slices, Batches, sdjax.Pipeline)]


@pytest.mark.parametrize(("owner", "name"), DRAWING, ids=lambda value: getattr(value, "__name__", value))
def test_a_part_of_drawing_that_always_raises_ends_the_jobs_that_need_it(running, quick, monkeypatch, owner, name):
    store, engine = running
    failing = Failing(getattr(owner, name), our_fault, 10**9)
    monkeypatch.setattr(owner, name, failing)
    jobs = jobs_of_every_kind(store)
    states = wait_for_ends(store, engine, jobs)
    assert "error" in states[:1] or name == "estimate"  # previews alone need that
    for job in jobs:
        assert "secret" not in str(store.events(job.id)[-1].data)
    monkeypatch.undo()
    after = submit(store, seed=7)
    assert wait_for_ends(store, engine, [after]) == ["complete"]


def test_pictures_are_held_while_the_store_is_full_and_stored_once(running, quick, pipe, monkeypatch):
    store, engine = running
    failing = Failing(store.finish, storage_full, 10**9)
    monkeypatch.setattr(store, "finish", failing)
    jobs = [submit(store, seed=seed) for seed in range(3)]
    wait_for(lambda: engine.stats().unstored == 3, 60)
    time.sleep(2.5)  # longer than a lease
    assert [store.job(job.id).state for job in jobs] == ["running"] * 3
    failing.left = 0
    assert wait_for_ends(store, engine, jobs) == ["complete"] * 3
    assert [store.job(job.id).attempts for job in jobs] == [1] * 3
    for job in jobs:
        np.testing.assert_array_equal(pixels(store, job), drawn_by_library(pipe, job))


def test_leases_that_could_not_be_renewed_are_not_taken_from_ourselves(running, quick, monkeypatch):
    """The store fails for longer than a lease; the first to come when it works is the engine, with another job."""
    store, engine = running
    long = submit(store, seed=1, steps=40, num_images=2)
    wait_for(lambda: engine._works.active(), 60)
    failing = Failing(store.tick, storage_full, 10**9)
    held_up = Failing(store.finish, storage_full, 10**9)
    monkeypatch.setattr(store, "tick", failing)
    monkeypatch.setattr(store, "finish", held_up)
    wait_for(lambda: engine.stats().unstored == 1, 120)
    time.sleep(2.5)
    other = submit(store, seed=2)
    failing.left = held_up.left = 0
    assert wait_for_ends(store, engine, [long, other]) == ["complete"] * 2
    assert store.job(long.id).attempts == 1


def test_what_cannot_be_stored_when_the_engine_ends_is_given_back_or_runs_out(pipe, store, start, submit, monkeypatch):
    monkeypatch.setattr(engine_module, "STORING_SECONDS", 0.5)
    engine = start()
    monkeypatch.setattr(store, "finish", Failing(store.finish, storage_full, 10**9))
    job = submit()
    wait_for(lambda: engine.stats().unstored == 1, 60)
    began = time.monotonic()
    engine.drain(2 * SLICE_SECONDS)
    assert time.monotonic() - began < 10
    assert (store.job(job.id).state, store.job(job.id).attempts) == ("queued", 0)


def test_a_picture_of_a_request_that_is_gone_ends_its_job_and_says_so(running, quick):
    store, engine = running
    content = png()
    digest = digest_of(content)
    store.delete(next((job.id for job in store.jobs() if "input_image" in job.request), ""))
    request = {**REQUEST, "operation": "image_transform", "strength": 0.5, "input_image": {"blob": digest}}
    path = store.folder / "files" / digest[:2] / digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._intake, "_has_room", lambda: False)
        job = store.submit(request, bucket=bucket(request), blobs={digest: content})
        path.unlink()
    assert wait_for_ends(store, engine, [job]) == ["error"]
    last = store.events(job.id)[-1].data
    assert last["code"] == "input_lost"
    assert digest not in last["message"]
