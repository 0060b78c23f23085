"""A client of the job server: submit, read, listen, cancel, over HTTP."""

import base64
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from sdjax.errors import RequestError, SdjaxError

FINAL = ("complete", "error", "cancelled")
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
"""Seconds; a silent stream says that it lives every 15 s, unless the server was told otherwise."""
PATIENCE = 60.0
"""Seconds in which a lost connection is tried again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0


class JobClient:
    """A connection to one server.

    Args:
        server: its URL.
        key: where it asks for one.

    Raises:
        RequestError: the URL is none.
    """

    def __init__(self, server: str, key: str | None = None) -> None:
        self.server = server.rstrip("/")
        try:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            self._http = httpx.Client(base_url=self.server, headers=headers, timeout=TIMEOUT)
            is_url = httpx.URL(self.server).scheme in ("http", "https") and bool(httpx.URL(self.server).host)
        except UnicodeEncodeError:
            raise RequestError("--api-key: a key has ASCII characters only") from None
        except httpx.InvalidURL:
            is_url = False
        if not is_url:
            raise RequestError(f"--server must be a URL like http://127.0.0.1:8600, not {server!r}")

    def __enter__(self) -> "JobClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Submit a job: `job_id` and `sse_url`.

        Raises:
            RequestError: the server refuses a field.
            SdjaxError: it isn't there, or takes no jobs.
        """
        return self._object("POST", "/v1/jobs", json=dict(fields))

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as it stands.

        Raises:
            SdjaxError: there is none, or no server.
        """
        return self._object("GET", _path(job_id))

    def jobs(self, limit: int) -> Iterator[dict[str, Any]]:
        """The newest jobs, newest first."""
        query: dict[str, Any] = {}
        while limit > 0:
            page = self._object("GET", "/v1/jobs", params={"limit": min(limit, 200), **query})
            yield from page["jobs"]
            limit -= len(page["jobs"])
            if page["next"] is None:
                return
            query = {"before": page["next"]}

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job.

        Raises:
            SdjaxError: it has ended already, or there is none.
        """
        return self._object("DELETE", _path(job_id))

    def image(self, job_id: str, number: int) -> bytes:
        """The bytes of a picture of a job."""
        return self._ask("GET", f"{_path(job_id)}/images/{number}").content

    def image_url(self, job_id: str, number: int) -> str:
        """Where a picture is; behind a proxy the server's own idea of that may lack a path."""
        return f"{self.server}{_path(job_id)}/images/{number}"

    def story(self, job_id: str) -> Iterator[dict[str, Any]]:
        """A job's events to the final one, each with its `type`, over as many connections as it takes.

        Raises:
            SdjaxError: there is no such job, or the connection is lost and doesn't come back.
        """
        last: str | None = None
        deadline, pause = time.monotonic() + PATIENCE, FIRST_PAUSE
        while True:
            problem = "the stream ended before the job"
            try:
                headers = {} if last is None else {"Last-Event-ID": last}
                with self._http.stream("GET", f"{_path(job_id)}/stream", headers=headers) as answer:
                    if answer.status_code == 204:
                        return
                    self._check(answer)
                    for number, data in read_events(answer.iter_bytes()):
                        last = number or last
                        deadline, pause = time.monotonic() + PATIENCE, FIRST_PAUSE
                        yield data
                        if data["type"] in FINAL:
                            return
            except httpx.TransportError as error:
                if last is None and isinstance(error, httpx.ConnectError):
                    raise self._absent(error) from None
                problem = str(error) or type(error).__name__
            if time.monotonic() > deadline:
                raise SdjaxError(f"the connection to {self.server} was lost: {problem}")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self._absent(error) from None
        self._check(answer)
        return answer

    def _object(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self._ask(method, path, **options)
        try:
            value = answer.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise SdjaxError(f"what answers at {self.server} is no job server")
        return value

    def _absent(self, error: httpx.TransportError) -> SdjaxError:
        if isinstance(error, httpx.ConnectError):
            return SdjaxError(f"no server answers at {self.server}: start one with `sdjax serve`, or give --server")
        return SdjaxError(f"{self.server} does not answer: {error or type(error).__name__}")

    def _check(self, answer: httpx.Response) -> None:
        """Turn a refusal into an error."""
        if answer.is_success:
            return
        answer.read()
        try:
            error = answer.json()["error"]
            message, field = str(error["message"]), error.get("field")
        except (ValueError, KeyError, TypeError, AttributeError):
            message, field = "it is no job server", None
        if answer.status_code == 401:
            given = "Authorization" in answer.request.headers
            message = "the server does not know this key" if given else "the server asks for a key"
            raise SdjaxError(f"{message}: give --api-key, or set SDJAX_API_KEY")
        if answer.status_code == 422 and field:
            raise RequestError(message)
        raise SdjaxError(f"{self.server} answered {answer.status_code}: {message}")


def read_events(chunks: Iterable[bytes]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Cut a stream of server-sent events into (id, data).

    Lines end with line feeds alone: a text may hold other characters that end lines in Python, such as U+2028.
    """
    rest = b""
    for chunk in chunks:
        *blocks, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            fields = dict(_field(line) for line in block.split(b"\n") if line and not line.startswith(b":"))
            if "data" in fields:
                yield fields.get("id"), json.loads(fields["data"])


def encoded(file: Path) -> str:
    """A file as the API takes pictures: in base64."""
    return base64.b64encode(file.read_bytes()).decode()


def _field(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode().partition(":")
    return name, value.removeprefix(" ")


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"
