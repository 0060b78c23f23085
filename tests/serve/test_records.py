"""What a job brought can be read again, and a job that has ended can be forgotten."""

import hashlib

import httpx
import pytest

from tests.serve.conftest import KEY, as_base64, picture


@pytest.fixture(scope="module")
def keyed(serve_all):
    return serve_all(api_key=[KEY, "another"])


def test_pictures_of_a_request_are_given_back_as_they_came(server):
    photo, mask = picture(64, 64, "JPEG", color=(1, 2, 3)), picture(64, 64, mode="L")
    job_id = server.submit(operation="image_inpaint", init_image=as_base64(photo), mask_image=as_base64(mask))
    for name, content, kind in (("init_image", photo, "image/jpeg"), ("mask_image", mask, "image/png")):
        answer = server.client.get(f"/v1/jobs/{job_id}/inputs/{name}")
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, content, kind)
        assert "sandbox" in answer.headers["content-security-policy"]
        assert server.job(job_id)["request"][name] == {"blob": hashlib.sha256(content).hexdigest()}
    for name in ("input_image", "prompt", "model", "nothing"):
        answer = server.client.get(f"/v1/jobs/{job_id}/inputs/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_job_that_has_ended_is_forgotten(server):
    job_id, other = server.submit(steps=1), server.submit(steps=1)
    for each in (job_id, other):
        server.wait(each, "complete")
    answer = server.client.delete(f"/v1/jobs/{job_id}/record")
    assert (answer.status_code, answer.content) == (204, b"")
    for path in ("", "/stream", "/images/0"):
        assert server.client.get(f"/v1/jobs/{job_id}{path}").status_code == 404
    assert server.client.delete(f"/v1/jobs/{job_id}/record").status_code == 404
    assert server.job(other)["state"] == "complete"


def test_a_live_job_is_not_forgotten(server):
    server.engine.go.clear()
    job_id = server.submit()
    answer = server.client.delete(f"/v1/jobs/{job_id}/record")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_finished")
    server.engine.go.set()
    server.wait(job_id, "complete")


def test_a_key_reads_and_forgets_its_own_jobs_only(keyed):
    job_id = keyed.submit(operation="image_transform", input_image=as_base64(picture()), steps=2)
    keyed.wait(job_id, "complete")
    other = {"Authorization": "Bearer another"}
    for method, path in (("GET", "inputs/input_image"), ("DELETE", "record")):
        assert keyed.client.request(method, f"/v1/jobs/{job_id}/{path}", headers=other).status_code == 404
        assert httpx.request(method, f"{keyed.url}/v1/jobs/{job_id}/{path}").status_code == 401
    assert keyed.job(job_id)["state"] == "complete"


def test_models_say_what_a_form_needs_to_know(server):
    (model,) = server.client.get("/v1/models").json()["data"]
    own = {"steps": 20, "guidance_scale": 3.0, "sampler": "ddim", "size": 64, "least_side": 64, "needs_mask": False}
    assert model["sdjax"] == {**own, "most_pixels": 2048 * 2048}
