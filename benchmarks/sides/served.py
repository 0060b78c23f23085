"""A real `sdjax serve` process that is asked for pictures over HTTP."""

import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks.cases import PROMPT, Case, Prepared
from sdjax.jobs_client import JobClient
from sdjax.measuring import peak_bytes

READY_WITHIN = 1800.0
"""Seconds for loading and compiling."""


class Server:
    """`sdjax serve` on a free port, from its start until `close`."""

    def __init__(self, *options: str) -> None:
        self._data = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "sdjax", "serve", "--port", "0", "--data-dir", self._data.name, *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.url = self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self._process.stderr is not None
        self._lines.extend(self._process.stderr)  # a list grows while the iterator goes on

    def _wait_until_ready(self) -> str:
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r"listening at (http://[\w.:\[\]]+)", "".join(self._lines))
            if found and _is_ready(found[1]):
                return found[1]
            time.sleep(0.1)
        raise RuntimeError("the server did not get ready: " + "".join(self._lines[-3:]).strip())

    def peak_bytes(self) -> int:
        """The most memory that its process held."""
        return peak_bytes(self._process.pid)

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._data.cleanup()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.TransportError:
        return False


def prepare(case: Case) -> Prepared:
    """Start a server of the case's folder; a run submits all jobs, then waits until every picture has arrived."""
    assert case.folder is not None
    server = Server("--model", str(Path(case.folder)), "--dtype", case.dtype, "--log-level", "info")
    client = JobClient(server.url)

    def run() -> Sequence[bytes]:
        fields = {
            "operation": "image_generation",
            "prompt": PROMPT,
            "steps": case.step_count,
            "guidance_scale": case.guidance_scale,
            "sampler": "ddim",
        }
        jobs = [client.submit({**fields, "seed": seed})["job_id"] for seed in range(case.batch)]
        pictures = []
        for job in jobs:
            last = list(client.story(job))[-1]
            if last["type"] != "complete":
                raise RuntimeError(f"a job ended as {last}")
            pictures += [client.image(job, number) for number in range(len(client.job(job)["images"]))]
        return pictures

    return Prepared(run, peak_bytes=server.peak_bytes, close=server.close)
