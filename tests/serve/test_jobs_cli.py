"""`sdjax jobs` against a server: what it prints, writes, and says when something is wrong."""

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest.mock import patch

import pytest
from PIL import Image

from sdjax import cli, jobs_client
from tests.commands import interruptible
from tests.serve.conftest import KEY, picture, wait_for
from tests.serve.fake_engine import painted


@pytest.fixture
def jobs(capsys, monkeypatch):
    """Run a command in this process: its exit code, standard output and standard error."""
    monkeypatch.delenv("SDJAX_SERVER", raising=False)
    monkeypatch.delenv("SDJAX_API_KEY", raising=False)

    def run(*arguments, server=None):
        where = () if server is None else ("--server", server.url)
        command = ["sdjax", "jobs", *map(str, arguments), *where]
        with patch.object(sys, "argv", command), pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def keyed(serve_all):
    return serve_all(api_key=[KEY])


def free_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_submit_prints_the_id_of_a_job_with_everything_that_was_asked_for(jobs, server):
    options = {
        "--negative": "a square", "--steps": 3, "--guidance": 2.5, "--sampler": "euler", "--seed": 2**64 - 1,
        "--size": "128x64", "--num": 2, "--response": "webp", "--preview-every": 2, "--model": "tiny",
        "--hive-id": "h", "--worker-id": "w",
    }  # fmt: skip
    code, out, err = jobs("submit", "a circle", *(part for pair in options.items() for part in pair), server=server)
    assert (code, err) == (0, "")
    request = server.job(out.strip())["request"]
    expected = {
        "operation": "image_generation", "prompt": "a circle", "negative_prompt": "a square", "steps": 3,
        "guidance_scale": 2.5, "sampler": "euler", "seed": 2**64 - 1, "width": 128, "height": 64, "num_images": 2,
        "response": "webp", "preview_every": 2, "model": "tiny", "hive_id": "h", "worker_id": "w", "loras": [],
        "cancel_on_disconnect": False,
    }  # fmt: skip
    assert request == expected


def test_pictures_and_masks_are_files(jobs, server, tmp_path):
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    start.write_bytes(picture(72, 64))
    mask.write_bytes(picture(72, 64, mode="L"))
    code, out, _ = jobs("submit", "a circle", "--image", start, "--strength", 0.5, server=server)
    request = server.job(out.strip())["request"]
    assert (code, request["operation"], request["strength"], request["width"]) == (0, "image_transform", 0.5, 72)
    code, out, _ = jobs("submit", "a circle", "--image", start, "--mask", mask, server=server)
    assert (code, server.job(out.strip())["request"]["operation"]) == (0, "image_inpaint")
    given = server.client.get(f"/v1/jobs/{out.strip()}/inputs/mask_image")
    assert given.content == mask.read_bytes()
    assert given.headers["content-type"] == "image/png"


def test_the_server_may_be_under_a_path_whether_it_knows_it_or_not(jobs, serve, tmp_path):
    for root in ("", "/sdjax"):
        server = serve(root_path=root)
        server.url += "" if root == "" else root
        file = tmp_path / f"{root.strip('/') or 'none'}.png"
        code, out, err = jobs("submit", "a circle", "--steps", 1, "-q", "-o", file, server=server)
        assert (code, err) == (0, "")
        assert file.read_bytes().startswith(b"\x89PNG")
        job_id = out.split()[0]
        code, out, _ = jobs("watch", job_id, "-q", server=server)
        assert out.strip() == f"{server.url}/v1/jobs/{job_id}/images/0"


def test_a_warning_is_printed(jobs, server):
    code, _, err = jobs("submit", "a dog", "--steps", 1, "-q", server=server)
    assert (code, err) == (0, "sdjax: warning: this model does not know: dog\n")


def test_submit_waits_and_writes_the_pictures(jobs, server, tmp_path):
    code, out, err = jobs("submit", "a circle", "--seed", 5, "-o", tmp_path / "a.png", server=server)
    assert (code, err, out.splitlines()[1:]) == (0, "", [str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes() == painted(5, 64, 64)


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "jpeg"), ("a.webp", "webp"), ("a.png", "png")])
def test_the_end_of_a_files_name_is_the_format_that_is_asked_for(jobs, server, tmp_path, name, kind):
    code, out, _ = jobs("submit", "a circle", "-o", tmp_path / name, server=server)
    assert (code, out.splitlines()[1:]) == (0, [str(tmp_path / name)])
    assert server.job(out.split()[0])["request"]["response"] == kind
    with Image.open(tmp_path / name) as file:
        assert file.format == kind.upper()


def test_pictures_go_into_a_new_folder_and_none_is_written_over(jobs, server, tmp_path):
    job_id = server.submit(num_images=2)
    server.wait(job_id, "complete")
    folder = tmp_path / "new"
    for numbers in ((1, 2), (3, 4)):
        code, out, _ = jobs("get", job_id, "-o", f"{folder}/", server=server)
        assert (code, out.split()) == (0, [str(folder / f"{job_id}-{number}.png") for number in numbers])
    code, out, err = jobs("get", job_id, "-o", tmp_path / "a.jpg", server=server)
    assert (code, out) == (2, "")
    assert "the job's pictures are png: end it in .png" in err


def test_watch_follows_a_job_to_where_its_pictures_are(jobs, server):
    job_id = server.submit(steps=4, num_images=2)
    code, out, err = jobs("watch", job_id, server=server)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{server.url}/v1/jobs/{job_id}/images/{n}" for n in range(2)]
    code, out, _ = jobs("watch", job_id, "--json", server=server)
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["type"] for event in events[-2:]] == ["progress", "complete"]
    assert "image" not in events[-1]


def test_the_bar_shows_how_far_it_is(jobs, serve, monkeypatch):
    server = serve(step_seconds=0.02)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    code, _, err = jobs("watch", server.submit(steps=20), server=server)
    assert code == 0
    assert "/20" in err


def test_a_job_that_fails_or_is_cancelled_is_a_failure(jobs, server):
    code, _, err = jobs("watch", server.submit(prompt="fail"), server=server)
    assert (code, err) == (1, "sdjax: the job failed: it came out as NaN\n")
    server.engine.go.clear()
    job_id = server.submit()
    assert jobs("cancel", job_id, server=server) == (0, f"{job_id}\n", "")
    server.engine.go.set()
    assert jobs("watch", job_id, server=server) == (1, "", "sdjax: the job was cancelled\n")
    code, _, err = jobs("get", job_id, "-o", "a.png", server=server)
    assert (code, err) == (1, "sdjax: the job has no pictures: it is cancelled\n")
    done = server.submit(steps=1)
    server.wait(done, "complete")
    code, _, err = jobs("cancel", done, server=server)
    assert (code, err.count("\n")) == (1, 1)
    assert "complete" in err


def test_watch_goes_on_after_a_lost_connection(jobs, server, monkeypatch):
    job_id = server.submit(steps=6)
    server.wait(job_id, "complete")
    whole = [event["id"] for event in server.events(job_id)]
    asked = []
    read = jobs_client.read_events

    def torn(chunks):
        for count, event in enumerate(read(chunks)):
            if count == 2:
                raise jobs_client.httpx.ReadError("the wire was cut")
            asked.append(event[0])
            yield event

    monkeypatch.setattr(jobs_client, "read_events", torn)
    monkeypatch.setattr(jobs_client, "FIRST_PAUSE", 0.001)
    assert jobs("watch", job_id, server=server)[0] == 0
    assert asked == whole  # each once, in order


def test_a_connection_that_does_not_come_back_is_given_up(jobs, serve, monkeypatch):
    server = serve()
    server.engine.go.clear()
    job_id = server.submit()
    server.wait(job_id, "running")
    monkeypatch.setattr(jobs_client, "PATIENCE", 0.5)
    threading.Timer(0.5, server.stop).start()
    code, _, err = jobs("watch", job_id, server=server)
    assert (code, err.count("\n")) == (1, 1)
    assert "was lost" in err


def test_ls_lists_the_newest_first(jobs, serve):
    server = serve()
    ids = [server.submit(prompt=prompt, seed=1) for prompt in ("one [bold]circle", "two\ncircles")]
    for job_id in ids:
        server.wait(job_id, "complete")
    code, out, err = jobs("ls", server=server)
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["job", "state", "age", "size", "seed", "prompt"]
    assert [line.split()[0] for line in lines] == ids[::-1]
    assert lines[0].endswith("two circles") or "two circles" in lines[0]
    assert "one [bold]circle" in lines[1]
    assert len(jobs("ls", "-n", 1, server=server)[1].splitlines()) == 2
    listed = [json.loads(line) for line in jobs("ls", "--json", server=server)[1].splitlines()]
    assert [job["job_id"] for job in listed] == ids[::-1]


def test_get_prints_a_job_and_writes_its_pictures(jobs, server, tmp_path):
    job_id = server.submit(seed=3, num_images=2, response="jpeg")
    server.wait(job_id, "complete")
    code, out, _ = jobs("get", job_id, server=server)
    assert code == 0
    assert "state: complete" in out.splitlines()
    assert "seed: 3" in out.splitlines()
    assert json.loads(jobs("get", job_id, "--json", server=server)[1]) == server.job(job_id)
    code, out, _ = jobs("get", job_id, "-o", tmp_path, server=server)
    paths = [tmp_path / f"{job_id}-{n}.jpg" for n in (1, 2)]
    assert (code, out.splitlines()) == (0, list(map(str, paths)))
    assert Image.open(io.BytesIO(paths[1].read_bytes())).format == "JPEG"
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("command", [("ls",), ("watch", "0" * 32), ("get", "0" * 32), ("submit", "a circle")])
def test_a_server_that_is_not_there_is_one_line(jobs, command):
    url = free_url()
    code, out, err = jobs(*command, "--server", url)
    assert (code, out) == (1, "")
    assert err == f"sdjax: no server answers at {url}: start one with `sdjax serve`, or give --server\n"


def test_the_key_comes_from_an_option_or_the_environment(jobs, keyed, monkeypatch):
    assert jobs("ls", server=keyed)[::2] == (
        1,
        "sdjax: the server asks for a key: give --api-key, or set SDJAX_API_KEY\n",
    )
    assert jobs("ls", "--api-key", "wrong", server=keyed)[::2] == (
        1,
        "sdjax: the server does not know this key: give --api-key, or set SDJAX_API_KEY\n",
    )
    assert jobs("ls", "--api-key", KEY, server=keyed)[0] == 0
    monkeypatch.setenv("SDJAX_API_KEY", KEY)
    monkeypatch.setenv("SDJAX_SERVER", keyed.url)
    code, out, _ = jobs("submit", "a circle", "--steps", 1, "--watch")
    assert code == 0
    assert keyed.job(out.strip())["state"] == "complete"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("watch", "0" * 32), 1, "no such job"),
        (("cancel", "../../metrics"), 1, "404"),
        (("get", "0" * 32), 1, "no such job"),
        (("submit", "a circle", "--steps", 0), 2, "steps"),
        (("submit", "a circle", "--steps", "many"), 2, "--steps"),
        (("submit", " "), 2, "prompt"),
        (("submit", "a circle", "--sampler", "none"), 2, "sampler"),
        (("submit", "a circle", "--size", "big"), 2, "--size"),
        (("submit", "a circle", "--model", "other"), 1, "tiny"),
        (("submit", "a circle", "--mask", "mask.png"), 2, "--image"),
        (("submit", "a circle", "--strength", 0.5), 2, "--image"),
        (("submit", "a circle", "--image", "none.png"), 1, "none.png"),
        (("submit", "a circle", "-o", "nowhere/a.png"), 2, "nowhere"),
        (("submit", "a circle", "-o", "a.gif"), 2, "a.gif"),
        (("submit", "a circle", "-o", "a.png", "--response", "webp"), 2, "a name that ends in .png is for a png"),
        (("submit", "a circle", "--lora", "style:0.5"), 2, "loras"),
        (("submit",), 2, "rgument"),
        (("paint",), 2, "paint"),
    ],
)
def test_every_error_is_one_line(jobs, server, tmp_path, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDJAX_SERVER", server.url)
    got, out, err = jobs(*arguments)
    assert (got, out) == (code, "")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize("url", ["", "here", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port", "//127.0.0.1"])
def test_a_server_is_a_url(jobs, url):
    code, _, err = jobs("ls", "--server", url)
    assert (code, err.count("\n")) == (2, 1)
    assert "--server" in err


def test_texts_in_a_stream_may_hold_what_ends_lines_elsewhere():
    data = {"type": "error", "message": "a\u2028b\x85c"}
    lines = f"id: 3\nevent: error\ndata: {json.dumps(data, ensure_ascii=False)}\n\n: keep-alive\n\n".encode()
    assert list(jobs_client.read_events(lines[i : i + 1] for i in range(len(lines)))) == [("3", data)]


def test_an_interrupt_leaves_the_job_alone(server):
    server.engine.go.clear()
    job_id = server.submit()
    server.wait(job_id, "running")
    command = interruptible("jobs", "watch", job_id, "--server", server.url, "--json")
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(watcher.stdout.readline())["type"] == "queued"
    time.sleep(0.1)
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=120)
    assert watcher.returncode == 130
    assert f"sdjax jobs cancel {job_id}" in err
    assert server.job(job_id)["state"] == "running"
    server.engine.go.set()
    wait_for(lambda: server.job(job_id)["state"] == "complete")
