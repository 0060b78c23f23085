"""The real thing: `sdjax serve` as a process, with the bundled model behind it."""

import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sdjax
from sdjax.serve.store import FINAL
from tests.loading.lora_files import ATTENTION, kohya, random_layers
from tests.native import SIDE
from tests.serve.conftest import as_base64, read_events, wait_for

RED_ON_BLUE = "a red circle on a blue background"


class Process:
    """`sdjax serve` with flags, and the lines that it logs."""

    def __init__(self, *flags, **environment):
        command = [sys.executable, "-m", "sdjax", "serve", "--port", "0", "--log-json", *flags]
        env = {**os.environ, "PORT": "", **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = wait_for(self._address, 60)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def _address(self):
        found = re.search(r"listening at (http://[\d.]+:\d+)", "".join(self.lines))
        return found and found[1]

    def submit(self, **fields):
        body = {"operation": "image_generation", "prompt": RED_ON_BLUE, **fields}
        answer = self.client.post("/v1/jobs", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["job_id"]

    def events(self, job_id):
        with self.client.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
            return [(event["event"], json.loads(event["data"])) for event in read_events(answer)]

    def stop(self, sig=signal.SIGTERM):
        self.process.send_signal(sig)
        return self.process.wait(120)


@pytest.fixture(scope="module")
def answers():
    """How often /health answered while the model was loaded and compiled, in a list of one."""
    return [0]


@pytest.fixture(scope="module")
def process(tmp_path_factory, answers, adapters):
    folder = tmp_path_factory.mktemp("served")
    process = Process("--data-dir", str(folder), "--drain", "20", "--lora-dir", str(adapters))
    deadline = time.monotonic() + 300
    while process.client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        assert process.client.get("/health").status_code == 200
        answers[0] += 1
        time.sleep(0.02)
    yield process
    if process.process.poll() is None:
        process.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, pipe):
    """A folder with an adapter that changes the picture."""
    folder = tmp_path_factory.mktemp("adapters")
    layers = random_layers(pipe.params, {"unet": ATTENTION})
    save_file(kohya(layers, pipe.params), folder / "style v1.5.safetensors")
    return folder


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def test_health_answers_while_the_model_is_loaded_and_compiled(process, answers):
    assert answers[0] > 10  # a process that does nothing else meanwhile answers once or twice


def test_a_job_is_the_picture_that_the_library_draws(process, pipe):
    job_id = process.submit(seed=7, steps=8)
    name, complete = process.events(job_id)[-1]
    assert name == "complete"
    (expected,) = pipe(RED_ON_BLUE, seed=7, steps=8).images
    np.testing.assert_array_equal(pixels(complete["image"]), np.asarray(expected))
    assert sum(complete["timings"].values()) > 0


def test_a_schedule_is_drawn_with(process, pipe):
    name, complete = process.events(process.submit(seed=7, steps=8, sampler="euler", schedule="karras"))[-1]
    assert name == "complete", complete
    (expected,) = pipe(RED_ON_BLUE, seed=7, steps=8, sampler="euler", schedule="karras").images
    np.testing.assert_array_equal(pixels(complete["image"]), np.asarray(expected))


def test_a_transform_is_the_picture_that_the_library_draws(process, pipe):
    start = Image.effect_mandelbrot((SIDE, SIDE), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    file = io.BytesIO()
    start.save(file, "PNG")
    picture = as_base64(file.getvalue())
    job_id = process.submit(operation="image_transform", input_image=picture, strength=0.5, seed=3, steps=8)
    name, complete = process.events(job_id)[-1]
    assert name == "complete", complete
    (expected,) = pipe(RED_ON_BLUE, image=start, strength=0.5, seed=3, steps=8).images
    np.testing.assert_array_equal(pixels(complete["image"]), np.asarray(expected))


def test_an_adapter_changes_its_own_job_and_no_other(process, pipe, adapters):
    name = "style v1.5.safetensors"
    loras = [{"path": name, "strength": 0.7}]
    jobs = [process.submit(seed=7, steps=8, loras=given) for given in (loras, [], loras)]
    styled, plain, again = (pixels(process.events(job)[-1][1]["image"]) for job in jobs)
    (expected,) = pipe(RED_ON_BLUE, seed=7, steps=8, loras=[(adapters / name, 0.7)]).images
    np.testing.assert_array_equal(styled, np.asarray(expected))
    np.testing.assert_array_equal(styled, again)
    np.testing.assert_array_equal(plain, np.asarray(pipe(RED_ON_BLUE, seed=7, steps=8).images[0]))
    assert (styled != plain).any()
    assert process.client.get(f"/v1/jobs/{jobs[0]}").json()["request"]["loras"] == loras


def test_an_adapter_that_the_prompt_names_is_drawn_with_and_is_in_the_pictures_parameters(process, pipe, adapters):
    job = process.submit(prompt=f"{RED_ON_BLUE} <lora:style v1.5:0.7>", seed=7, steps=8)
    _, complete = process.events(job)[-1]
    loras = [(adapters / "style v1.5.safetensors", 0.7)]
    np.testing.assert_array_equal(
        pixels(complete["image"]), np.asarray(pipe(RED_ON_BLUE, seed=7, steps=8, loras=loras).images[0])
    )
    parameters = Image.open(io.BytesIO(base64.b64decode(complete["image"]))).info["parameters"]
    assert "style v1.5:0.7" in parameters.splitlines()[-1]
    job = process.client.get(f"/v1/jobs/{job}").json()
    assert job["request"]["loras"] == [{"path": "style v1.5", "strength": 0.7}]
    assert job["warnings"] == []


def test_inpainting_keeps_what_the_mask_keeps(process):
    start, mask = Image.new("RGB", (SIDE, SIDE), "green"), Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    files = [io.BytesIO(), io.BytesIO()]
    start.save(files[0], "PNG")
    mask.save(files[1], "PNG")
    init, painted = (as_base64(file.getvalue()) for file in files)
    job_id = process.submit(operation="image_inpaint", init_image=init, mask_image=painted, strength=1.0, seed=3)
    name, complete = process.events(job_id)[-1]
    assert name == "complete", complete
    drawn = pixels(complete["image"])
    assert (drawn[:, SIDE // 2 :] == (0, 128, 0)).all()
    assert (drawn[:, : SIDE // 2] != (0, 128, 0)).any()


def test_progress_and_previews_come_while_it_draws(process):
    events = process.events(process.submit(steps=40, preview_every=10, seed=1))
    steps = [data["step"] for name, data in events if name == "progress"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40
    previews = [data for name, data in events if name == "preview"]
    assert previews
    assert all(pixels(preview["image"]).shape[2] == 3 for preview in previews)


def test_every_line_of_a_job_names_it(process):
    job_id = process.submit(steps=2)
    process.events(job_id)
    lines = wait_for(lambda: (found := [line for line in process.lines if job_id in line]) and len(found) > 1 and found)
    assert all(json.loads(line)["job"] == job_id for line in lines)
    assert not any(RED_ON_BLUE in line for line in process.lines)


def test_a_warning_is_a_line_like_the_others_and_names_its_job(process):
    job_id = process.submit(steps=1, prompt="a red circle " * 60)
    process.events(job_id)
    lines = wait_for(lambda: [line for line in process.lines if '"level": "warning"' in line and job_id in line])
    line = json.loads(lines[0])
    assert (line["job"], line["level"]) == (job_id, "warning")
    assert "UserWarning" not in line["message"]
    (warning,) = process.client.get(f"/v1/jobs/{job_id}").json()["warnings"]
    assert warning == line["message"]
    assert "cut" in warning
    assert all(json.loads(line)["level"] for line in process.lines)


@pytest.mark.slow
def test_a_stream_opened_when_the_job_ends_hears_the_end_five_hundred_times(process):
    rng = random.Random(0)
    for seed in range(500):
        job_id = process.submit(steps=1, seed=seed)
        time.sleep(rng.uniform(0, 0.08))
        assert process.events(job_id)[-1][0] == "complete"


@pytest.mark.slow
def test_a_cancel_at_the_last_step_leaves_one_end_two_hundred_times(process):
    rng = random.Random(0)
    began = time.perf_counter()
    for seed in range(10):
        process.events(process.submit(steps=2, seed=seed))
    longest = 1.5 * (time.perf_counter() - began) / 10  # a machine that others use too takes its time
    statuses = set()
    for seed in range(200):
        job_id = process.submit(steps=2, seed=seed)
        time.sleep(rng.uniform(0, longest))
        status = process.client.delete(f"/v1/jobs/{job_id}").status_code
        ends = [name for name, _ in process.events(job_id) if name in FINAL]
        assert ends == ["cancelled" if status == 200 else "complete"]
        statuses.add(status)
    assert statuses == {200, 409}


def test_a_port_in_use_is_an_error_in_one_line(process):
    port = process.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "sdjax", "serve", "--port", port]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert port in second.stderr


def test_sigterm_lets_the_running_job_finish_and_the_process_ends_well(process):
    job_id = process.submit(steps=150, num_images=2)
    told = []
    thread = threading.Thread(target=lambda: told.extend(process.events(job_id)))
    thread.start()
    wait_for(lambda: process.client.get(f"/v1/jobs/{job_id}").json()["state"] == "running")
    assert process.stop() == 0
    thread.join(120)
    assert told[-1][0] in ("complete", "closing")
    assert "draining" in "".join(process.lines)


@pytest.mark.slow
def test_after_a_kill_the_jobs_are_there_and_are_drawn(tmp_path):
    flags = ("--data-dir", str(tmp_path))
    first = Process(*flags)
    wait_for(lambda: first.client.get("/ready").status_code == 200, 300)
    done = first.submit(steps=2, seed=1)
    assert first.events(done)[-1][0] == "complete"
    jobs = [first.submit(steps=100, num_images=8, seed=seed) for seed in range(3)]
    wait_for(lambda: first.client.get(f"/v1/jobs/{jobs[0]}").json()["state"] == "running")
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    second = Process(*flags)
    wait_for(lambda: second.client.get("/ready").status_code == 200, 300)
    assert second.events(done)[-1][0] == "complete"
    assert [second.events(job)[-1][0] for job in jobs] == ["complete"] * 3
    assert second.stop() == 0
