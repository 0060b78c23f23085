"""The contract of the original worker: its clients must be able to talk to us unchanged."""

import asyncio
import base64
import io
import json
import re
import time

import jax
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from sdjax.errors import CheckpointError
from tests.serve.conftest import as_base64, picture, wait_for


def test_a_generation_as_the_original_client_sends_it_is_drawn(server):
    body = {
        "operation": "image_generation",
        "hive_id": "hive-1",
        "model": "tiny",
        "prompt": "a red circle on a blue background",
        "negative_prompt": None,
        "steps": 3,
        "guidance_scale": 7.5,
        "seed": 42,
        "width": 64,
        "height": 64,
        "loras": [],
        "worker_id": "test",
    }
    answer = server.client.post("/v1/jobs", json=body)
    assert answer.status_code == 200
    accepted = answer.json()
    assert list(accepted) == ["job_id", "sse_url"]
    assert accepted["sse_url"] == f"/v1/jobs/{accepted['job_id']}/stream"
    events = server.events(accepted["job_id"])
    assert [event["event"] for event in events] == ["queued", "progress", "progress", "progress", "complete"]
    assert events[1]["data"] == '{"type":"progress","step":1,"total":3,"percent":33.333333333333336}'
    assert json.loads(events[0]["data"]) == {"type": "queued", "position": 1}
    complete = json.loads(events[-1]["data"])
    assert list(complete)[:3] == ["type", "image", "format"]
    assert complete["type"] == "complete"
    assert complete["format"] == "png"
    assert complete["images"] == [complete["image"]]
    assert complete["seed"] == 42
    assert complete["timings"] == {"denoise": 0.5}
    assert Image.open(io.BytesIO(base64.b64decode(complete["image"]))).size == (64, 64)


def test_a_transform_as_the_original_client_sends_it_is_drawn_at_the_pictures_size(server):
    body = {
        "operation": "image_transform",
        "prompt": "a green square",
        "input_image": as_base64(picture(100, 72)),
        "strength": 0.6,
        "steps": 2,
        "seed": 1,
    }
    job_id = server.client.post("/v1/jobs", json=body).json()["job_id"]
    complete = json.loads(server.events(job_id)[-1]["data"])
    assert complete["type"] == "complete"
    request = server.job(job_id)["request"]
    assert (request["width"], request["height"], request["strength"]) == (96, 72, 0.6)
    assert len(request["input_image"]["blob"]) == 64


def test_an_inpainting_as_the_original_client_sends_it_is_drawn(server):
    body = {
        "operation": "image_inpaint",
        "prompt": "a green square",
        "init_image": as_base64(picture()),
        "mask_image": as_base64(picture(mode="L", color=255)),
        "steps": 2,
    }
    job_id = server.client.post("/v1/jobs", json=body).json()["job_id"]
    assert server.events(job_id)[-1]["event"] == "complete"
    job = server.job(job_id)
    assert job["request"]["strength"] == 0.8
    assert server.store.blob(job["request"]["mask_image"]["blob"]) == picture(mode="L", color=255)


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "application/json", None])
def test_a_body_is_json_whatever_its_content_type_says(server, kind):
    content = b'{"operation": "image_generation", "prompt": "a circle", "steps": 1}'
    headers = {} if kind is None else {"Content-Type": kind}
    assert server.client.post("/v1/jobs", content=content, headers=headers).status_code == 200


def test_defaults_are_the_models_and_the_seed_is_reported(server):
    request = server.job(server.submit())["request"]
    assert request["steps"] == 20
    assert request["guidance_scale"] == 3.0
    assert request["sampler"] == "ddim"
    assert (request["width"], request["height"]) == (64, 64)
    assert 0 <= request["seed"] < 2**64
    assert (request["num_images"], request["preview_every"], request["response"]) == (1, 0, "png")


def test_optional_fields_take_null_for_their_default(server):
    names = ("negative_prompt", "steps", "guidance_scale", "seed", "width", "height", "loras", "sampler", "model")
    nulls = dict.fromkeys((*names, "num_images", "preview_every", "response", "hive_id", "worker_id"))
    assert server.job(server.submit(**nulls))["request"]["steps"] == 20


def test_a_whole_number_may_be_written_with_a_point(server):
    content = (
        '{"operation": "image_generation", "prompt": "a circle", "steps": 2.0, "width": 64.0, "guidance_scale": 5}'
    )
    job_id = server.client.post("/v1/jobs", content=content).json()["job_id"]
    request = server.job(job_id)["request"]
    assert (request["steps"], request["width"], request["guidance_scale"]) == (2, 64, 5.0)


def test_the_largest_seed_comes_back_exactly(server):
    job_id = server.submit(seed=2**64 - 1, steps=1)
    server.wait(job_id, "complete")
    assert server.job(job_id)["request"]["seed"] == 2**64 - 1
    assert json.loads(server.events(job_id)[-1]["data"])["seed"] == 2**64 - 1


def test_previews_come_as_often_as_asked_for(server):
    job_id = server.submit(steps=7, preview_every=2)
    previews = [json.loads(event["data"]) for event in server.events(job_id) if event["event"] == "preview"]
    assert [preview["step"] for preview in previews] == [2, 4, 6]
    assert list(previews[0]) == ["type", "step", "total", "percent", "image", "format"]
    assert base64.b64decode(previews[0]["image"]).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_are_fetched_by_number_in_the_format_that_was_asked_for(server, kind):
    job_id = server.submit(steps=1, num_images=2, seed=200, response=kind)
    complete = json.loads(server.events(job_id)[-1]["data"])
    assert complete["format"] == kind
    for n, image in enumerate(complete["images"]):
        answer = server.client.get(f"/v1/jobs/{job_id}/images/{n}")
        assert answer.headers["content-type"] == f"image/{kind}"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.content == base64.b64decode(image)
    assert complete["images"][0] != complete["images"][1]
    for n in ("2", "-1", "x", "9" * 30, "0x0", "１"):
        answer = server.client.get(f"/v1/jobs/{job_id}/images/{n}")
        assert answer.status_code == 404, n
        assert answer.json()["error"]["code"] == "not_found"


def test_a_failed_job_says_why(server):
    job_id = server.submit("fail", steps=1)
    last = server.events(job_id)[-1]
    assert last["event"] == "error"
    assert json.loads(last["data"]) == {"type": "error", "code": "not_finite", "message": "it came out as NaN"}
    job = server.job(job_id)
    assert job["state"] == "error"
    assert job["error"] == {"code": "not_finite", "message": "it came out as NaN"}


def test_a_job_is_described(server):
    job_id = server.submit("a circle", steps=1, hive_id="h")
    job = server.wait(job_id, "complete")
    assert job["job_id"] == job_id
    assert job["request"]["hive_id"] == "h"
    assert job["request"]["prompt"] == "a circle"
    assert job["created"] <= job["started"] <= job["finished"]
    assert job["images"] == [f"/v1/jobs/{job_id}/images/0"]
    assert job["position"] is None
    assert job["error"] is None
    assert job["timings"] == {"denoise": 0.5}


def test_jobs_are_listed_newest_first_page_by_page(server):
    made = [server.submit(f"number {i}", steps=1) for i in range(5)]
    first = server.client.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["job_id"] for job in first["jobs"]] == made[:2:-1]
    second = server.client.get("/v1/jobs", params={"limit": 2, "before": first["next"]}).json()
    assert [job["job_id"] for job in second["jobs"]] == made[2:0:-1]
    everything, before = [], None
    while True:
        page = server.client.get("/v1/jobs", params={"limit": 200, **({"before": before} if before else {})}).json()
        everything += [job["job_id"] for job in page["jobs"]]
        before = page["next"]
        if before is None:
            break
    assert everything[:5] == made[::-1]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=x", "limit"),
        ("limit=1e1", "limit"),
        ("before=x", "before"),
    ],
)
def test_a_page_that_cannot_be_is_an_error_that_names_the_parameter(server, query, field):
    answer = server.client.get(f"/v1/jobs?{query}")
    assert answer.status_code == (422 if field == "limit" else 404)
    assert answer.json()["error"]["field"] == field


@pytest.mark.parametrize("job_id", ["x", "0" * 32, "..", "%00", "a" * 5000, "é" * 32])
def test_a_job_that_does_not_exist_is_404_everywhere(server, job_id):
    for method, path in (("GET", ""), ("GET", "/stream"), ("GET", "/images/0"), ("DELETE", "")):
        answer = server.client.request(method, f"/v1/jobs/{job_id}{path}")
        if job_id != "..":
            assert answer.status_code == 404, (method, path)
        assert answer.json()["error"]["code"] in ("not_found", "method_not_allowed")


def test_the_same_idempotency_key_gives_the_same_job(server):
    body = {"operation": "image_generation", "prompt": "a circle", "steps": 1}
    headers = {"Idempotency-Key": "once"}
    first, second = (server.client.post("/v1/jobs", json=body, headers=headers).json() for _ in range(2))
    assert first == second


def test_another_model_than_the_served_one_is_409(server):
    body = {"operation": "image_generation", "prompt": "a circle", "model": "sd-xl"}
    answer = server.client.post("/v1/jobs", json=body)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "wrong_model"
    assert answer.json()["error"]["field"] == "model"
    assert "tiny" in answer.json()["error"]["message"]
    assert server.client.post("/v1/jobs", json={**body, "model": "bundled"}).status_code == 200


def test_every_error_of_the_contract_has_its_status_its_code_and_one_shape(serve):
    server = serve(api_key=["a key"], max_body=4096, queue_limit=1)
    server.engine.go.clear()
    good = {"operation": "image_generation", "prompt": "a circle"}
    server.wait(server.submit(), "running")

    def post(body, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return server.client.post("/v1/jobs", content=content, headers=headers)

    answers = [
        (post(b"{"), 400, "not_json", None),
        (post(good, Authorization="Bearer another"), 401, "unauthorized", None),
        (server.client.get(f"/v1/jobs/{'0' * 32}"), 404, "not_found", None),
        (post({**good, "model": "sd-v1-5"}), 409, "wrong_model", "model"),
        (post({**good, "prompt": "x" * 5000}), 413, "too_large", None),
        (post({**good, "steps": 151}), 422, "invalid_field", "steps"),
    ]
    server.submit()
    answers.append((post(good), 429, "queue_full", None))
    assert int(answers[-1][0].headers["retry-after"]) >= 1
    server.app.state.front.worker.status = "draining"
    answers.append((post(good), 503, "draining", None))
    server.app.state.front.worker.status = "ready"
    for answer, status, code, field in answers:
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
        assert list(answer.json()["error"]) == ["code", "message", "field"]
        assert (answer.json()["error"]["code"], answer.json()["error"]["field"]) == (code, field)
        assert answer.headers["content-type"] == "application/json"
    said = answers[5][0].json()["error"]["message"]
    assert "steps" in said
    assert "150" in said
    assert "151" in said
    server.engine.go.set()


def test_a_wrong_method_lists_the_right_ones(server):
    answer = server.client.delete("/v1/jobs")
    assert answer.status_code == 405
    assert {name.strip() for name in answer.headers["allow"].split(",")} == {"GET", "HEAD", "POST"}
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert server.client.post("/health").json()["error"]["code"] == "method_not_allowed"


def test_probes_answer(server):
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {"status": "ready", "model": "tiny"}
    assert server.client.head("/health").status_code == 200


def test_a_server_whose_model_loads_lives_but_is_not_ready(serve):
    import threading

    go = threading.Event()
    starting = serve(boot=lambda worker: go.wait(120))
    assert starting.client.get("/health").status_code == 200
    assert starting.client.get("/ready").status_code == 503
    assert starting.client.get("/ready").json()["status"] == "starting"
    answer = starting.client.post("/v1/jobs", json={"operation": "image_generation", "prompt": "x"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "starting"
    assert int(answer.headers["retry-after"]) >= 1
    go.set()


def test_a_model_that_cannot_be_loaded_is_said_so(serve):
    def broken(worker):
        raise ValueError("no such folder")

    failed = serve(boot=broken)
    assert failed.client.get("/health").status_code == 200
    assert failed.client.get("/ready").json()["status"] == "error"
    answer = failed.client.post("/v1/jobs", json={"operation": "image_generation", "prompt": "x"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"


def test_what_the_operator_can_mend_is_logged_in_one_line(serve, caplog):
    def broken(worker):
        raise CheckpointError("there is no folder or file './nowhere'")

    failed = serve(boot=broken)
    wait_for(lambda: failed.client.get("/ready").json()["status"] == "error")
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "the model could not be loaded: there is no folder or file './nowhere'"
    assert not record.exc_info


def test_metrics_have_what_operators_watch(serve):
    server = serve()
    job_id = server.submit(steps=1)
    server.wait(job_id, "complete")
    server.engine.go.clear()
    running = server.submit(steps=1)
    server.wait(running, "running")
    server.submit(steps=1)
    text = wait_for(lambda: "sdjax_job_run_seconds_count 1.0" in (t := server.client.get("/metrics").text) and t)
    for line in (
        'sdjax_jobs{state="complete"} 1.0',
        "sdjax_queue_depth 1.0",
        'sdjax_jobs_finished_total{state="complete"} 1.0',
        "sdjax_images_total 1.0",
        "sdjax_ready 1.0",
        "sdjax_slots 2.0",
        "sdjax_drawing 1.0",
        "sdjax_batch_occupancy 0.5",
        "sdjax_rows_total 6.0",
        "sdjax_row_places_total 8.0",
        "sdjax_steps_total 20.0",
        "sdjax_slice_seconds_total 1.5",
        "sdjax_compiles_total 3.0",
        'sdjax_step_seconds{bucket="64x64-guided"} 0.01',
        'sdjax_job_phase_seconds_sum{phase="denoise"} 0.5',
        'sdjax_job_phase_seconds_bucket{le="0.5",phase="denoise"} 1.0',
    ):
        assert f"\n{line}\n" in text
    assert re.search(r'sdjax_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"} \d', text)
    assert job_id not in text
    server.engine.go.set()


def test_metrics_tell_of_memory_and_of_the_event_loop(server):
    held = jax.numpy.zeros(2**20, "float32")
    numbers = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        numbers |= {(sample.name, *sample.labels.values()): sample.value for sample in family.samples}
    assert numbers["sdjax_device_memory_bytes", str(jax.devices()[0]), "in_use"] >= held.nbytes
    assert numbers["process_resident_memory_bytes",] > held.nbytes
    count = numbers["sdjax_event_loop_lag_seconds_count",]
    assert wait_for(lambda: f"sdjax_event_loop_lag_seconds_count {count}" not in server.client.get("/metrics").text)


def test_what_holds_the_event_loop_is_seen_in_its_lag(serve):
    server = serve()

    async def hold():
        time.sleep(0.4)

    def late():
        numbers = server.client.get("/metrics").text
        counts = dict(re.findall(r'sdjax_event_loop_lag_seconds_bucket{le="(.+)"} (.+)', numbers))
        return float(counts["+Inf"]) - float(counts["0.25"])

    before = late()
    asyncio.run_coroutine_threadsafe(hold(), server.server._loop).result()
    assert wait_for(lambda: late() > before)


def test_a_job_says_when_it_will_be_complete_by_the_steps_before_it(serve):
    server = serve()
    server.engine.go.clear()
    first = server.submit(steps=100)
    wait_for(lambda: first in server.engine.leased)
    second, third = server.submit(steps=20, num_images=2), server.submit(steps=50)
    assert [server.job(job)["eta_seconds"] for job in (first, second, third)] == [1.0, 1.4, 1.9]
    server.client.delete(f"/v1/jobs/{second}")
    assert server.job(second)["eta_seconds"] is None
    assert server.job(third)["eta_seconds"] == 1.5
    server.engine.go.set()


def test_a_fault_of_ours_is_a_500_of_the_same_shape(server, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a secret of the disk")

    monkeypatch.setattr(server.store, "jobs", broken)
    answer = server.client.get("/v1/jobs")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text
    monkeypatch.setattr(server.store, "submit", broken)
    answer = server.client.post("/v1/images/generations", json={"prompt": "x"})
    assert answer.json()["error"]["type"] == "server_error"


def test_an_inpainting_model_draws_nothing_else(serve):
    server = serve(model={"needs_mask": True})
    answer = server.client.post("/v1/jobs", json={"operation": "image_generation", "prompt": "x"})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "operation"


def test_a_published_models_own_limits_hold(serve):
    server = serve(model={"size": 512})
    body = {"operation": "image_generation", "prompt": "x", "steps": 1}
    assert server.client.post("/v1/jobs", json={**body, "width": 248}).json()["error"]["field"] == "width"
    assert server.client.post("/v1/jobs", json={**body, "width": 256, "height": 2048}).status_code == 200


def test_a_schedule_is_part_of_the_request_where_one_is_given(server):
    body = {"operation": "image_generation", "prompt": "a circle", "steps": 2}
    for given in ("karras", "exponential", "beta", "ays"):
        assert server.job(server.submit(steps=2, schedule=given))["request"]["schedule"] == given
    for given in (None, ...):
        fields = {} if given is ... else {"schedule": given}
        assert "schedule" not in server.job(server.submit(steps=2, **fields))["request"]
    answer = server.client.post("/v1/jobs", json={**body, "schedule": "linear"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "schedule")


def test_the_description_is_openapi_3_1_of_the_same_schemas(server):
    document = server.client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    fields = document["components"]["schemas"]["ImageGeneration"]["properties"]
    assert fields["steps"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 150}
    assert set(fields) == {
        *("operation", "hive_id", "model", "prompt", "negative_prompt", "steps", "guidance_scale", "seed"),
        *("width", "height", "loras", "worker_id", "sampler", "num_images", "preview_every", "response"),
        *("cancel_on_disconnect", "schedule"),
    }


def test_the_documentation_page_asks_no_other_host(server):
    answer = server.client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert "<script" not in answer.text
    for path in ("/v1/jobs/{job_id}/stream", "/v1/images/edits", "/metrics"):
        assert path in answer.text
