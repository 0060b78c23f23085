"""Connections: used again, given up when their client does not act, and bounded in number."""

import http.client
import json
import socket
import time

import pytest

from sdjax.serve import bodies, connections
from tests.serve.conftest import wait_for

HEAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def connect(server, *, seconds=10):
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    connection.settimeout(seconds)
    return connection


def rest(connection):
    """All that comes until the server closes; b"" where it was reset."""
    found = b""
    try:
        while data := connection.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def answered(connection):
    """One answer without waiting for the end of the connection: its status and its body."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.read()


@pytest.fixture
def hasty(monkeypatch, serve):
    """A server whose deadlines are short."""
    for name, seconds in (("HEAD_WITHIN", 0.3), ("BODY_GRACE", 0.2), ("READ_WITHIN", 0.3)):
        monkeypatch.setattr(connections, name, seconds)
    monkeypatch.setattr(bodies, "ARRIVES_WITHIN", 0.3)
    return serve


def drip(connection, data, pause=0.05):
    """Send byte by byte for as long as the server takes it; whether it gave up before the end."""
    try:
        for i in range(len(data)):
            connection.sendall(data[i : i + 1])
            time.sleep(pause)
    except OSError:
        return True
    return False


def test_a_client_that_was_idle_for_longer_than_most_keep_a_connection_gets_an_answer(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    for pause in (0, 6):
        time.sleep(pause)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
    connection.close()


def test_a_silent_connection_is_closed(hasty):
    with connect(hasty()) as silent:
        assert rest(silent) == b""


@pytest.mark.parametrize("start", [b"G", b"GET /health HTTP/1.1\r\n", HEAD, HEAD + b"X-Long: " + b"x" * 5000])
def test_a_head_that_does_not_end_is_answered_408_and_closed(hasty, start):
    with connect(hasty()) as slow:
        slow.sendall(start)
        head, _, body = rest(slow).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert json.loads(body)["error"]["code"] == "timeout"


def test_dripping_moves_no_deadline(hasty):
    with connect(hasty()) as slow:
        assert drip(slow, HEAD + b"X-Long: " + b"x" * 200)


def test_the_deadline_holds_for_every_request_of_a_connection(hasty):
    with connect(hasty()) as used:
        used.sendall(HEAD + b"\r\n")
        assert answered(used)[0] == 200
        time.sleep(0.6)  # between two requests there is no hurry
        used.sendall(HEAD + b"\r\n")
        assert answered(used)[0] == 200
        used.sendall(HEAD)
        assert rest(used).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "request_line", [b"POST /v1/jobs", b"GET /health", b"DELETE /v1/nothing", b"POST /v1/images/edits"]
)
def test_a_body_that_drips_is_given_up_whoever_reads_it(hasty, request_line):
    with connect(hasty()) as slow:
        kind = b"Content-Type: multipart/form-data; boundary=x\r\n"
        slow.sendall(request_line + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + kind + b"Content-Length: 1000\r\n\r\n")
        assert drip(slow, b" " * 1000)


def test_a_client_that_does_not_read_its_answers_is_let_go(hasty):
    server = hasty()
    with connect(server) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asks = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            deaf.sendall(asks * 100_000)  # more than all buffers on the way hold
    wait_for(lambda: len(server.server.server_state.connections) <= 1)


def test_a_request_that_is_none_is_refused_in_our_shape(server):
    with connect(server) as wrong:
        wrong.sendall(b"\x16\x03\x01\x02\x00 this is TLS\r\n\r\n")
        head, _, body = rest(wrong).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert json.loads(body)["error"]["code"] == "bad_request"


def test_at_the_limit_the_connection_that_waits_longest_makes_room(serve):
    server = serve(connections=8)
    server.client.get("/health")
    silent = [connect(server) for _ in range(30)]
    for _ in range(5):
        with connect(server) as honest:
            honest.sendall(HEAD + b"\r\n")
            assert answered(honest)[0] == 200
    wait_for(lambda: len(server.server.server_state.connections) <= 8)
    for connection in silent:
        connection.close()


def test_where_every_connection_has_a_request_a_new_one_is_told_to_come_back(serve):
    server = serve(connections=8)
    server.engine.go.clear()
    stream = b"GET /v1/jobs/%s/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % server.submit().encode()
    server.client.close()
    readers = [connect(server) for _ in range(8)]
    for reader in readers:
        reader.sendall(stream)
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
    with connect(server) as late:
        late.sendall(HEAD + b"\r\n")
        head, _, body = rest(late).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"retry-after" in head.lower()
        assert json.loads(body)["error"]["code"] == "too_many_connections"
    for reader in readers:
        reader.close()
    server.engine.go.set()


def test_large_bodies_that_never_end_leave_room_for_others(serve):
    size = 1 << 20
    server = serve(max_body=size)
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % size
    held = [connect(server) for _ in range(bodies.LARGE_AT_ONCE + 2)]
    for connection in held:
        connection.sendall(head + b" " * (size - 1))
    assert held[-1].recv(4096).startswith(b"HTTP/1.1 503")
    assert server.submit()
    for connection in held:
        connection.close()
    wait_for(lambda: server.client.post("/v1/jobs", content=b" " * (size - 1)).status_code == 400)
