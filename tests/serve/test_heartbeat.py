"""A hive that listens, one that is down, and one that is angry."""

import asyncio
import json
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import sdjax
from sdjax.serve import app, heartbeat
from tests.serve.conftest import wait_for


class Hive:
    """Notes what is posted, and answers with `status`."""

    def __init__(self):
        self.beats = []
        self.status = 200
        self.delay = 0.0
        hive = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hive.beats.append((self.path, json.loads(body)))
                time.sleep(hive.delay)
                self.send_response(hive.status)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hive(monkeypatch):
    monkeypatch.setattr(heartbeat, "FIRST_RETRY", 0.02)
    hive = Hive()
    yield hive
    hive.close()


def test_the_hive_hears_that_the_worker_is_ready_and_that_it_stops(hive, serve):
    began = time.time()
    server = serve(callback_url=hive.url + "/", worker_id="test")
    path, beat = wait_for(lambda: hive.beats)[0]
    assert path == "/v1/worker-heartbeat"
    assert beat["worker"] == {
        "id": "test",
        "model_id": "tiny",
        "device": "cpu",
        "port": int(server.url.rsplit(":", 1)[1]),
        "status": "ready",
        "implementation": "sdjax",
        "version": sdjax.__version__,
    }
    at = datetime.fromisoformat(beat["timestamp"])
    assert began - 1 <= at.timestamp() <= time.time()
    assert at.utcoffset().total_seconds() == 0
    server.stop()
    assert hive.beats[-1][1]["worker"]["status"] == "stopped"


def test_the_hive_hears_that_the_worker_is_busy(hive, serve, monkeypatch):
    monkeypatch.setattr(heartbeat.keep_beating, "__defaults__", (0.02,))
    server = serve(callback_url=hive.url)
    server.engine.go.clear()
    job_id = server.submit()
    server.wait(job_id, "running")
    wait_for(lambda: hive.beats and hive.beats[-1][1]["worker"]["status"] == "busy")
    server.engine.go.set()
    server.wait(job_id, "complete")
    wait_for(lambda: hive.beats and hive.beats[-1][1]["worker"]["status"] == "ready")


def test_a_store_that_fails_for_a_moment_ends_no_heartbeat(hive, serve, monkeypatch):
    monkeypatch.setattr(heartbeat.keep_beating, "__defaults__", (0.02,))
    monkeypatch.setattr(app, "AGAIN_AFTER", 0.02)
    server = serve(callback_url=hive.url)
    wait_for(lambda: hive.beats)

    def broken():
        raise OSError("no space left on the disk")

    with monkeypatch.context() as failing:
        failing.setattr(server.store, "counts", broken)
        time.sleep(0.2)
        assert server.client.get("/health").status_code == 200
    heard = len(hive.beats)
    wait_for(lambda: len(hive.beats) > heard)
    assert server.wait(server.submit(steps=1), "complete")


def test_a_hive_that_is_down_disturbs_nobody(serve):
    server = serve(callback_url="http://127.0.0.1:9", worker_id="test")
    job_id = server.submit(steps=1)
    assert server.wait(job_id, "complete")
    server.stop()  # and checks that it ended


@pytest.mark.parametrize("status", [500, 404])
def test_an_angry_hive_is_asked_again_ever_less_often(hive, status, caplog, monkeypatch):
    hive.status = status
    waits = []

    async def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 9:
            hive.status = 200
        if len(waits) == 12:
            raise asyncio.CancelledError

    async def beat():
        return {"worker": {}}

    monkeypatch.setattr(heartbeat.anyio, "sleep", sleep)
    monkeypatch.setattr(heartbeat, "FIRST_RETRY", 1.0)
    with caplog.at_level("INFO", logger="sdjax.serve.heartbeat"), pytest.raises(asyncio.CancelledError):
        asyncio.run(heartbeat.keep_beating(hive.url, beat, lambda: True))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 30, 30, 30]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
