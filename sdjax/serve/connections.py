"""One HTTP connection: a deadline for every phase in which the client acts, and a bound on how many are open.

uvicorn limits idle connections alone. A client that connects and is silent, sends its request byte by byte, or does not
read its answer would hold a connection, and its memory, for ever.
"""

import asyncio
import json
import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdjax.serve import bodies

HEAD_WITHIN = 10.0
"""Seconds for the request line and headers: from connecting, or from their first byte on a connection in use."""
BODY_GRACE = 5.0
"""Seconds beyond `bodies.ARRIVES_WITHIN` in which the application answers 408 by itself."""
LINGER = 1.0
"""Seconds between an answer that ends a connection and its end."""
READ_WITHIN = 30.0
"""Seconds that a client may leave a full send buffer unread."""


def protocol(limit: int) -> type[H11Protocol]:
    """The class of connections of which at most `limit` are open.

    At the limit the connection that has waited longest for a request is closed; where every one has a request under
    way, the new one is answered 503.
    """
    return type("LimitedProtocol", (BoundedProtocol,), {"limit": limit})


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with deadlines; see uvicorn for the methods."""

    limit = 1000

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._phase: tuple[str, object] | None = None
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._waits_since = time.monotonic()
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the deadline of the first head, and make room for this connection or refuse it."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) <= self.limit:
            return
        waiting = [other for other in _bounded(self.connections) if other is not self and other.is_waiting]
        if waiting:
            min(waiting, key=lambda other: other._waits_since).close()
        else:
            self._refuse(503, "too_many_connections", f"the server has {self.limit} connections, which is its limit")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget all deadlines."""
        for timer in (self._receiving, self._sending):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; they move a deadline only where they complete a phase."""
        if self._is_refused:
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._waits_since = time.monotonic()
        self._watch()

    def pause_writing(self) -> None:
        """Begin the deadline for a client that does not read."""
        super().pause_writing()
        if self._sending is None:
            self._sending = self.loop.call_later(READ_WITHIN, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the shape of every other error."""
        self._refuse(400, "bad_request", msg.removesuffix("."))

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way."""
        return (
            not self.transport.is_closing()
            and not self._is_refused
            and (self.cycle is None or bool(self.cycle.response_complete))
        )

    def close(self) -> None:
        """Close a connection on which no request is under way."""
        self.timeout_keep_alive_handler()

    def _watch(self) -> None:
        """Set the deadline of the phase in which the client has to send something."""
        phase = self._awaited()
        if phase == self._phase or self._is_refused:
            return
        self._phase = phase
        self._end_deadline()
        if phase is not None and not self.transport.is_closing():
            seconds = HEAD_WITHIN if phase[0] == "head" else bodies.ARRIVES_WITHIN + BODY_GRACE
            self._receiving = self.loop.call_later(seconds, self._too_late)

    def _awaited(self) -> tuple[str, object] | None:
        """What is due ("head" or "body") and the request before it; None between two requests and during an answer."""
        if self.conn.their_state is h11.SEND_BODY:
            return "body", self.cycle
        is_due = self.cycle is None or bool(self.conn.trailing_data[0])
        return ("head", self.cycle) if self.conn.their_state is h11.IDLE and is_due else None

    def _end_deadline(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _too_late(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, "timeout", f"the request's head did not arrive within {HEAD_WITHIN:g} s")
        elif self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the application, and close."""
        if self.transport.is_closing() or self._is_refused:
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": {"code": code, "message": message, "field": None}}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
                *([("retry-after", "5")] if status == 503 else ()),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self._is_refused = True
        self._end_deadline()
        if self.transport.can_write_eof() and len(self.connections) < 2 * self.limit:
            # A connection that is closed on unread bytes is reset, and the answer in it is lost.
            self.transport.write_eof()
            self._receiving = self.loop.call_later(LINGER, self.transport.close)
        else:
            self.transport.close()


def _bounded(connections: Iterable[object]) -> list[BoundedProtocol]:
    return [connection for connection in connections if isinstance(connection, BoundedProtocol)]
