"""Processes that are killed while they draw: every job is complete exactly once, and its picture is the library's."""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax.serve.buckets import bucket
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.store import FINAL
from tests.serve.test_process import Process as Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing kills like SIGKILL here"),
]
ROOT = Path(__file__).parents[2]
KILLS, JOBS = 20, 40
SAMPLERS = ["ddim", "euler_a", "dpmpp_2m", "heun"]


class Process:
    """One that draws, and how far its start has come."""

    def __init__(self, folder, cache, attempts):
        command = [sys.executable, str(ROOT / "tests/serve/drawing_process.py"), str(folder), str(cache), str(attempts)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )
        self.ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        if self.process.stdout.readline() == "ready\n":
            self.ready.set()

    def kill(self):
        self.process.kill()
        return self.process.wait()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def begin(tmp_path, cache):
    processes = []

    def begin_one(attempts=1000):
        processes.append(Process(tmp_path / "store", cache, attempts))
        return processes[-1]

    yield begin_one
    for process in processes:
        process.kill()
        process.process.stdout.close()


def submit(store, **options):
    request = {
        "operation": "image_generation",
        "prompt": "a red circle above a blue square",
        "negative_prompt": None,
        "steps": 12,
        "guidance_scale": 3.0,
        "sampler": "ddim",
        "width": 64,
        "height": 64,
        "loras": [],
        "num_images": 1,
        "response": "png",
        **options,
    }
    return store.submit(request, bucket=bucket(request))


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_complete_once(store, job, pipe):
    events = store.events(job.id)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert [event.name for event in events if event.name in FINAL] == ["complete"]
    assert events[-1].name == "complete"
    names = ("prompt", "steps", "guidance_scale", "sampler", "seed", "num_images")
    drawn = pipe(**{name: job.request[name] for name in names}).images
    assert store.job(job.id).images == len(drawn)
    for number, picture in enumerate(drawn):
        stored = Image.open(io.BytesIO(store.image(job.id, number)[1]))
        np.testing.assert_array_equal(np.asarray(stored), np.asarray(picture))


def test_jobs_survive_twenty_kills_of_two_processes_that_share_them(tmp_path, begin):
    rng = random.Random(0)
    store = SqliteStore(tmp_path / "store", attempts=1000)
    jobs, kills, interrupted = [], 0, 0
    processes = [begin(), begin()]
    while kills < KILLS:
        while len(jobs) < JOBS * (kills + 1) / KILLS:
            count = len(jobs)
            options = {"sampler": SAMPLERS[count % 4], "steps": 8 + count % 7, "num_images": 1 + (count % 5 == 0)}
            jobs.append(submit(store, seed=10 * count, **options))
        victim = rng.randrange(2)
        if rng.random() < 0.7:  # in the middle of its work; else while it starts, most likely
            wait_for(lambda victim=victim: processes[victim].ready.is_set() and store.counts()["running"])
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(0, 2))
        interrupted += bool(store.counts()["running"])
        processes[victim].kill()
        processes[victim] = begin()
        kills += 1
    assert interrupted > KILLS / 3
    wait_for(lambda: all(store.job(job.id).state in FINAL for job in jobs))
    for process in processes:
        process.kill()
    pipe = sdjax.Pipeline.from_pretrained()
    assert len(jobs) == JOBS
    for job in jobs:
        assert_complete_once(store, job, pipe)
    store.close()
    again = SqliteStore(tmp_path / "store")
    files = {
        path.name
        for path in (tmp_path / "store" / "files").rglob("*")
        if path.is_file() and "staging" not in path.parts
    }
    assert len(files) == sum(again.job(job.id).images for job in jobs)
    again.close()


def test_a_server_that_is_killed_twenty_times_completes_every_accepted_job_once(tmp_path):
    """As a client sees it: it submits again, under the same key, what it has no answer for."""
    rng = random.Random(1)
    bodies = [
        {
            "operation": "image_generation",
            "prompt": "a red circle above a blue square",
            "seed": 10 * i,
            "steps": 20 + 5 * (i % 9),
            "sampler": SAMPLERS[i % 4],
            "num_images": 1 + (i % 5 == 0),
        }
        for i in range(JOBS)
    ]
    accepted, interrupted = {}, 0
    flags = ("--data-dir", str(tmp_path / "data"), "--attempts", "1000")
    for kill in range(KILLS):
        server = Server(*flags)
        if kill % 4 != 3:  # else while it starts
            wait_for(lambda server=server: server.client.get("/ready").status_code == 200)
            threading.Timer(rng.uniform(0.0, 1.5), server.process.kill).start()
            for i in range(JOBS * (kill + 1) // KILLS):
                with contextlib.suppress(httpx.TransportError):
                    if i not in accepted:
                        answer = server.client.post("/v1/jobs", json=bodies[i], headers={"Idempotency-Key": str(i)})
                        accepted[i] = answer.json()["job_id"]
        else:
            time.sleep(rng.uniform(0, 2))
            server.process.kill()
        server.process.wait()
        with contextlib.closing(SqliteStore(tmp_path / "data")) as store:
            interrupted += bool(store.counts()["running"])
    assert interrupted > KILLS / 3
    server = Server(*flags)
    wait_for(lambda: server.client.get("/ready").status_code == 200)
    for i in range(JOBS):
        answer = server.client.post("/v1/jobs", json=bodies[i], headers={"Idempotency-Key": str(i)})
        assert accepted.setdefault(i, answer.json()["job_id"]) == answer.json()["job_id"]
    for job_id in accepted.values():
        assert server.events(job_id)[-1][0] == "complete"
    assert len(set(accepted.values())) == JOBS
    assert server.stop() == 0
    pipe = sdjax.Pipeline.from_pretrained()
    with contextlib.closing(SqliteStore(tmp_path / "data")) as store:
        assert sum(store.counts().values()) == store.counts()["complete"] == JOBS
        for job_id in accepted.values():
            assert_complete_once(store, store.job(job_id), pipe)


def test_a_job_that_kills_its_process_is_convicted_and_nobody_with_it(tmp_path, begin):
    store = SqliteStore(tmp_path / "store")
    before = submit(store, seed=1)
    poison = submit(store, seed=2, prompt="poison")
    after = [submit(store, seed=seed) for seed in (3, 4)]
    deaths = 0
    process = begin(attempts=2)
    deadline = time.monotonic() + 300
    while any(store.job(job.id).state not in FINAL for job in (before, poison, *after)):
        assert time.monotonic() < deadline
        if process.process.poll() is not None:
            deaths += 1
            process = begin(attempts=2)
        time.sleep(0.05)
    assert deaths == 2
    assert store.events(poison.id)[-1].data["code"] == "lost"
    pipe = sdjax.Pipeline.from_pretrained()
    for job in (before, *after):
        assert_complete_once(store, job, pipe)
    store.close()
