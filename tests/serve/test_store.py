"""What every store promises, whatever keeps the jobs: a new one joins by a line in `STORES`."""

import hashlib
import multiprocessing
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdjax.errors import SdjaxError
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.store import FINAL, POSITIONS_TOLD, QueueFullError, Tick

STORES = {"sqlite": SqliteStore}
"""Each opens the store that lives in a folder; opened twice, it is the same store."""

PICTURE = b"the bytes of a picture"


@pytest.fixture(params=sorted(STORES))
def open_store(request, tmp_path):
    opened = []

    def open_one(folder="store"):
        opened.append(STORES[request.param](tmp_path / folder))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()


def submit(store, prompt="a circle", bucket="64x64", **options):
    return store.submit({"prompt": prompt, "seed": 2**64 - 1}, bucket=bucket, **options)


def lease_one(store, seconds=60.0, bucket=None):
    (lease,) = store.lease(bucket, 1, owner="engine", seconds=seconds)
    return lease


def finish(store, lease, picture=PICTURE):
    data = {"format": "png", "timings": {"denoise": 0.5}}
    return store.finish(lease.job.id, lease.fence, [("png", picture)], data=data)


def names(store, job_id):
    return [event.name for event in store.events(job_id)]


def assert_story_is_whole(store, job_id):
    events = store.events(job_id)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert events[0].name == "queued"
    assert [event.name for event in events if event.name in FINAL] == [store.job(job_id).state]
    assert events[-1].name == store.job(job_id).state
    assert all(event.data["type"] == event.name for event in events)


def test_a_job_comes_back_as_it_was_submitted(store):
    job = submit(store, "テスト🌸\nSteps: 9, \ud83c 'quoted'", owner="alice")
    assert store.job(job.id) == job
    assert job.request == {"prompt": "テスト🌸\nSteps: 9, \ud83c 'quoted'", "seed": 2**64 - 1}
    assert (job.state, job.owner, job.bucket, job.attempts, job.images) == ("queued", "alice", "64x64", 0, 0)
    assert store.position(job.id) == 1
    assert store.events(job.id)[0].data == {"type": "queued", "position": 1}


def test_a_request_that_is_not_json_is_refused(store):
    with pytest.raises(ValueError, match="JSON"):
        store.submit({"guidance_scale": float("nan")}, bucket="b")
    assert store.jobs() == []


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


def test_pictures_keep_their_order_also_when_two_are_equal(store):
    job = submit(store)
    lease = lease_one(store)
    assert store.finish(job.id, lease.fence, [("png", b"a"), ("jpeg", b"b"), ("png", b"a")], data={})
    assert [store.image(job.id, i) for i in range(4)] == [("png", b"a"), ("jpeg", b"b"), ("png", b"a"), None]


def test_the_longest_waiting_is_leased_first(store):
    jobs = [submit(store, str(i)) for i in range(5)]
    leases = store.lease(None, 3, owner="engine", seconds=60)
    assert [lease.job.id for lease in leases] == [job.id for job in jobs[:3]]
    assert [store.position(job.id) for job in jobs] == [None, None, None, 1, 2]


def test_a_lease_takes_jobs_of_one_bucket(store):
    submit(store, bucket="small")
    submit(store, bucket="large")
    submit(store, bucket="small")
    assert dict(store.waiting()) == {"small": 2, "large": 1}
    assert {lease.job.bucket for lease in store.lease("large", 4, owner="engine", seconds=60)} == {"large"}
    assert [lease.job.bucket for lease in store.lease(None, 4, owner="engine", seconds=60)] == ["small", "small"]
    assert store.lease(None, 4, owner="engine", seconds=60) == []


def test_buckets_wait_in_the_order_of_their_first_job(store):
    for bucket in ("b", "a", "b", "c"):
        submit(store, bucket=bucket)
    assert list(store.waiting()) == ["b", "a", "c"]
    lease_one(store)
    assert list(store.waiting()) == ["a", "b", "c"]


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


def test_order_is_kept_after_a_restart(open_store):
    store = open_store()
    jobs = [submit(store, str(i)) for i in range(4)]
    finish(store, lease_one(store))
    store.close()
    again = open_store()
    assert again.image(jobs[0].id, 0) == ("png", PICTURE)
    assert [lease.job.id for lease in again.lease(None, 9, owner="engine", seconds=60)] == [job.id for job in jobs[1:]]


def test_a_lost_job_waits_again_at_its_old_place(store):
    jobs = [submit(store, str(i)) for i in range(3)]
    lease_one(store, seconds=0)
    assert [lease.job.id for lease in store.lease(None, 3, owner="engine", seconds=60)] == [job.id for job in jobs]


def test_a_job_that_was_lost_twice_is_not_run_a_third_time(store):
    poison, other = submit(store), submit(store)
    assert [lease_one(store, seconds=0).job.id for _ in range(2)] == [poison.id] * 2
    assert lease_one(store).job.id == other.id
    assert store.job(poison.id).state == "error"
    assert store.events(poison.id)[-1].data["code"] == "lost"
    assert_story_is_whole(store, poison.id)


def test_a_lost_job_ends_even_when_nothing_else_waits(store):
    poison, other = submit(store), submit(store)
    leases = [lease_one(store, seconds=0), lease_one(store, seconds=0)]
    assert {lease.job.id for lease in leases} == {poison.id}
    lease = lease_one(store)
    assert lease.job.id == other.id
    store.tick([Tick(lease.job.id, lease.fence, [])], seconds=60)
    assert store.job(poison.id).state == "error"


def test_a_released_job_keeps_its_place_and_its_attempts(store):
    first, second = submit(store), submit(store)
    for _ in range(5):
        lease = lease_one(store)
        assert lease.job.id == first.id
        assert lease.job.attempts == 1
        assert store.release(first.id, lease.fence)
        assert not finish(store, lease)
    assert [store.position(job.id) for job in (first, second)] == [1, 2]
    assert store.job(first.id).attempts == 0


def test_those_near_the_front_hear_of_their_moves_and_no_others(store):
    jobs = [submit(store) for _ in range(POSITIONS_TOLD + 5)]
    lease_one(store)
    lease_one(store)

    def told(job):
        return [event.data["position"] for event in store.events(job.id) if event.name == "queued"]

    assert told(jobs[2]) == [3, 2, 1]
    assert told(jobs[POSITIONS_TOLD + 1])[-1] == POSITIONS_TOLD
    assert told(jobs[-1]) == [POSITIONS_TOLD + 5]
    before = told(jobs[2])
    assert store.lease("no such bucket", 1, owner="engine", seconds=60) == []
    assert told(jobs[2]) == before


def test_an_idempotency_key_gives_the_job_that_it_was_first_used_for(store):
    first = submit(store, owner="alice", idempotency_key="k")
    assert submit(store, "another prompt", owner="alice", idempotency_key="k") == first
    assert submit(store, owner="bob", idempotency_key="k").id != first.id
    assert submit(store, owner="alice").id != submit(store, owner="alice").id
    finish(store, lease_one(store))
    again = submit(store, owner="alice", idempotency_key="k", queue_limit=0)
    assert (again.id, again.state) == (first.id, "complete")


def test_a_full_queue_refuses_and_takes_again_when_one_has_left(store):
    kept = [submit(store, queue_limit=2) for _ in range(2)]
    with pytest.raises(QueueFullError):
        submit(store, queue_limit=2)
    lease_one(store)
    submit(store, queue_limit=2)
    with pytest.raises(QueueFullError):
        submit(store, owner="alice", owner_limit=0)
    assert store.counts() == {"queued": 2, "running": 1, "complete": 0, "error": 0, "cancelled": 0}
    assert store.job(kept[0].id).state == "running"


def test_an_owner_may_have_so_many_jobs_and_others_are_not_touched(store):
    submit(store, owner="alice", owner_limit=1)
    lease = lease_one(store)
    with pytest.raises(QueueFullError):
        submit(store, owner="alice", owner_limit=1)
    submit(store, owner="bob", owner_limit=1)
    finish(store, lease)
    submit(store, owner="alice", owner_limit=1)


def test_the_steps_before_a_waiting_job_are_counted_by_bucket(store):
    wanted = [("a", {"steps": 20, "num_images": 2}), ("b", {"steps": 5, "num_images": 1}), ("a", {"steps": 7})]
    jobs = [store.submit(request, bucket=bucket) for bucket, request in [*wanted, ("a", {"steps": 100})]]
    assert store.ahead(jobs[2].id) == {"a": 47, "b": 5}
    store.lease("a", 1, owner="engine", seconds=60)
    assert store.ahead(jobs[2].id) == {"a": 7, "b": 5}
    assert store.ahead(jobs[1].id) == {"b": 5}
    assert store.ahead("no such job") == {}


def test_pages_of_jobs_meet_without_gap_or_overlap(store):
    ids = [submit(store, owner="alice" if i % 3 else "bob").id for i in range(11)]
    seen, before = [], None
    while page := store.jobs(before=before, limit=4):
        seen += [job.id for job in page]
        before = seen[-1]
        submit(store)  # new ones don't shift the pages
    assert seen == ids[::-1]
    assert [job.id for job in store.jobs(owner="bob")] == ids[::-1][1::3]


def test_a_requests_pictures_are_kept_by_their_digest(store):
    digest = hashlib.sha256(b"photo").hexdigest()
    submit(store, blobs={digest: b"photo"})
    submit(store, blobs={digest: b"photo"})
    assert store.blob(digest) == b"photo"
    with pytest.raises(KeyError):
        store.blob("0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        submit(store, blobs={"0" * 64: b"photo"})


def test_a_refused_jobs_picture_is_not_kept(store):
    digest = hashlib.sha256(b"photo").hexdigest()
    with pytest.raises(QueueFullError):
        submit(store, blobs={digest: b"photo"}, queue_limit=0)
    with pytest.raises(KeyError):
        store.blob(digest)


def test_retention_by_age_takes_only_what_is_done(store):
    done, running, queued = (submit(store) for _ in range(3))
    finish(store, lease_one(store))
    lease_one(store)
    assert store.retain(seconds=3600, total_bytes=None) == 0
    assert store.retain(seconds=0, total_bytes=None) == 1
    assert store.job(done.id) is None
    assert store.events(done.id) == []
    assert store.image(done.id, 0) is None
    assert [job.id for job in store.jobs()] == [queued.id, running.id]


def test_retention_by_size_takes_the_oldest_first_and_never_a_live_one(store):
    jobs = [submit(store) for _ in range(4)]
    for i in range(3):
        finish(store, lease_one(store), bytes([i]) * 100_000)
    assert store.retain(seconds=None, total_bytes=250_000) == 1
    assert [job.id for job in store.jobs()] == [job.id for job in jobs[:0:-1]]
    assert store.retain(seconds=None, total_bytes=0) == 2
    assert [job.id for job in store.jobs()] == [jobs[3].id]


def test_a_picture_that_two_jobs_share_outlives_one_of_them(store):
    photo, digest = b"photo", hashlib.sha256(b"photo").hexdigest()
    first, second = (submit(store, blobs={digest: photo}) for _ in range(2))
    finish(store, lease_one(store))
    store.retain(seconds=0, total_bytes=None)
    assert store.job(first.id) is None
    assert store.blob(digest) == photo
    finish(store, lease_one(store))
    assert store.image(second.id, 0) == ("png", PICTURE)
    store.retain(seconds=0, total_bytes=None)
    with pytest.raises(KeyError):
        store.blob(digest)


def test_a_final_job_is_deleted_with_its_pictures_and_a_live_one_is_not(store):
    photo, digest = b"photo", hashlib.sha256(b"photo").hexdigest()
    first, second = (submit(store, blobs={digest: photo}) for _ in range(2))
    assert not store.delete(first.id)
    finish(store, lease_one(store))
    assert not store.delete(second.id)
    assert store.delete(first.id)
    assert not store.delete(first.id)
    assert (store.job(first.id), store.events(first.id), store.image(first.id, 0)) == (None, [], None)
    assert store.blob(digest) == photo
    store.cancel(second.id)
    assert store.delete(second.id)
    with pytest.raises(KeyError):
        store.blob(digest)


def test_subscribers_hear_of_a_job_after_the_event_is_there(store):
    heard = []
    end = store.subscribe(lambda job_id: heard.append((job_id, names(store, job_id)[-1])))
    store.subscribe(lambda job_id: 1 / 0)  # a broken one disturbs nobody
    job = submit(store)
    lease = lease_one(store)
    store.tick([Tick(job.id, lease.fence, [("progress", {"step": 1})])], seconds=60)
    store.tick([Tick(job.id, lease.fence, [])], seconds=60)
    finish(store, lease)
    end()
    submit(store)
    assert heard == [(job.id, "queued"), (job.id, "progress"), (job.id, "complete")]


def test_threads_lease_each_job_exactly_once(store):
    drawn = []

    def submit_some(i):
        return [submit(store, f"{i}-{j}").id for j in range(10)]

    def draw_some(_):
        deadline = time.monotonic() + 30
        while len(drawn) < 40 and time.monotonic() < deadline:
            for lease in store.lease(None, 2, owner="engine", seconds=60):
                store.tick([Tick(lease.job.id, lease.fence, [("progress", {"step": 1})])], seconds=60)
                if finish(store, lease):
                    drawn.append(lease.job.id)

    with ThreadPoolExecutor(8) as threads:
        drawing = [threads.submit(draw_some, i) for i in range(4)]
        submitted = [job_id for part in threads.map(submit_some, range(4)) for job_id in part]
        for each in drawing:
            each.result()
    assert sorted(drawn) == sorted(submitted)
    for job_id in submitted:
        assert_story_is_whole(store, job_id)


def _draw_in_a_process(factory, folder, number, submissions, drawn):
    store = factory(folder)
    for i in range(submissions):
        submit(store, f"{number}-{i}")
        for lease in store.lease(None, 1, owner=str(number), seconds=60):
            store.tick([Tick(lease.job.id, lease.fence, [("progress", {"step": 1})])], seconds=60)
            if finish(store, lease):
                drawn.put(lease.job.id)
    store.close()


@pytest.mark.parametrize("factory", [STORES[name] for name in sorted(STORES)])
def test_processes_share_a_folder(factory, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    drawn = spawn.SimpleQueue()
    processes = [
        spawn.Process(target=_draw_in_a_process, args=(factory, tmp_path / "store", n, 15, drawn)) for n in (0, 1)
    ]
    for process in processes:
        process.start()
    found = [drawn.get() for _ in range(30)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = factory(tmp_path / "store")
    assert sorted(found) == sorted(job.id for job in store.jobs())
    for job_id in found:
        assert store.job(job_id).state == "complete"
        assert_story_is_whole(store, job_id)
    store.close()


class TestSqlite:
    """What only this store has: a folder with files in it."""

    def test_half_written_and_forgotten_files_are_cleaned_at_start(self, tmp_path):
        store = SqliteStore(tmp_path)
        job = submit(store)
        finish(store, lease_one(store))
        store.close()
        files = tmp_path / "files"
        half = files / "staging" / "abc"
        half.write_bytes(b"hal")
        os.utime(half, (0, 0))
        fresh = files / "staging" / "def"
        fresh.write_bytes(b"another process is writing this")
        orphan = files / "ff" / ("ff" * 32)
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_bytes(b"no job has it")
        again = SqliteStore(tmp_path)
        assert not half.exists()
        assert fresh.exists()
        assert not orphan.exists()
        assert again.image(job.id, 0) == ("png", PICTURE)
        again.close()

    def test_deleted_pictures_leave_the_disk(self, tmp_path):
        store = SqliteStore(tmp_path)
        submit(store)
        finish(store, lease_one(store))
        store.retain(seconds=0, total_bytes=None)
        assert [path for path in (tmp_path / "files").rglob("*") if path.is_file()] == []
        store.close()

    def test_a_folder_of_another_version_is_refused(self, tmp_path):
        SqliteStore(tmp_path).close()
        with sqlite3.connect(tmp_path / "jobs.sqlite3") as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
        with pytest.raises(SdjaxError, match="99"):
            SqliteStore(tmp_path)

    def test_a_closed_store_says_so(self, tmp_path):
        store = SqliteStore(tmp_path)
        store.close()
        with pytest.raises(SdjaxError, match="closed"):
            store.jobs()

    def test_a_killed_write_leaves_nothing(self, tmp_path, monkeypatch):
        store = SqliteStore(tmp_path)
        job = submit(store)
        lease = lease_one(store)
        monkeypatch.setattr(store._files, "keep", lambda parts: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="space"):
            finish(store, lease)
        monkeypatch.undo()
        assert store.job(job.id).state == "running"
        assert list((tmp_path / "files" / "staging").iterdir()) == []
        assert finish(store, lease)
        store.close()

    def test_thousands_of_jobs_stay_quick(self, tmp_path):
        store = SqliteStore(tmp_path)
        for i in range(1000):
            submit(store, str(i))
        began = time.perf_counter()
        for _ in range(50):
            store.lease(None, 1, owner="engine", seconds=60)
            store.waiting()
            store.counts()
        assert (time.perf_counter() - began) / 50 < 0.1
        store.close()
