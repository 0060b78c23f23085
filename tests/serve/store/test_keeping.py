"""What a store keeps, for how long, and what it gives back."""

import hashlib

import pytest

from sdjax.serve.store import QueueFullError
from tests.serve.store.stores import PICTURE, finish, lease_one, submit


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


def test_pictures_keep_their_order_also_when_two_are_equal(store):
    job = submit(store)
    lease = lease_one(store)
    assert store.finish(job.id, lease.fence, [("png", b"a"), ("jpeg", b"b"), ("png", b"a")], data={})
    assert [store.image(job.id, i) for i in range(4)] == [("png", b"a"), ("jpeg", b"b"), ("png", b"a"), None]


def test_order_is_kept_after_a_restart(open_store):
    store = open_store()
    jobs = [submit(store, str(i)) for i in range(4)]
    finish(store, lease_one(store))
    store.close()
    again = open_store()
    assert again.image(jobs[0].id, 0) == ("png", PICTURE)
    assert [lease.job.id for lease in again.lease(None, 9, owner="engine", seconds=60)] == [job.id for job in jobs[1:]]


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
