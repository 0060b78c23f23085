"""Bodies of requests: bounded while they arrive, and JSON that is read strictly."""

import json
from collections.abc import Sequence
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.serve.problems import ProblemError, answer, invalid, shown

ARRIVES_WITHIN = 60.0
"""Seconds that a body may take: a client that stops sending doesn't hold its connection for ever."""
SMALL, LARGE_AT_ONCE = 1 << 16, 8
COME_BACK = {"Retry-After": "10", "Connection": "close"}
LINGER_SECONDS, LINGER_BYTES = 2.0, 1 << 28
LONGEST_NUMBER = 400
"""Digits beyond which a whole number is infinite to us: Python refuses to read thousands of them."""


class BodyLimit:
    """Refuse bodies beyond `limit` bytes with 413, by what they declare or, where that is absent, as they arrive.

    Large bodies that are arriving may hold `LARGE_AT_ONCE * limit` bytes together; one beyond that is answered 503.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        total = held = 0
        is_refused = False

        async def counted() -> Message:
            nonlocal total, held, is_refused
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.limit:
                is_refused = True
                raise self._too_large()
            holds = max(0, total - SMALL) if message.get("more_body") else 0
            self._arriving += holds - held
            held = holds
            if held and self._arriving > LARGE_AT_ONCE * self.limit:
                is_refused = True
                raise ProblemError(503, "busy", "too many large bodies arrive at once", headers=COME_BACK)
            return message

        async def lingering(message: Message) -> None:
            if is_refused and message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                await _discard(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self.limit:
            is_refused = True
            await answer(self._too_large(), scope)(scope, receive, lingering)
            return
        try:
            await self.app(scope, counted, lingering)
        finally:
            self._arriving -= held

    def _too_large(self) -> ProblemError:
        return ProblemError(
            413, "too_large", f"the body is larger than {self.limit} bytes", headers={"Connection": "close"}
        )


async def _discard(receive: Receive) -> None:
    """Read on for a moment: a connection that is closed on unread bytes is reset, and the answer in it is lost."""
    left = LINGER_BYTES
    with anyio.move_on_after(LINGER_SECONDS):
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        ProblemError: it is too large (413), or doesn't arrive (408).
    """
    try:
        with anyio.fail_after(ARRIVES_WITHIN):
            return await request.body()
    except TimeoutError:
        raise ProblemError(
            408,
            "timeout",
            f"the body did not arrive within {ARRIVES_WITHIN:g} s",
            headers={"Connection": "close"},
        ) from None


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object in UTF-8.

    Numbers that are not finite (NaN, Infinity, 1e400) stay such floats: the schema refuses them with the field's name.

    Raises:
        ProblemError: it is no JSON or no object (400), or names something twice (422).
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_int=_whole, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ProblemError(400, "not_json", f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ProblemError(400, "not_json", f"the body is not JSON: {error.msg} (character {error.pos})") from None
    except RecursionError:
        raise ProblemError(400, "not_json", "the body is nested too deeply") from None
    if not isinstance(value, dict):
        raise ProblemError(400, "not_json", f"the body must be a JSON object, not {shown(value)}")
    return value


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_NUMBER else float(digits)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid(twice[:60], f"{shown(twice)} is given twice")
    return value
