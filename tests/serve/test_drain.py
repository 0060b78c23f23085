"""Being told to stop: no new jobs, the running ones finish, and every reader hears how it ends."""

import json
import signal
import threading
import time

from tests.serve.conftest import read_events, wait_for

BODY = {"operation": "image_generation", "prompt": "a circle"}


def listen(server, job_id):
    """Read a stream in the background: a thread, and the list that it fills."""
    told = []

    def read():
        with server.client.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
            told.extend(read_events(answer))

    thread = threading.Thread(target=read)
    thread.start()
    return thread, told


def test_a_running_job_finishes_while_new_ones_are_refused(serve):
    server = serve(drain=20)
    server.engine.go.clear()
    job_id = server.submit(steps=3)
    server.wait(job_id, "running")
    thread, told = listen(server, job_id)
    server.server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: server.client.get("/ready").status_code == 503)
    assert server.client.get("/ready").json()["status"] == "draining"
    assert server.client.get("/health").status_code == 200
    for path, body in (("/v1/jobs", BODY), ("/v1/images/generations", {"prompt": "x"})):
        answer = server.client.post(path, json=body)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "draining"
        assert int(answer.headers["retry-after"]) > 0
    server.engine.go.set()
    thread.join(120)
    server.thread.join(120)
    assert not server.thread.is_alive()
    assert [event["event"] for event in told] == ["queued", "progress", "progress", "progress", "complete"]


def test_a_job_that_takes_too_long_waits_again_and_its_reader_is_told(serve):
    server = serve(drain=0.2)
    server.engine.go.clear()
    running, waiting = server.submit(steps=3), server.submit(steps=3)
    server.wait(running, "running")
    readers = [listen(server, job_id) for job_id in (running, waiting)]
    time.sleep(0.2)
    server.server.handle_exit(signal.SIGTERM, None)
    for thread, told in readers:
        thread.join(120)
        assert told[-1] == {"event": "closing", "data": '{"type":"closing"}'}
    server.thread.join(120)
    assert not server.thread.is_alive()  # the job would take for ever

    from sdjax.serve.sqlite import SqliteStore

    after = SqliteStore(server.store.folder)
    assert [after.job(job_id).state for job_id in (running, waiting)] == ["queued", "queued"]
    after.close()


def test_a_synchronous_request_hears_that_the_server_stops(serve):
    server = serve(drain=0.2)
    server.engine.go.clear()
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(server.client.post("/v1/images/generations", json={"prompt": "x"}))
    )
    thread.start()
    wait_for(lambda: server.store.counts()["running"] == 1)
    server.server.handle_exit(signal.SIGTERM, None)
    thread.join(120)
    assert answers[0].status_code == 503
    assert json.loads(answers[0].text)["error"]["code"] == "draining"
    server.thread.join(120)


def test_a_second_signal_stops_at_once(serve):
    server = serve(drain=600)
    server.engine.go.clear()
    job_id = server.submit()
    server.wait(job_id, "running")
    server.server.handle_exit(signal.SIGINT, None)
    wait_for(lambda: server.client.get("/ready").status_code == 503)
    server.server.handle_exit(signal.SIGINT, None)
    server.engine.go.set()
    server.thread.join(120)
    assert not server.thread.is_alive()
