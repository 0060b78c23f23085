"""Threads and processes that use a store at once."""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdjax.serve.store import Tick
from tests.serve.store.stores import STORES, assert_story_is_whole, finish, lease_one, names, submit


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
