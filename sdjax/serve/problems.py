"""What a client is told when a request can't be honoured: a status, a code, a sentence, and the field that is wrong.

Two shapes go over the wire: `{"error": {"code", "message", "field"}}`, and on the routes that OpenAI's clients call
`{"error": {"message", "type", "param", "code"}}`, where every wrong parameter is a 400.
"""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.serve.forwarded import route_path
from sdjax.serve.storage import StorageError

OPENAI_PATHS = ("/v1/images", "/v1/models")
logger = logging.getLogger(__name__)

SHOWN = 60
"""Characters of a wrong value that a message repeats at most."""


class ProblemError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        code: a word for programs: "not_json", "invalid_field", "queue_full", ...
        field: the one that is wrong, such as "loras.0.path"; None where it is none in particular.
        headers: that go with the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.field = field
        self.headers = headers


def invalid(field: str | None, message: str) -> ProblemError:
    """A field whose value is wrong."""
    return ProblemError(422, "invalid_field", message, field=field)


def storage_problem(error: StorageError) -> ProblemError:
    """A store that fails: it may work again, which is worth another try unless it is damaged."""
    status = 507 if error.kind == "full" else 503
    if error.kind == "damaged":
        return ProblemError(status, "storage_damaged", str(error))
    return ProblemError(status, f"storage_{error.kind}", f"{error}; try again later", headers={"Retry-After": "30"})


def lost_picture() -> ProblemError:
    """A picture that a job had."""
    return ProblemError(410, "picture_lost", "the job had this picture, but it is not on the server's disk any more")


def answer(problem: ProblemError, scope: Scope) -> JSONResponse:
    """The response to a request, in the shape that the path's clients read."""
    is_openai = route_path(scope).startswith(OPENAI_PATHS)
    status = 400 if is_openai and problem.status in (409, 422) else problem.status
    body: dict[str, Any]
    if is_openai:
        body = openai_error(problem)
    else:
        body = {"error": {"code": problem.code, "message": problem.message, "field": problem.field}}
    return JSONResponse(body, status, headers=dict(problem.headers or {}))


def openai_error(problem: ProblemError) -> dict[str, Any]:
    """The body that OpenAI's clients read."""
    kind = (
        "rate_limit_error"
        if problem.status == 429
        else "server_error"
        if problem.status >= 500
        else "invalid_request_error"
    )
    return {"error": {"message": problem.message, "type": kind, "param": problem.field, "code": problem.code}}


class Failures:
    """Answer 500 for what went wrong in the application, and keep the connection, which Starlette's own would not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            if has_begun or scope["type"] != "http":
                raise
            logger.exception("%s %r failed", scope["method"], scope["path"])
            problem = ProblemError(500, "internal", "the server failed; its log says why")
            await answer(problem, scope)(scope, receive, send)


def shown(value: object) -> str:
    """A value as a message repeats it: never long."""
    if isinstance(value, str):
        return repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}... ({len(value)} characters)"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 3 * SHOWN:
        return f"a number of {value.bit_length()} bits"
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value)[:SHOWN])
