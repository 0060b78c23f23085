"""Streams: late readers, readers that come back, many of them, and one that goes away."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.conftest import read_events, wait_for


@pytest.fixture
def paused(serve):
    server = serve(keep_alive=0.1)
    server.engine.go.clear()
    yield server
    server.engine.go.set()


def names(events):
    return [event["event"] for event in events]


def test_a_late_reader_hears_the_whole_story(server):
    job_id = server.submit(steps=3)
    server.wait(job_id, "complete")
    events = server.events(job_id)
    assert names(events) == ["queued", "progress", "progress", "progress", "complete"]
    assert [int(event["id"]) for event in events] == [1, 2, 3, 4, 5]
    assert events == server.events(job_id)


def test_a_reader_that_comes_back_goes_on_after_what_it_heard(server):
    job_id = server.submit(steps=3)
    whole = server.events(job_id)
    for heard in range(1, 5):
        assert server.events(job_id, last=heard) == whole[heard:]


@pytest.mark.parametrize("last", ["0", "-1", "abc", "105", "9" * 40, "1.5", "²"])
def test_an_id_that_is_none_of_the_jobs_tells_the_story_from_its_beginning(server, last):
    job_id = server.submit(steps=2)
    whole = server.events(job_id)
    headers = {"Last-Event-ID": last.encode()}
    with server.client.stream("GET", f"/v1/jobs/{job_id}/stream", headers=headers) as answer:
        assert list(read_events(answer)) == whole


def test_a_reader_that_heard_the_end_is_told_not_to_come_back(server):
    job_id = server.submit(steps=1)
    last = server.events(job_id)[-1]["id"]
    answer = server.client.get(f"/v1/jobs/{job_id}/stream", headers={"Last-Event-ID": last})
    assert answer.status_code == 204
    assert answer.content == b""


def test_the_bytes_of_an_event_are_those_of_the_contract(server):
    job_id = server.submit(steps=1)
    server.wait(job_id, "complete")
    answer = server.client.get(f"/v1/jobs/{job_id}/stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.content.startswith(
        b'id: 1\nevent: queued\ndata: {"type":"queued","position":1}\n\n'
        b'id: 2\nevent: progress\ndata: {"type":"progress","step":1,"total":1,"percent":100.0}\n\n'
        b'id: 3\nevent: complete\ndata: {"type":"complete","image":"'
    )
    assert answer.content.endswith(b"}\n\n")


@pytest.mark.parametrize(("prompt", "end"), [("a circle", "complete"), ("fail", "error"), ("a circle", "cancelled")])
def test_every_end_closes_the_stream_of_every_reader(paused, prompt, end):
    job_id = paused.submit(prompt, steps=2)
    with ThreadPoolExecutor(3) as pool:
        stories = [pool.submit(paused.events, job_id) for _ in range(3)]
        time.sleep(0.1)
        if end == "cancelled":
            paused.client.delete(f"/v1/jobs/{job_id}")
        paused.engine.go.set()
        first, *others = [story.result(120) for story in stories]
    assert names(first)[-1] == end
    assert others == [first, first]


def test_fifty_readers_hear_the_same_story(serve):
    server = serve(step_seconds=0.02)
    server.engine.go.clear()
    job_id = server.submit(steps=10, preview_every=2)
    with ThreadPoolExecutor(50) as pool:
        stories = [pool.submit(server.events, job_id) for _ in range(50)]
        time.sleep(0.3)
        server.engine.go.set()
        told = [story.result(120) for story in stories]
    assert names(told[0]).count("preview") == 4
    assert all(story == told[0] for story in told)


@pytest.mark.parametrize("times", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_opening_a_stream_at_the_moment_a_job_ends_never_hangs(server, times):
    for _ in range(times):
        job_id = server.submit(steps=1)
        assert names(server.events(job_id))[-1] == "complete"


def test_silence_is_filled_with_comments_that_have_no_id(paused):
    job_id = paused.submit()
    with paused.client.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
        lines = answer.iter_lines()
        comments = [line for line in (next(lines) for _ in range(12)) if line.startswith(":")]
    assert comments
    assert set(comments) == {": keep-alive"}


def test_a_job_outlives_its_reader(paused):
    job_id = paused.submit(steps=3)
    with paused.client.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
        next(read_events(answer))
    paused.engine.go.set()
    assert paused.wait(job_id, "complete")
    registry = paused.app.state.front.registry
    wait_for(lambda: not registry._watchers)


def test_a_job_that_asked_for_it_ends_with_its_last_reader(paused):
    job_id = paused.submit(steps=3, cancel_on_disconnect=True)
    with paused.client.stream("GET", f"/v1/jobs/{job_id}/stream") as first:
        heard = read_events(first)
        next(heard)
        with paused.client.stream("GET", f"/v1/jobs/{job_id}/stream") as second:
            next(read_events(second))
        time.sleep(0.3)
        assert paused.job(job_id)["state"] in ("queued", "running")
    assert paused.wait(job_id, "cancelled")["request"]["cancel_on_disconnect"] is True


def test_a_job_that_asked_for_it_is_complete_when_its_reader_stays(server):
    job_id = server.submit(steps=3, cancel_on_disconnect=True)
    assert names(server.events(job_id))[-1] == "complete"
    assert server.job(job_id)["state"] == "complete"


def test_a_reader_that_does_not_read_disturbs_nobody(serve):
    server = serve()
    server.engine.go.clear()
    job_id = server.submit(steps=100, preview_every=1, width=512, height=512)
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.sendall(f"GET /v1/jobs/{job_id}/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        server.engine.go.set()
        assert names(server.events(job_id))[-1] == "complete"
        assert server.client.get("/health").status_code == 200


def test_health_answers_at_once_while_large_bodies_are_decoded(server):
    import base64
    import io

    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    body = json.dumps(
        {
            "operation": "image_transform",
            "prompt": "a circle",
            "steps": 2,
            "input_image": base64.b64encode(file.getvalue()).decode(),
        }
    )
    done = threading.Event()

    def upload():
        for _ in range(3):
            assert server.client.post("/v1/jobs", content=body).status_code == 200
        done.set()

    thread = threading.Thread(target=upload)
    thread.start()
    answers = 0
    import httpx

    with httpx.Client(base_url=server.url) as prober:
        while not done.wait(0.02):
            assert prober.get("/health").status_code == 200
            answers += 1
    thread.join()
    assert answers > 3 * 3  # a loop that waits for the decoder answers about once for each of the three
