"""Behind a reverse proxy: the address that the client used, by the headers of a proxy that is trusted."""

import re
from collections.abc import Sequence
from typing import cast

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

LONGEST_PREFIX = 200
PREFIX = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)*")
"""A path without a slash at its end: "" or /sdjax or /tools/sdjax."""
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")


class Forwarded:
    """Put the client's scheme, address, host and path into the scope.

    X-Forwarded-Proto, -For, -Host and -Prefix are read from trusted peers alone. Whether the proxy removes the prefix
    from the path or not makes no difference: after this middleware the path begins with `root_path`, as ASGI wants it.
    `state.sent_host` is the Host header as it came: `Guard` must not believe what a page's script can set.

    Args:
        app: what is served.
        trusted: addresses and networks of proxies, or "*", as in uvicorn's `forwarded_allow_ips`.
        root_path: the prefix where no header names one.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[str], root_path: str = "") -> None:
        self._forwarded = ProxyHeadersMiddleware(app, list(trusted))  # type: ignore[arg-type]
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            self._place(scope)
        await self._forwarded(scope, receive, send)  # type: ignore[arg-type]

    def _place(self, scope: Scope) -> None:
        headers = MutableHeaders(scope=scope)
        scope.setdefault("state", {})["sent_host"] = headers.get("host", "")
        root = self._root_path
        if scope.get("client") and scope["client"][0] in self._forwarded.trusted_hosts:
            host, prefix = (_nearest(headers, f"x-forwarded-{name}") for name in ("host", "prefix"))
            if _HOST.fullmatch(host):
                headers["host"] = host
            prefix = prefix.rstrip("/")
            if prefix and len(prefix) <= LONGEST_PREFIX and PREFIX.fullmatch(prefix):
                root = prefix
        scope["root_path"] = root
        if root and not (scope["path"] == root or scope["path"].startswith(f"{root}/")):
            scope["path"] = root + scope["path"]
            scope["raw_path"] = root.encode() + scope.get("raw_path", b"")


def route_path(scope: Scope) -> str:
    """The path below `root_path`: what routes are chosen by."""
    root = cast(str, scope.get("root_path", ""))
    path = cast(str, scope["path"])
    return path.removeprefix(root) if root and (path == root or path.startswith(f"{root}/")) else path


def _nearest(headers: MutableHeaders, name: str) -> str:
    """What the proxy next to us has set: proxies append their value to what came from before them."""
    return ",".join(headers.getlist(name)).rpartition(",")[2].strip()
