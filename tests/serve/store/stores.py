"""The stores that have to keep the same promises: a new one joins by a line in `STORES`."""

from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.store import FINAL

STORES = {"sqlite": SqliteStore}
"""Each opens the store that lives in a folder; opened twice, it is the same store."""

PICTURE = b"the bytes of a picture"


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
