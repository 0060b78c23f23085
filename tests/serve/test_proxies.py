"""Behind nginx and Caddy, as they come and by the files in `deploy/proxy`."""

import os
import re
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import openai
import pytest

from tests.serve.browser import chromium
from tests.serve.conftest import KEY, read_events, wait_for

FILES = Path(__file__).parents[2] / "deploy" / "proxy"
PLAIN = "location / { proxy_pass http://127.0.0.1:%d; }"
CUT_PATH = "location /sdjax/ { proxy_pass http://127.0.0.1:%d/; }"
KEPT_PATH = "location /sdjax { proxy_pass http://127.0.0.1:%d; proxy_set_header X-Forwarded-Host $http_host; }"
NAMES = "--host-resolver-rules=MAP *.example 127.0.0.1"


def program(name):
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"this test needs {name} (Debian: apt-get install {name})"
        )
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def port_of(server):
    return int(server.url.rsplit(":", 1)[1])


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def started():
    """Start proxies, which are stopped afterwards."""
    processes = []

    def start(command, port, **options):
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, **options)
        processes.append(process)
        wait_for(lambda: process.poll() is not None or listens(port))
        assert process.poll() is None, process.stderr.read().decode()

    yield start
    for process in processes:
        process.terminate()
        process.wait(120)
        process.stderr.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Files of a certificate for studio.example, and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=studio.example -addext subjectAltName=DNS:studio.example"
    )
    files = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [program("openssl"), *command.split(), "-out", files[0], "-keyout", files[1]], check=True, capture_output=True
    )
    return files


@pytest.fixture
def nginx(started, tmp_path):
    """Start nginx with the text of a `server` or of what is inside of one: its port."""

    def start(text):
        port = free_port()
        text = re.sub(r"listen \d+", f"listen 127.0.0.1:{port}", text)
        if "listen" not in text:
            text = f"server {{ listen 127.0.0.1:{port}; {text} }}"
        temporary = "".join(
            f"{kind}_temp_path {tmp_path}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main = f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {temporary}"
        (tmp_path / "nginx.conf").write_text(f"{main} {text} }}\n")
        started([program("nginx"), "-p", tmp_path, "-e", "stderr", "-c", tmp_path / "nginx.conf"], port)
        return port

    return start


DECODED = """() => {
    const image = document.querySelector(".card[data-state=complete] .open img");
    return image && image.complete && image.naturalWidth > 0;
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium(NAMES, "--ignore-certificate-errors") as found:
        yield found


@pytest.fixture
def draws(browser):
    """Open the page at an address and draw with it: it starts, hears how the job goes on, and shows its picture."""
    contexts = []

    def draw(url, key=None):
        context = browser.new_context(ignore_https_errors=True)
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "response", lambda answer: answer.status in (403, 404) and wrong.append(f"{answer.status} {answer.url}")
        )
        page.goto(url)
        if key is not None:
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
        page.wait_for_selector("#status[data-state=ready]")
        page.locator("#prompt").fill("a red circle")
        page.locator("#draw").click()
        # Whether it decodes is asked until it does: a preview may be replaced by the picture meanwhile.
        page.wait_for_function(DECODED)
        page.get_by_role("link", name="API").click()
        page.get_by_role("heading", name="Routes").wait_for()
        assert wrong == []

    yield draw
    for context in contexts:
        context.close()


def talk(client, root=""):
    """Submit a job and read its story and its picture by the addresses that the server gives."""
    body = {"operation": "image_generation", "prompt": "a red circle", "steps": 3}
    answer = client.post(f"{root}/v1/jobs", json=body)
    assert answer.status_code == 200, answer.text
    accepted = answer.json()
    assert accepted["sse_url"] == f"{root}/v1/jobs/{accepted['job_id']}/stream"
    assert answer.headers["location"] == f"{root}/v1/jobs/{accepted['job_id']}"
    with client.stream("GET", accepted["sse_url"]) as stream:
        assert [event["event"] for event in read_events(stream)][-1] == "complete"
    job = client.get(answer.headers["location"]).json()
    assert client.get(job["images"][0]).content.startswith(b"\x89PNG")


def test_the_page_draws_behind_a_plain_proxy_pass(serve, nginx, draws):
    server = serve()
    port = nginx(PLAIN % port_of(server))
    draws(f"http://127.0.0.1:{port}/")
    talk(httpx.Client(base_url=f"http://127.0.0.1:{port}"))


def test_the_page_draws_behind_a_plain_proxy_pass_under_a_name_that_was_allowed(serve, nginx, draws):
    server = serve(allow_host=["studio.example"])
    port = nginx(PLAIN % port_of(server))
    draws(f"http://studio.example:{port}/")


def test_the_page_draws_behind_a_plain_proxy_pass_under_a_path(serve, nginx, draws):
    server = serve()
    port = nginx(CUT_PATH % port_of(server))
    draws(f"http://127.0.0.1:{port}/sdjax/")


def test_nginx_by_our_file_serves_over_tls_with_keys(serve, nginx, draws, certificate):
    server = serve(api_key=[KEY])
    text = (FILES / "nginx.conf").read_text().replace("127.0.0.1:8600", f"127.0.0.1:{port_of(server)}")
    for file, name in zip(certificate, ("pem", "key"), strict=True):
        text = text.replace(f"/etc/ssl/studio.example.{name}", str(file))
    port = nginx(text)
    draws(f"https://studio.example:{port}/", key=KEY)
    trusted = ssl.create_default_context(cafile=certificate[0])
    trusted.check_hostname = False
    headers = {"Host": f"studio.example:{port}", "Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", headers=headers, verify=trusted) as client:
        talk(client)
        body = {"prompt": "a circle", "response_format": "url"}
        (picture,) = client.post("/v1/images/generations", json=body).json()["data"]
    assert picture["url"].startswith(f"https://studio.example:{port}/v1/jobs/")
    with httpx.Client(verify=trusted, headers={"Host": f"studio.example:{port}"}) as stranger:
        link = picture["url"].replace("studio.example", "127.0.0.1")
        assert stranger.get(link).content.startswith(b"\x89PNG")
        assert stranger.get(link.partition("?")[0]).status_code == 401


def test_nginx_by_our_file_serves_under_a_path(serve, nginx, draws):
    server = serve()
    text = (FILES / "nginx-path.conf").read_text().replace("127.0.0.1:8600", f"127.0.0.1:{port_of(server)}")
    port = nginx(text)
    draws(f"http://127.0.0.1:{port}/sdjax/")
    draws(f"http://127.0.0.1:{port}/sdjax")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        talk(client, "/sdjax")
        assert client.get("/sdjax/openapi.json").json()["servers"] == [{"url": "/sdjax"}]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/sdjax/v1", api_key="none")
    (picture,) = client.images.generate(prompt="a circle", response_format="url").data
    assert picture.url.startswith(f"http://127.0.0.1:{port}/sdjax/v1/jobs/")
    assert httpx.get(picture.url).content.startswith(b"\x89PNG")


def test_a_path_that_the_proxy_keeps_is_told_by_a_flag(serve, nginx, draws):
    server = serve(root_path="/sdjax/")
    port = nginx(KEPT_PATH % port_of(server))
    draws(f"http://127.0.0.1:{port}/sdjax")
    talk(httpx.Client(base_url=f"http://127.0.0.1:{port}"), "/sdjax")
    assert server.client.get("/health").status_code == 200  # probes ask without the path


def test_caddy_by_our_file_serves_under_a_name_and_under_a_path(serve, started, tmp_path, draws):
    server = serve(allow_host=["studio.example", "tools.example"])
    port = free_port()
    text = (FILES / "Caddyfile").read_text().replace("127.0.0.1:8600", f"127.0.0.1:{port_of(server)}")
    sites = re.sub(r"^(\w+\.example) \{", rf"https://\1:{port} {{\n\ttls internal", text, flags=re.MULTILINE)
    options = "{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n}\n"
    (tmp_path / "Caddyfile").write_text(options + sites)
    home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    started([program("caddy"), "run", "--config", tmp_path / "Caddyfile"], port, env={**os.environ, **home})
    draws(f"https://studio.example:{port}/")
    draws(f"https://tools.example:{port}/sdjax/")


@pytest.mark.parametrize(
    ("headers", "place"),
    [
        ({}, "http://127.0.0.1"),
        ({"X-Forwarded-Host": "studio.example", "X-Forwarded-Proto": "https"}, "https://studio.example"),
        ({"X-Forwarded-Host": "a.example, b.example:81"}, "http://b.example:81"),
        ({"X-Forwarded-Host": "[::1]:81"}, "http://[::1]:81"),
        ({"X-Forwarded-Prefix": "/a/b/"}, "http://127.0.0.1/a/b"),
        ({"X-Forwarded-Host": 'x"><script>'}, "http://127.0.0.1"),
        ({"X-Forwarded-Host": "a/b"}, "http://127.0.0.1"),
        ({"X-Forwarded-Proto": "javascript"}, "http://127.0.0.1"),
        ({"X-Forwarded-Prefix": "//evil.example"}, "http://127.0.0.1"),
        ({"X-Forwarded-Prefix": "/../x"}, "http://127.0.0.1"),
        ({"X-Forwarded-Prefix": "/a" * 200}, "http://127.0.0.1"),
    ],
    ids=str,
)
def test_a_trusted_proxys_headers_are_the_address_that_is_given_out(server, headers, place):
    body = {"prompt": "a circle", "response_format": "url", "steps": 1}
    answer = server.client.post("/v1/images/generations", json=body, headers={"Host": "127.0.0.1", **headers})
    assert answer.json()["data"][0]["url"].startswith(f"{place}/v1/jobs/")


def test_other_peers_are_not_believed(serve):
    server = serve(forwarded_allow_ips=["10.0.0.0/8"])
    headers = {"X-Forwarded-Host": "a.example", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/a"}
    body = {"prompt": "a circle", "response_format": "url", "steps": 1}
    answer = server.client.post("/v1/images/generations", json=body, headers=headers)
    assert answer.json()["data"][0]["url"].startswith(f"{server.url}/v1/jobs/")


def test_a_header_makes_no_foreign_name_ours(server):
    headers = {"Host": "evil.example", "X-Forwarded-Host": "localhost"}
    assert server.client.get("/v1/jobs", headers=headers).status_code == 403


def test_a_prefix_opens_no_door(serve):
    server = serve(api_key=[KEY])
    with httpx.Client(base_url=server.url) as stranger:
        for prefix, path in (
            ("/v1", "/v1/v1/jobs"),
            ("/v1", "/v1/jobs"),
            ("/v1/jobs", "/v1/jobs"),
            ("/a", "/a/v1/jobs"),
        ):
            answer = stranger.get(path, headers={"X-Forwarded-Prefix": prefix})
            assert answer.status_code in (307, 401, 404)
            assert "jobs" not in answer.text or answer.status_code != 200


def test_requests_are_logged_where_it_is_asked_for_and_never_their_queries(serve, caplog):
    def lines():
        return [record.getMessage() for record in caplog.records if record.name.startswith("sdjax")]

    quiet, logged = serve(), serve(access_log=True)
    with caplog.at_level("INFO"):
        for server in (quiet, logged):
            server.client.get("/health?signature=secret", headers={"X-Forwarded-For": "10.1.2.3"})
        wait_for(lambda: "10.1.2.3" in "".join(lines()))
    (line,) = [line for line in lines() if "/health" in line]
    assert re.fullmatch(r"10\.1\.2\.3 GET /health 200 [\d.]+ s", line)
