"""The original worker's three commands, as its users type them, with Stable Diffusion 1.5's layout on the disk."""

import json
import shutil
import subprocess

import numpy as np
import pytest

import sdjax
from sdjax.variants import VARIANTS
from tests.parity.reference import pipeline
from tests.serve.conftest import wait_for
from tests.serve.test_heartbeat import Hive
from tests.serve.test_process import Process, pixels

CURL = shutil.which("curl")
BODY = '{"operation":"image_generation","hive_id":"localhost","model":"sd-v1-5","prompt":"a cat"}'
REVISION = "0" * 40


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """Tiny random weights where the hub's library keeps what it has fetched."""
    folder = tmp_path_factory.mktemp("hub")
    pipeline("sd-v1-5", folder / "made")
    repository = folder / "cache" / ("models--" + VARIANTS["sd-v1-5"].source.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    return shutil.copytree(folder / "made" / "model", repository / "snapshots" / REVISION)


@pytest.fixture(scope="module")
def hive():
    hive = Hive()
    yield hive
    hive.close()


@pytest.fixture(scope="module")
def worker(snapshot, hive, tmp_path_factory):
    flags = ("--worker-id", "test", "--sd-version", "v1-5", "--callback-url", hive.url)
    environment = {"HF_HUB_CACHE": str(snapshot.parents[2]), "HF_HUB_OFFLINE": "1"}
    process = Process(*flags, "--data-dir", str(tmp_path_factory.mktemp("data")), **environment)
    wait_for(lambda: process.client.get("/ready").status_code == 200, 300)
    wait_for(lambda: hive.beats)
    yield process
    assert process.stop() == 0


def curl(*arguments):
    done = subprocess.run([CURL, "-sS", *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl_submits_a_job_and_hears_its_stream(worker, snapshot):
    accepted = json.loads(curl("-X", "POST", f"{worker.url}/v1/jobs", "-d", BODY))
    assert list(accepted) == ["job_id", "sse_url"]
    told = curl("-N", f"{worker.url}{accepted['sse_url']}")
    events = [block.split("\n") for block in told.strip().split("\n\n") if not block.startswith(":")]
    names = [lines[1].removeprefix("event: ") for lines in events]
    assert names[0] == "queued"
    assert set(names[1:-1]) == {"progress"}
    assert names[-1] == "complete"
    progress = json.loads(events[1][2].removeprefix("data: "))
    assert list(progress) == ["type", "step", "total", "percent"]
    assert progress["total"] == 20
    complete = json.loads(events[-1][2].removeprefix("data: "))
    drawn = sdjax.Pipeline.from_pretrained(snapshot)("a cat", seed=complete["seed"], steps=20, guidance_scale=7.5)
    np.testing.assert_array_equal(pixels(complete["image"]), np.asarray(drawn.images[0]))
    request = worker.client.get(f"/v1/jobs/{accepted['job_id']}").json()["request"]
    assert (request["hive_id"], request["guidance_scale"]) == ("localhost", 7.5)


def test_the_hive_hears_that_the_worker_is_ready(worker, hive):
    path, body = wait_for(lambda: hive.beats and hive.beats[0])
    assert path == "/v1/worker-heartbeat"
    assert list(body) == ["worker", "timestamp"]
    beat = body["worker"]
    assert (beat["id"], beat["model_id"], beat["status"]) == ("test", "v1-5", "ready")
    assert beat["port"] == int(worker.url.rsplit(":", 1)[1])


@pytest.mark.parametrize("name", ["sd-v1-5", "v1-5", VARIANTS["sd-v1-5"].source])
def test_the_model_answers_to_its_names_and_to_no_other(worker, name):
    body = {**json.loads(BODY), "model": name, "steps": 1}
    assert worker.client.post("/v1/jobs", json=body).status_code == 200
    assert worker.client.post("/v1/jobs", json={**body, "model": "sd-v2-1"}).status_code == 409
