"""A server on a free loopback port, in a thread of the tests' process."""

import asyncio
import base64
import io
import json
import threading
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

from sdjax.errors import RequestError
from sdjax.pipeline import BUNDLED_FOLDER
from sdjax.schedulers import SchedulerConfig, begin_step, table
from sdjax.serve.app import create_app
from sdjax.serve.served import ServedModel
from sdjax.serve.server import DrainingServer, bind
from sdjax.serve.settings import load_settings
from sdjax.serve.sqlite import SqliteStore
from tests.serve.fake_engine import FakeEngine

KEY = "a secret of these tests"


def tiny():
    """The bundled model, as the front sees it."""
    config = json.loads((BUNDLED_FOLDER / "scheduler" / "scheduler_config.json").read_text())
    scheduler = SchedulerConfig.from_dict(config)

    def check(request, pictures):
        try:
            table(request["sampler"] or "ddim", scheduler, request["steps"])
            if pictures:
                begin_step(request["steps"], request["strength"])
        except ValueError as error:
            raise RequestError(str(error)) from error
        known = "dog" not in request["prompt"]
        return SimpleNamespace(warnings=() if known else ("this model does not know: dog",))

    return ServedModel(
        name="tiny",
        aliases=frozenset({"tiny", "bundled"}),
        steps=20,
        guidance_scale=3.0,
        sampler="ddim",
        size=64,
        needs_mask=False,
        check=check,
    )


@dataclass
class Running:
    """A server that runs."""

    url: str
    client: httpx.Client
    store: Any
    engine: Any
    app: Any
    server: DrainingServer
    thread: threading.Thread

    def submit(self, prompt="a red circle", **fields):
        body = {"operation": "image_generation", "prompt": prompt, **fields}
        answer = self.client.post("/v1/jobs", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["job_id"]

    def events(self, job_id, last=None):
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        with self.client.stream("GET", f"/v1/jobs/{job_id}/stream", headers=headers) as answer:
            assert answer.status_code in (200, 204)
            return list(read_events(answer))

    def job(self, job_id):
        return self.client.get(f"/v1/jobs/{job_id}").json()

    def wait(self, job_id, *states, seconds=120):
        return wait_for(lambda: (job := self.job(job_id))["state"] in states and job, seconds)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(120)
        self.client.close()
        assert not self.thread.is_alive()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("it did not happen in time")


def answers(client, path):
    """Whether a server that may not listen yet answers 200."""
    try:
        return client.get(path).status_code == 200
    except httpx.ConnectError:
        return False


def read_events(answer):
    """Server-sent events as dictionaries of their fields; comments are left out."""
    event = {}
    for line in answer.iter_lines():
        if line == "":
            if event:
                yield event
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            assert name not in event, f"{name} twice in an event"
            event[name] = value


def picture(width=64, height=64, kind="PNG", mode="RGB", color=None, **options):
    file = io.BytesIO()
    Image.new(mode, (width, height), color or 0).save(file, kind, **options)
    return file.getvalue()


def as_base64(data):
    return base64.b64encode(data).decode()


def starter(tmp_path_factory):
    """Start servers, which are stopped afterwards."""
    started = []

    def start(model=None, step_seconds=0.0, boot=None, **settings):
        folder = tmp_path_factory.mktemp("store")
        store = SqliteStore(folder)
        made = {}

        def fake(worker):
            worker.device = "cpu"
            worker.model = replace(tiny(), **(model or {}))
            worker.engine = made["engine"] = FakeEngine(store, step_seconds)
            worker.status = "ready"

        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        options = load_settings({"port": port, "drain": 1.0, "data_dir": folder, **settings})
        app = create_app(options, store, boot or fake)
        server = DrainingServer(app)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {settings['api_key'][0]}"} if settings.get("api_key") else {}
        client = httpx.Client(base_url=url, headers=headers, timeout=120)
        wait_for(lambda: answers(client, "/ready" if boot is None else "/health"))
        running = Running(url, client, store, made.get("engine"), app, server, thread)
        started.append(running)
        return running

    yield start
    for running in started:
        if running.thread.is_alive():
            if running.engine is not None:
                running.engine.go.set()
            running.stop()


serve = pytest.fixture(starter)
serve_all = pytest.fixture(starter, scope="module")
"""Likewise, for all tests of a file."""


@pytest.fixture(scope="module")
def server(serve_all):
    """One that draws at once."""
    return serve_all()
