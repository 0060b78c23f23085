"""Who may call: keys compared in constant time, pages of other origins kept out, and headers for browsers."""

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.serve.problems import ProblemError, answer

KEYED_PREFIXES = ("/v1", "/metrics")
"""Only what lies under these asks for a key: probes have none, and the page must load before one is typed in."""
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Let a request pass, with its owner in `request.state.owner`, or answer 401 or 403.

    Args:
        app: what is guarded.
        keys: any of them will do; with none, everybody may call.
        origins: of pages that may call although they are not ours.
        only_local: the server listens at a loopback address: a request must have been sent to one by name too, since
            else a page can make its own host's name point to us and be taken for ours.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str] = (), origins: Sequence[str] = (), only_local: bool = False
    ) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.origins = frozenset(origins)
        self.only_local = only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_origin(headers)
            asks = scope["path"].startswith(KEYED_PREFIXES)
            scope.setdefault("state", {})["owner"] = self._owner(headers) if self.digests and asks else ""
        except ProblemError as problem:
            await answer(problem, scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _owner(self, headers: Headers) -> str:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests have one length, and every key is compared: the time tells nothing.
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        same = [hmac.compare_digest(digest, known) for known in self.digests]
        if scheme.lower() != "bearer" or not any(same):
            raise ProblemError(
                401,
                "unauthorized",
                "a key is needed: send it as `Authorization: Bearer <key>`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()[:32]

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.only_local and not self.digests and not _is_local(host):
            raise ProblemError(403, "wrong_host", "without a key this server answers to localhost alone")
        origin = headers.get("origin")
        if origin is None or origin in self.origins or "*" in self.origins:
            return
        if urlsplit(origin).netloc != host:
            raise ProblemError(403, "wrong_origin", "pages of other origins may not call this server")


class SafeHeaders:
    """Put headers on every answer: nothing is sniffed, framed, or read by another site."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
