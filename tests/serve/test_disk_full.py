"""A disk that fills up under a real server: nothing that was accepted is lost, and all goes on when there is room."""

import json
import re
import signal
import time

import pytest

from tests.serve.conftest import wait_for
from tests.serve.small_disk import small_disk
from tests.serve.test_process import Process

BODY = {"operation": "image_generation", "prompt": "a red circle on a blue background"}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    with small_disk(tmp_path_factory.mktemp("small") / "disk", 24) as disk:
        yield disk


@pytest.fixture(scope="module")
def process(disk):
    process = Process("--data-dir", str(disk.folder / "data"), "--drain", "5")
    wait_for(lambda: process.client.get("/ready").status_code == 200, 300)
    yield process
    if process.process.poll() is None:
        process.stop(signal.SIGKILL)


def free_bytes(process):
    found = re.search(r"^sdjax_storage_free_bytes (\S+)$", process.client.get("/metrics").text, re.MULTILINE)
    return float(found[1])


def test_a_full_disk_refuses_new_jobs_and_the_server_is_not_ready_and_says_why(process, disk):
    before = free_bytes(process)
    disk.fill()
    try:
        assert free_bytes(process) < 2**20 < before
        answer = wait_for(lambda: (found := process.client.get("/ready")).status_code == 503 and found)
        assert answer.json()["status"] == "storage_failed"
        assert "no space" in answer.json()["reason"]
        assert process.client.get("/health").status_code == 200

        def refused():
            found = process.client.post("/v1/jobs", json=BODY)
            return found if found.status_code != 200 else None  # the log may have room for some

        answer = wait_for(refused, 60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
        assert int(answer.headers["retry-after"]) > 0
        assert str(disk.folder) not in answer.text
        answer = process.client.post("/v1/images/generations", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
        assert "x-should-retry" not in answer.headers
    finally:
        disk.make_room()
    wait_for(lambda: process.client.get("/ready").status_code == 200)
    assert process.events(process.submit(steps=2))[-1][0] == "complete"


def test_what_is_drawn_while_the_disk_is_full_is_stored_when_there_is_room(process, disk):
    jobs = [process.submit(steps=100, num_images=2, seed=seed, guidance_scale=3.0 * (seed % 2)) for seed in range(4)]
    wait_for(lambda: process.client.get(f"/v1/jobs/{jobs[0]}").json()["state"] == "running", 60)
    disk.fill()
    try:
        wait_for(lambda: process.client.get("/ready").status_code == 503)
        time.sleep(20)  # longer than a lease
        states = {process.client.get(f"/v1/jobs/{job}").json()["state"] for job in jobs}
        assert states <= {"queued", "running"}
    finally:
        disk.make_room()
    for job in jobs:
        assert process.events(job)[-1][0] == "complete"
        assert len(process.client.get(f"/v1/jobs/{job}").json()["images"]) == 2
    wait_for(lambda: process.client.get("/ready").status_code == 200)
    lines = [json.loads(line) for line in process.lines]
    assert not any("traceback" in line for line in lines)
    assert sum("no space" in line["message"] for line in lines) < 60


def test_a_server_that_stops_while_its_disk_is_full_ends_in_time_and_its_successor_draws_the_rest(process, disk):
    job = process.submit(steps=150, num_images=4)
    wait_for(lambda: process.client.get(f"/v1/jobs/{job}").json()["state"] == "running", 60)
    disk.fill()
    began = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - began < 40
    disk.make_room()
    second = Process("--data-dir", str(disk.folder / "data"))
    wait_for(lambda: second.client.get("/ready").status_code == 200, 300)
    assert second.events(job)[-1][0] == "complete"
    assert second.stop() == 0
