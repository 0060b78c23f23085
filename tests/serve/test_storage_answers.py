"""What clients are told when the server's disk fails, or has lost a picture; and how large a picture may be."""

import json
import logging

import pytest

from sdjax.serve.settings import load_settings
from sdjax.serve.storage import PictureLostError, StorageError
from tests.serve.conftest import as_base64, picture, read_events, wait_for

BODY = {"operation": "image_generation", "prompt": "a circle"}


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("kind", "status", "retry"), [("full", 507, True), ("failed", 503, True), ("damaged", 503, False)]
)
def test_a_job_that_cannot_be_stored_is_refused_for_the_servers_reason(server, monkeypatch, kind, status, retry):
    monkeypatch.setattr(server.store, "submit", failing(StorageError(kind)))
    for path, body in (("/v1/jobs", BODY), ("/v1/images/generations", {"prompt": "a circle"})):
        answer = server.client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, f"storage_{kind}")
        assert ("retry-after" in answer.headers) == retry


@pytest.mark.parametrize("call", ["job", "jobs", "events", "image", "cancel", "delete", "counts"])
def test_a_store_that_fails_is_no_traceback_on_any_route(server, monkeypatch, caplog, call):
    job_id = server.submit(steps=1)
    server.wait(job_id, "complete")
    monkeypatch.setattr(server.store, call, failing(StorageError("failed")))
    statuses = {
        server.client.request(method, path).status_code
        for method, path in (
            ("GET", "/v1/jobs"),
            ("GET", f"/v1/jobs/{job_id}"),
            ("GET", f"/v1/jobs/{job_id}/images/0"),
            ("DELETE", f"/v1/jobs/{job_id}"),
            ("DELETE", f"/v1/jobs/{job_id}/record"),
            ("GET", "/metrics"),
        )
    }
    assert 500 not in statuses
    assert not any(record.exc_info for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("call", ["job", "events", "image"])
def test_a_stream_ends_when_the_store_fails_and_goes_on_when_its_reader_comes_back(serve, monkeypatch, caplog, call):
    server = serve()
    server.engine.go.clear()
    job_id = server.submit(steps=3, cancel_on_disconnect=True)
    server.wait(job_id, "running")
    heard = []
    with server.client.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
        events = read_events(answer)
        heard.append(next(events))
        monkeypatch.setattr(server.store, call, failing(StorageError("failed")))
        server.engine.go.set()
        heard += events
    monkeypatch.undo()
    assert server.wait(job_id, "complete")  # nobody left: the server failed
    heard += server.events(job_id, last=heard[-1]["id"])
    assert [event["event"] for event in heard] == ["queued", *["progress"] * 3, "complete"]
    assert not any(record.exc_info for record in caplog.records if record.levelno >= logging.WARNING)


def test_openais_clients_are_told_when_the_store_fails_while_they_wait(serve, monkeypatch, caplog):
    server = serve()
    monkeypatch.setattr(server.store, "events", failing(StorageError("failed")))
    answer = server.client.post("/v1/images/generations", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_failed")
    with server.client.stream("POST", "/v1/images/generations", json={"prompt": "x", "stream": True}) as stream:
        events = list(read_events(stream))
    assert "storage_failed" in events[-1]["data"]
    assert not any(record.exc_info for record in caplog.records if record.levelno >= logging.WARNING)


def test_a_server_whose_store_fails_is_not_ready_and_says_why_until_it_works(serve, monkeypatch):
    server = serve()
    assert server.client.get("/ready").status_code == 200
    monkeypatch.setattr(server.store, "check", failing(StorageError("full")))
    answer = wait_for(lambda: (found := server.client.get("/ready")).status_code == 503 and found)
    assert answer.json() == {
        "status": "storage_failed",
        "model": "tiny",
        "reason": "no space is left on the server's disk",
    }
    assert "sdjax_ready 0.0" in server.client.get("/metrics").text
    assert server.client.get("/health").status_code == 200
    monkeypatch.undo()
    wait_for(lambda: server.client.get("/ready").status_code == 200)
    assert "sdjax_ready 1.0" in server.client.get("/metrics").text


def test_a_database_that_is_gone_makes_the_server_not_ready(serve):
    server = serve()
    (server.store.folder / "jobs.sqlite3").rename(server.store.folder / "elsewhere")
    answer = wait_for(lambda: (found := server.client.get("/ready")).status_code == 503 and found)
    assert answer.json()["status"] == "storage_failed"
    assert str(server.store.folder) not in answer.text


def test_free_space_is_a_number_for_prometheus(server):
    lines = server.client.get("/metrics").text.splitlines()
    (free,) = [line for line in lines if line.startswith("sdjax_storage_free_bytes ")]
    assert float(free.split()[1]) == pytest.approx(server.store.free_bytes(), rel=0.2)


def test_a_picture_that_is_gone_is_an_error_and_never_a_complete_job_without_one(serve):
    server = serve()
    job_id = server.submit(steps=1, num_images=2)
    server.wait(job_id, "complete")
    (first, *_) = [path for path in (server.store.folder / "files").rglob("*") if path.is_file()]
    first.unlink()
    answers = [server.client.get(f"/v1/jobs/{job_id}/images/{n}") for n in range(2)]
    assert sorted(answer.status_code for answer in answers) == [200, 410]
    (lost,) = [answer for answer in answers if answer.status_code == 410]
    assert lost.json()["error"]["code"] == "picture_lost"
    assert server.client.get(f"/v1/jobs/{job_id}/images/2").status_code == 404
    last = server.events(job_id)[-1]
    assert last["event"] == "error"
    assert json.loads(last["data"])["code"] == "picture_lost"
    assert server.client.delete(f"/v1/jobs/{job_id}/record").status_code == 204


def test_a_requests_picture_that_is_gone_is_not_called_one_that_never_was(serve):
    server = serve()
    job_id = server.submit(operation="image_transform", input_image=as_base64(picture(color=(9, 9, 9))), steps=2)
    server.wait(job_id, "complete")
    digest = server.job(job_id)["request"]["input_image"]["blob"]
    (server.store.folder / "files" / digest[:2] / digest).unlink()
    answer = server.client.get(f"/v1/jobs/{job_id}/inputs/input_image")
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "picture_lost")


def test_openais_clients_are_told_of_a_lost_picture(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(server.store, "image", failing(PictureLostError("gone")))
    answer = server.client.post("/v1/images/generations", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "picture_lost")
    with server.client.stream("POST", "/v1/images/generations", json={"prompt": "x", "stream": True}) as stream:
        events = list(read_events(stream))
    assert events[-1]["event"] == "error"
    assert "picture_lost" in events[-1]["data"]


@pytest.fixture(scope="module")
def limited(serve_all):
    return serve_all(model={"most_pixels": 128 * 128})


@pytest.mark.parametrize(
    ("width", "height", "field"), [(136, 128, "width"), (64, 264, "height"), (1024, 1024, "width")]
)
def test_a_picture_larger_than_the_models_limit_is_refused_before_anything_is_compiled(limited, width, height, field):
    answer = limited.client.post("/v1/jobs", json={**BODY, "width": width, "height": height})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, field)
    for part in ("16384", "128x128", f"{width}x{height}"):
        assert part in answer.json()["error"]["message"]


@pytest.mark.parametrize(("width", "height"), [(128, 128), (256, 64)])
def test_a_picture_of_just_the_limit_is_drawn(limited, width, height):
    limited.wait(limited.submit(width=width, height=height, steps=1), "complete")


def test_openais_size_beyond_the_limit_is_refused_by_its_name(limited):
    answer = limited.client.post("/v1/images/generations", json={"prompt": "x", "size": "1024x1024"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size")


@pytest.mark.parametrize(
    ("given", "drawn"), [((512, 512), (128, 128)), ((640, 480), (144, 104)), ((100, 90), (96, 88))]
)
def test_a_large_photo_is_drawn_as_large_as_the_limit_lets_it(limited, given, drawn):
    photo = as_base64(picture(*given))
    job = limited.job(limited.submit(operation="image_transform", input_image=photo, steps=2))
    assert (job["request"]["width"], job["request"]["height"]) == drawn


def test_models_say_how_large_a_picture_may_be(limited):
    assert limited.client.get("/v1/models").json()["data"][0]["sdjax"]["most_pixels"] == 128 * 128


def test_the_limit_is_four_times_the_models_own_area_unless_it_is_given():
    assert load_settings({}).most_pixels(512 * 512) == 1024 * 1024
    assert load_settings({"size": ["64", "2048x1024"]}).most_pixels(512 * 512) == 2048 * 1024
    assert load_settings({"max_size": "768x512", "size": ["64"]}).most_pixels(512 * 512) == 768 * 512
    with pytest.raises(ValueError, match=r"--max-size: must be like 512 or 512x768"):
        load_settings({"max_size": "large"})
