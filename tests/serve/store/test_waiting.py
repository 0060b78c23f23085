"""Who is next, who waits again, and who is turned away."""

import pytest

from sdjax.serve.store import POSITIONS_TOLD, QueueFullError, Tick
from tests.serve.store.stores import assert_story_is_whole, finish, lease_one, submit


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
