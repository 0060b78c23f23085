"""Who may call: keys compared in constant time, pages of other origins kept out, and headers for browsers."""

import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.serve.forwarded import route_path
from sdjax.serve.links import is_signed
from sdjax.serve.problems import ProblemError, answer, shown

KEYED_PREFIXES = ("/v1", "/metrics")
"""Only what lies under these asks for a key: probes have none, and the page must load before one is typed in."""
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
DEFAULT_PORTS = {"http": 80, "https": 443}

logger = logging.getLogger(__name__)


class Guard:
    """Let a request pass, with its owner in `request.state.owner`, or answer 401 or 403 and log why.

    Args:
        app: what is guarded.
        keys: any of them will do; with none, everybody may call.
        origins: of pages that may call although they are not ours.
        only_local: the server listens at a loopback address: a request must have been sent to one by name too, since
            else a page can make its own host's name point to us and be taken for ours.
        hosts: names, beside those of this machine, by which the server is reached: a reverse proxy's.
        link_secret: signs links to pictures, which need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str] = (),
        origins: Sequence[str] = (),
        only_local: bool = False,
        hosts: Sequence[str] = (),
        link_secret: bytes | None = None,
    ) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.origins = frozenset(origins)
        self.only_local = only_local
        self.hosts = frozenset(hosts)
        self.link_secret = link_secret
        self._logged = Repeats()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            sent_host = scope.get("state", {}).get("sent_host", headers.get("host", ""))
            self._check_host(sent_host)
            self._check_origin(headers, sent_host)
            path = route_path(scope)
            needs_key = self.digests and path.startswith(KEYED_PREFIXES) and not self._has_link(scope, path)
            scope.setdefault("state", {})["owner"] = self._owner(headers) if needs_key else ""
        except ProblemError as problem:
            self._log(problem, scope, headers)
            await answer(problem, scope)(scope, receive, send)
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

    def _has_link(self, scope: Scope, path: str) -> bool:
        if self.link_secret is None or scope["method"] not in ("GET", "HEAD"):
            return False
        return is_signed(path, QueryParams(scope["query_string"]), self.link_secret)

    def _check_host(self, sent: str) -> None:
        if not self.only_local or self.digests:
            return
        name = (_address(f"//{sent}") or ("", 0))[0]
        if not _is_local(name) and name not in self.hosts:
            raise ProblemError(403, "wrong_host", "without a key this server answers to localhost alone")

    def _check_origin(self, headers: Headers, sent_host: str) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self.origins or "*" in self.origins:
            return
        # Scripts can't set this header. Browsers send it where the page is local or came over TLS.
        if headers.get("sec-fetch-site") == "same-origin":
            return
        page = _address(origin)
        port = DEFAULT_PORTS.get(origin.partition("://")[0], 0)
        ours = [_address(f"//{host}", port) for host in (headers.get("host", ""), sent_host)]
        if page is None or (page not in ours and page[0] not in self.hosts):
            raise ProblemError(403, "wrong_origin", "pages of other origins may not call this server")

    def _log(self, problem: ProblemError, scope: Scope, headers: Headers) -> None:
        """One line a minute for each kind of refusal: what an operator has to change to let it pass."""
        host, origin = headers.get("host", ""), headers.get("origin")
        client = scope["client"][0] if scope.get("client") else "unknown"
        if not self._logged.is_new((problem.code, host, origin, client)):
            return
        advice = {
            "wrong_host": "; where a proxy passes this name, give --allow-host",
            "wrong_origin": "; for our page behind a proxy, give --allow-host with its name or let the proxy set "
            "X-Forwarded-Host; for another page, give --cors-origin",
        }.get(problem.code, "")
        logger.warning(
            "refused %s %s of %s: %s (Host %s, Origin %s)%s",
            *(scope["method"], shown(scope["path"]), client, problem.code, shown(host), shown(origin), advice),
        )


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


class Repeats:
    """Remembers what was logged in the last minute, so that refused requests can't fill the disk."""

    def __init__(self, seconds: float = 60.0, most: int = 256) -> None:
        self._seconds = seconds
        self._most = most
        self._seen: dict[object, float] = {}

    def is_new(self, key: object) -> bool:
        """Whether a key was not given for a while."""
        now = time.monotonic()
        if now - self._seen.get(key, -self._seconds) < self._seconds:
            return False
        self._seen.pop(key, None)
        if len(self._seen) >= self._most:
            oldest = next(iter(self._seen))
            if now - self._seen[oldest] < self._seconds:
                return False
            del self._seen[oldest]
        self._seen[key] = now
        return True


def _address(url: str, default_port: int = 0) -> tuple[str, int] | None:
    """Host, in lower case, and port of a URL or of `//host`; None where it has none."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, default_port)
        return (parts.hostname, port) if parts.hostname else None
    except ValueError:  # such as [ without ], or a port beyond 65535
        return None


def _is_local(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
