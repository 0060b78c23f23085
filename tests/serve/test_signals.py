"""Signals to a real server, and its command for backups."""

import json
import signal
import subprocess
import sys
import time

import pytest

from sdjax.serve.sqlite import SqliteStore
from tests.serve.conftest import wait_for
from tests.serve.test_process import Process

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")


@pytest.fixture(autouse=True)
def heeded():
    """Servers heed a hangup, even where these tests run under nohup, whose children ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def messages(process):
    return [json.loads(line)["message"] for line in process.lines]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_is_stopped_while_it_warms_up_ends_at_once_and_well(tmp_path, sig):
    process = Process("--data-dir", str(tmp_path / "data"), SDJAX_CACHE_DIR=str(tmp_path / "cache"))
    job = wait_for(lambda: _submitted(process), 120)  # the model is loaded, and nothing is compiled yet
    assert process.client.get("/ready").status_code == 503
    began = time.monotonic()
    assert process.stop(sig) == 0
    assert time.monotonic() - began < 10  # compiling takes longer
    assert f"{sig.name}: draining" in messages(process)
    store = SqliteStore(tmp_path / "data")
    assert (store.job(job).state, store.job(job).attempts) == ("queued", 0)
    store.close()


def _submitted(process):
    answer = process.client.post("/v1/jobs", json={"operation": "image_generation", "prompt": "x"})
    return answer.json().get("job_id")


def test_a_hangup_drains_and_counts_against_no_job(tmp_path):
    process = Process("--data-dir", str(tmp_path), "--drain", "0.5")
    wait_for(lambda: process.client.get("/ready").status_code == 200, 300)
    job = process.submit(steps=150, num_images=8)
    wait_for(lambda: process.client.get(f"/v1/jobs/{job}").json()["state"] == "running", 60)
    assert process.stop(signal.SIGHUP) == 0
    store = SqliteStore(tmp_path)
    assert (store.job(job).state, store.job(job).attempts) == ("queued", 0)
    store.close()


def test_under_nohup_a_hangup_stays_ignored(tmp_path):
    ignoring = "import signal, runpy, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[0] = 'sdjax'; "
    command = [sys.executable, "-c", ignoring + "runpy.run_module('sdjax', run_name='__main__')"]
    command += ["serve", "--port", "0", "--data-dir", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert "listening" in line
        process.send_signal(signal.SIGHUP)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_a_backup_is_made_by_a_command_and_is_a_data_folder(tmp_path):
    store = SqliteStore(tmp_path / "data")
    job = store.submit({"prompt": "x"}, bucket="b")
    command = [sys.executable, "-m", "sdjax", "serve", "--backup"]
    made = [str(tmp_path / "backup"), "--data-dir", str(tmp_path / "data")]
    told = subprocess.run([*command, *made], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("1 jobs and 0 files are in")
    copy = SqliteStore(tmp_path / "backup")
    assert copy.job(job.id) == store.job(job.id)
    copy.close()
    store.close()
    for wrong in (
        [str(tmp_path / "other"), "--data-dir", str(tmp_path / "nothing")],
        [str(tmp_path / "data"), "--data-dir", str(tmp_path / "data")],
    ):
        told = subprocess.run([*command, *wrong], capture_output=True, text=True, check=False)
        assert (told.returncode, told.stderr.count("\n")) == (1, 1)


def test_a_damaged_database_is_one_line_and_no_server(tmp_path):
    (tmp_path / "jobs.sqlite3").write_bytes(b"this is no database" * 1000)
    command = [sys.executable, "-m", "sdjax", "serve", "--port", "0", "--data-dir", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert told.returncode == 1
    assert told.stderr.count("\n") == 1
    assert "damaged" in told.stderr
