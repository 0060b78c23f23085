"""What deploys the server: scripts that are clean, and that ask and stop a real server, on two simulated devices."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax.errors import RequestError
from sdjax.serve.server import CLOSING_SECONDS, TEARDOWN_SECONDS
from sdjax.serve.settings import load_settings
from sdjax.serve.sqlite import SqliteStore
from tests.serve.conftest import read_events, wait_for

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted((DEPLOY / "tpu-vm").glob("*.sh"))
PROMPT = "a red circle on a blue background"


def installed(name):
    """A linter that pip installed beside this interpreter, or the system's."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or pytest.skip(f"there is no {name}")


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False, **options)


def settings_file():
    """The lines of sdjax.env, those that are switched off too."""
    lines = (DEPLOY / "tpu-vm" / "sdjax.env").read_text().splitlines()
    return dict(re.findall(r"^#?([A-Z_]+)=(.*)$", "\n".join(lines), re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_clean(script):
    checked = run(installed("shellcheck"), script)
    assert checked.returncode == 0, checked.stdout
    assert os.access(script, os.X_OK)


def test_the_dockerfile_is_clean():
    checked = run(installed("hadolint"), DEPLOY / "Dockerfile")
    assert checked.returncode == 0, checked.stdout


def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "sdjax.service"
    unit.write_text((DEPLOY / "tpu-vm" / "sdjax.service").read_text().replace("/opt/sdjax/venv/bin/sdjax", "/bin/true"))
    checked = run(installed("systemd-analyze"), "verify", unit)
    assert checked.returncode == 0, checked.stderr
    assert "sdjax.service" not in checked.stderr  # not even a warning


def test_systemd_waits_for_the_drain():
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", (DEPLOY / "tpu-vm" / "sdjax.service").read_text(), re.MULTILINE)
    assert int(stop) > float(settings_file()["SDJAX_DRAIN"]) + CLOSING_SECONDS + TEARDOWN_SECONDS


def test_every_setting_of_the_file_is_one(monkeypatch):
    given = settings_file()
    assert given["SDJAX_DEVICES"] == "all"
    for name, value in given.items():
        monkeypatch.setenv(name, value or "x")
    settings = load_settings({})
    assert (settings.devices, settings.drain, settings.log_json) == ("all", 120, True)
    assert all(name.removeprefix("SDJAX_").lower() in type(settings).model_fields for name in given)


@pytest.mark.parametrize(("given", "devices"), [({}, 1), ({"devices": "4"}, 4), ({"devices": "all"}, "all")])
def test_devices_are_a_number_or_all(given, devices):
    assert load_settings(given).devices == devices


@pytest.mark.parametrize("given", ["0", "-1", "some", "1.5"])
def test_another_word_for_devices_is_refused(given):
    with pytest.raises(RequestError, match="--devices"):
        load_settings({"devices": given})


def test_a_script_that_is_called_wrongly_says_how(tmp_path):
    asked = run("bash", DEPLOY / "tpu-vm" / "create.sh")
    assert asked.returncode == 2
    assert "create.sh NAME ZONE [WHEEL]" in asked.stderr
    asked = run("bash", DEPLOY / "tpu-vm" / "create.sh", "name", "zone", tmp_path / "no.whl")
    assert (asked.returncode, "there is no wheel" in asked.stderr) == (2, True)
    asked = run(
        "bash",
        DEPLOY / "tpu-vm" / "install.sh",
        env={**os.environ, "SERVICE": "no", "PYTHON": "/bin/false", "PREFIX": str(tmp_path)},
    )
    assert (asked.returncode, "not Python 3.11" in asked.stderr) == (2, True)


def test_a_vm_is_asked_for_waited_for_and_set_up(tmp_path):
    """With a `gcloud` that only writes down what it is told: the service itself can't be had here."""
    log, answers = tmp_path / "log", tmp_path / "answers"
    answers.write_text("WAITING_FOR_RESOURCES\nACTIVE\n")
    gcloud, sleep = tmp_path / "gcloud", tmp_path / "sleep"
    gcloud.write_text(
        f'#!/bin/bash\necho "$*" >> {log}\n'
        f"if [[ $* == *describe* ]]; then head -n 1 {answers}; sed -i 1d {answers}; fi\n"
    )
    sleep.write_text("#!/bin/bash\n")
    wheel, settings = tmp_path / "sdjax-1-py3-none-any.whl", tmp_path / "my.env"
    for file in (gcloud, sleep):
        file.chmod(0o755)
    wheel.touch()
    settings.touch()
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ENV_FILE": str(settings), "CREATE_FLAGS": "--spot",
    }  # fmt: skip
    made = run("bash", DEPLOY / "tpu-vm" / "create.sh", "my-tpu", "us-west4-a", wheel, env=environment)
    assert made.returncode == 0, made.stderr
    told = log.read_text().splitlines()
    assert all(line.startswith("compute tpus ") and line.endswith("--zone=us-west4-a") for line in told)
    assert "queued-resources create my-tpu --node-id=my-tpu --accelerator-type=v5litepod-8" in told[0]
    assert "--runtime-version=v2-alpha-tpuv5-lite --spot" in told[0]
    assert [line.split()[2:4] for line in told[1:]] == [
        ["queued-resources", "describe"],
        ["queued-resources", "describe"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
    ]
    assert f"{settings} my-tpu:sdjax-deploy/sdjax.env" in told[6]
    assert f"sudo PACKAGE='sdjax-deploy/{wheel.name}' bash sdjax-deploy/install.sh" in told[7]


class Served:
    """`sdjax serve` as the unit starts it, on two simulated devices."""

    def __init__(self, command, folder):
        environment = {
            **os.environ, "PORT": "0", "SDJAX_DEVICES": "all", "SDJAX_DRAIN": "60", "SDJAX_DATA_DIR": str(folder),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        self.process = subprocess.Popen([*command, "serve"], stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = wait_for(self._address, 120)

    def _read(self):
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def _address(self):
        found = re.search(r"listening at (http://[\d.]+:\d+)", "".join(self.lines))
        return found and found[1]


def check_life(command, scripts, folder):
    """From a start to a drain; gives a job's pictures and the server's lines."""
    served = Served(command, folder)
    try:
        early = run(scripts / "healthcheck.sh", served.url)
        assert early.returncode == 1, early.stdout
        assert "not ready" in early.stderr
        ready = run(scripts / "healthcheck.sh", "--wait", 500, served.url)
        assert ready.returncode == 0, ready.stderr
        with httpx.Client(base_url=served.url, timeout=60) as client:
            body = {"operation": "image_generation", "prompt": PROMPT, "seed": 7, "steps": 8, "num_images": 3}
            job = client.post("/v1/jobs", json=body).json()["job_id"]
            with client.stream("GET", f"/v1/jobs/{job}/stream") as answer:
                assert [event["event"] for event in read_events(answer)][-1] == "complete"
            pictures = []
            for number in range(3):
                file = folder / f"{number}.png"
                file.write_bytes(client.get(f"/v1/jobs/{job}/images/{number}").raise_for_status().content)
                pictures.append(np.asarray(Image.open(file).convert("RGB")))
            long = client.post("/v1/jobs", json={**body, "steps": 150, "num_images": 4}).json()["job_id"]
            with client.stream("GET", f"/v1/jobs/{long}/stream") as answer:
                # What has begun is finished; before its first step it would go back to the queue.
                next(event for event in read_events(answer) if event["event"] == "progress")
            late = client.post("/v1/jobs", json={**body, "steps": 150, "num_images": 4}).json()["job_id"]
        drained = run(scripts / "drain.sh", served.process.pid)
        assert drained.returncode == 0, drained.stderr
        assert served.process.wait(1) == 0
        store = SqliteStore(folder)
        assert store.job(long).state == "complete"
        assert store.job(late).state in ("complete", "queued")
        store.close()
    finally:
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGKILL)
    return pictures, "".join(served.lines)


def test_a_server_on_two_devices_draws_the_librarys_pictures_and_drains(tmp_path):
    pictures, lines = check_life([sys.executable, "-m", "sdjax"], DEPLOY / "tpu-vm", tmp_path)
    expected = sdjax.Pipeline.from_pretrained()(PROMPT, seed=7, steps=8, num_images=3).images
    for drawn, picture in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(drawn, np.asarray(picture))
    assert "batches of 2 compiled" in lines
    assert "batches of 1 compiled" not in lines


@pytest.mark.slow  # it downloads what the package needs
def test_what_the_installer_installs_serves_and_drains(tmp_path):
    prefix = tmp_path / "sdjax"
    environment = {
        **os.environ, "PACKAGE": str(ROOT), "EXTRAS": "server", "PREFIX": str(prefix),
        "CONFIG_DIR": str(prefix / "etc"), "SERVICE": "no", "PYTHON": sys.executable,
    }  # fmt: skip
    for _ in range(2):
        made = run(DEPLOY / "tpu-vm" / "install.sh", env=environment)
        assert made.returncode == 0, made.stderr
        assert made.stdout.startswith(f"sdjax {sdjax.__version__}")
        (prefix / "etc" / "sdjax.env").write_text("SDJAX_DRAIN=1\n")
    assert (prefix / "etc" / "sdjax.env").read_text() == "SDJAX_DRAIN=1\n"
    pictures, _ = check_life([prefix / "venv" / "bin" / "sdjax"], prefix, tmp_path)
    assert len(pictures) == 3
