"""From a job's first event to its one last, whatever comes between."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from sdjax.serve.store import Tick
from tests.serve.store.stores import PICTURE, assert_story_is_whole, finish, lease_one, names, submit


def test_a_job_is_drawn_and_its_picture_kept(store):
    job = submit(store)
    lease = lease_one(store)
    assert lease.job.id == job.id
    assert (lease.job.state, lease.job.attempts) == ("running", 1)
    assert lease.expires > time.time()
    assert store.tick([Tick(job.id, lease.fence, [("progress", {"step": 1, "total": 2})])], seconds=60) == frozenset()
    assert finish(store, lease)
    done = store.job(job.id)
    assert (done.state, done.images, done.timings) == ("complete", 1, {"denoise": 0.5})
    assert done.created <= done.started <= done.finished
    assert store.image(job.id, 0) == ("png", PICTURE)
    assert names(store, job.id) == ["queued", "progress", "complete"]
    assert_story_is_whole(store, job.id)


def test_a_frozen_owner_whose_lease_was_taken_is_refused(store):
    job = submit(store)
    frozen = lease_one(store, seconds=0)
    taken = lease_one(store)
    assert taken.job.id == job.id
    assert taken.fence > frozen.fence
    assert store.tick([Tick(job.id, frozen.fence, [("progress", {"step": 9})])], seconds=60) == {job.id}
    assert not finish(store, frozen, b"late")
    assert not store.fail(job.id, frozen.fence, "internal", "late")
    assert not store.release(job.id, frozen.fence)
    assert finish(store, taken)
    assert store.image(job.id, 0) == ("png", PICTURE)
    assert_story_is_whole(store, job.id)
    assert "progress" not in names(store, job.id)


def test_a_lease_that_ran_out_but_was_not_taken_can_be_renewed(store):
    job = submit(store)
    lease = lease_one(store, seconds=0)
    assert store.tick([Tick(job.id, lease.fence, [])], seconds=60) == frozenset()
    assert store.lease(None, 1, owner="other", seconds=60) == []
    assert finish(store, lease)


def test_a_result_that_comes_twice_counts_once(store):
    job = submit(store)
    lease = lease_one(store)
    assert finish(store, lease)
    assert not finish(store, lease, b"another picture")
    assert not store.fail(job.id, lease.fence, "internal", "too late")
    assert not store.release(job.id, lease.fence)
    assert store.image(job.id, 0) == ("png", PICTURE)
    assert_story_is_whole(store, job.id)


def test_a_failure_ends_a_job(store):
    job = submit(store)
    lease = lease_one(store)
    assert store.fail(job.id, lease.fence, "not_finite", "NaN at step 3")
    assert store.job(job.id).state == "error"
    assert store.events(job.id)[-1].data == {"type": "error", "code": "not_finite", "message": "NaN at step 3"}
    assert_story_is_whole(store, job.id)


def test_a_waiting_job_is_cancelled_at_once(store):
    first, second, third = (submit(store) for _ in range(3))
    assert store.cancel(second.id).state == "cancelled"
    assert [store.position(job.id) for job in (first, second, third)] == [1, None, 2]
    assert [lease.job.id for lease in store.lease(None, 3, owner="engine", seconds=60)] == [first.id, third.id]
    assert_story_is_whole(store, second.id)


def test_a_cancel_at_the_last_step_wins_or_loses_but_never_both(store):
    for _ in range(20):
        job = submit(store)
        lease = lease_one(store)
        barrier = threading.Barrier(2)

        def cancel(job=job, barrier=barrier):
            barrier.wait()
            return store.cancel(job.id)

        with ThreadPoolExecutor(1) as other:
            cancelled = other.submit(cancel)
            barrier.wait()
            finished = finish(store, lease)
            assert cancelled.result().state in ("cancelled", "complete")
        assert store.job(job.id).state == ("complete" if finished else "cancelled")
        assert (store.image(job.id, 0) is not None) == finished
        assert_story_is_whole(store, job.id)


def test_a_running_job_that_is_cancelled_is_told_by_the_next_tick(store):
    mine, other = submit(store), submit(store)
    leases = store.lease(None, 2, owner="engine", seconds=60)
    store.cancel(mine.id)
    ticks = [Tick(lease.job.id, lease.fence, [("progress", {"step": 2})]) for lease in leases]
    assert store.tick(ticks, seconds=60) == {mine.id}
    assert names(store, mine.id) == ["queued", "cancelled"]
    assert names(store, other.id)[-1] == "progress"


def test_cancelling_twice_or_what_is_done_or_unknown_changes_nothing(store):
    done, gone = submit(store), submit(store)
    finish(store, lease_one(store))
    assert store.cancel(done.id).state == "complete"
    store.cancel(gone.id)
    assert store.cancel(gone.id) == store.job(gone.id)
    assert store.cancel("0" * 32) is None
    assert_story_is_whole(store, done.id)
    assert_story_is_whole(store, gone.id)


def test_a_late_reader_gets_the_whole_story_and_a_resumed_one_the_rest(store):
    job = submit(store)
    lease = lease_one(store)
    for step in range(1, 4):
        store.tick([Tick(job.id, lease.fence, [("progress", {"step": step})])], seconds=60)
    finish(store, lease)
    story = store.events(job.id)
    assert [event.name for event in story] == ["queued", *["progress"] * 3, "complete"]
    for after in range(len(story) + 2):
        assert store.events(job.id, after) == story[after:]
    assert store.events(job.id, after=10**6) == []
    assert store.events("unknown") == []
