"""Keys, limits, and web pages that have no business here."""

import httpx
import pytest

from sdjax.serve import security
from sdjax.serve.security import Guard
from tests.serve.conftest import KEY


@pytest.fixture(scope="module")
def keyed(serve_all):
    return serve_all(api_key=[KEY, "another"], key_limit=2)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"]
)
def test_without_the_key_nothing_is_told(keyed, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with httpx.Client(base_url=keyed.url) as stranger:
        for method, path in (
            ("POST", "/v1/jobs"),
            ("GET", "/v1/jobs"),
            ("GET", f"/v1/jobs/{'0' * 32}/stream"),
            ("GET", "/metrics"),
            ("GET", "/v1/nothing"),
        ):
            answer = stranger.request(method, path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "unauthorized"
        answer = stranger.post("/v1/images/generations", headers=headers)
        assert answer.status_code == 401
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_probes_the_page_and_the_documentation_need_no_key(keyed):
    with httpx.Client(base_url=keyed.url) as stranger:
        for path in ("/health", "/ready", "/", "/docs", "/openapi.json"):
            assert stranger.get(path).status_code == 200


def test_a_key_sees_its_own_jobs_only(keyed):
    job_id = keyed.submit(steps=1)
    keyed.wait(job_id, "complete")
    other = {"Authorization": "Bearer another"}
    for method, path in (("GET", ""), ("GET", "/stream"), ("GET", "/images/0"), ("DELETE", "")):
        assert keyed.client.request(method, f"/v1/jobs/{job_id}{path}", headers=other).status_code == 404
    assert keyed.client.get("/v1/jobs", headers=other).json()["jobs"] == []
    assert keyed.client.get("/v1/jobs", headers=other, params={"before": job_id}).status_code == 404
    assert keyed.job(job_id)["state"] == "complete"


def test_a_key_may_have_so_many_unfinished_jobs(keyed):
    keyed.engine.go.clear()
    jobs = [keyed.submit() for _ in range(2)]
    body = {"operation": "image_generation", "prompt": "a circle"}
    answer = keyed.client.post("/v1/jobs", json=body)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert keyed.client.post("/v1/jobs", json=body, headers={"Authorization": "Bearer another"}).status_code == 200
    keyed.client.delete(f"/v1/jobs/{jobs[0]}")
    assert keyed.client.post("/v1/jobs", json=body).status_code == 200
    keyed.engine.go.set()


def test_a_full_queue_says_when_to_come_back(serve):
    server = serve(queue_limit=2)
    server.engine.go.clear()
    running = server.submit()
    server.wait(running, "running")
    first, second = server.submit(), server.submit()
    answer = server.client.post("/v1/jobs", json={"operation": "image_generation", "prompt": "a circle"})
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1
    answer = server.client.post("/v1/images/generations", json={"prompt": "a circle"})
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert [server.job(job)["position"] for job in (running, first, second)] == [None, 1, 2]
    server.engine.go.set()


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost"])
def test_a_page_of_another_origin_can_not_submit(server, origin):
    body = '{"operation": "image_generation", "prompt": "a circle"}'
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    answer = server.client.post("/v1/jobs", content=body, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "wrong_origin"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["http://[", "http://]", "//[x", "http://h:99999", "http://h:x", "[", "http://[::1%zone]"]
)
def test_an_origin_that_is_no_url_is_refused_like_any_other(server, origin):
    answer = server.client.get("/v1/jobs", headers={"Origin": origin})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "wrong_origin"


@pytest.mark.parametrize("host", ["[", "]", "[x", "h:x", "h:99999", ""])
def test_a_host_that_is_no_name_is_refused_like_any_other(server, host):
    answer = server.client.get("/v1/jobs", headers={"Host": host})
    assert answer.status_code in (400, 403)
    assert set(answer.json()["error"]) == {"code", "message", "field"}


def test_whatever_fails_before_a_route_is_an_error_in_our_shape(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(Guard, "_check_origin", lambda *_: 1 / 0)
    answer = server.client.get("/v1/jobs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")


def test_a_browser_that_vouches_for_its_page_is_believed(server):
    headers = {"Origin": "https://studio.example", "Sec-Fetch-Site": "same-origin"}
    body = {"operation": "image_generation", "prompt": "a circle", "steps": 1}
    assert server.client.post("/v1/jobs", json=body, headers=headers).status_code == 200
    for site in ("same-site", "cross-site", "none", "nonsense"):
        refused = server.client.post("/v1/jobs", json=body, headers={**headers, "Sec-Fetch-Site": site})
        assert refused.status_code == 403


def test_a_name_that_was_allowed_may_be_called_and_its_page_may_call(serve):
    server = serve(allow_host=["Studio.example"])
    for host, status in (("studio.example", 200), ("studio.example:81", 200), ("evil.example", 403)):
        assert server.client.get("/v1/jobs", headers={"Host": host}).status_code == status
    for origin, status in (("https://studio.example:8443", 200), ("https://studio.example.evil.example", 403)):
        assert server.client.get("/v1/jobs", headers={"Origin": origin}).status_code == status


def test_a_refusal_is_logged_with_what_would_let_it_pass_and_not_again_and_again(serve, caplog):
    server = serve()
    for _ in range(50):
        server.client.get("/v1/jobs", headers={"Origin": "https://studio.example"})
    server.client.get("/v1/jobs", headers={"Host": "studio.example"})
    lines = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(lines) == 2
    assert "https://studio.example" in lines[0]
    assert all("--allow-host" in line for line in lines)


def test_refusals_of_a_thousand_kinds_fill_no_log():
    repeats = security.Repeats(most=3)
    assert [repeats.is_new(key) for key in (1, 2, 1, 3, 4, 5)] == [True, True, False, True, False, False]
    repeats = security.Repeats(seconds=0, most=3)
    assert all(repeats.is_new(key) for key in (1, 2, 1, 3, 4, 5))


def test_our_own_page_can_submit(server):
    body = {"operation": "image_generation", "prompt": "a circle", "steps": 1}
    assert server.client.post("/v1/jobs", json=body, headers={"Origin": server.url}).status_code == 200


def test_a_name_that_was_made_to_point_at_us_is_not_ours(server):
    for host, status in (("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost:1", 200), ("[::1]", 200)):
        assert server.client.get("/v1/jobs", headers={"Host": host}).status_code == status


def test_an_origin_that_was_allowed_may_call(serve):
    server = serve(cors_origin=["https://studio.example"])
    headers = {"Origin": "https://studio.example"}
    answer = server.client.get("/health", headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://studio.example"
    asked = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert server.client.options("/v1/jobs", headers=asked).status_code == 200
    assert server.client.get("/health", headers={"Origin": "https://evil.example"}).status_code == 403


def test_every_answer_forbids_sniffing(server):
    for path in ("/health", "/v1/jobs", "/nothing", "/docs", "/openapi.json", "/"):
        headers = server.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
