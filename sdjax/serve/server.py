"""The process: uvicorn, and a drain before it stops."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from sdjax.errors import SdjaxError
from sdjax.serve.app import drain
from sdjax.serve.settings import Settings

CLOSING_SECONDS = 5
"""What open connections have for their last bytes, once the jobs are drained."""
TEARDOWN_SECONDS = 10.0
"""After this, beyond all that, the process ends whatever still holds it: a compilation can't be interrupted."""

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """A server whose first signal begins a drain, during which it goes on to answer; a second one stops it at once."""

    def __init__(self, config: uvicorn.Config, drained: Callable[[], Awaitable[None]], seconds: float) -> None:
        super().__init__(config)
        self._drained = drained
        self._seconds = seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or stop. The signal isn't raised again afterwards: a process that was asked to stop, and did,
        ends well.
        """
        self._signals += 1
        if self._signals > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        # A thread, since nothing else is sure to run: the loop itself may hang.
        watchdog = threading.Timer(self._seconds + CLOSING_SECONDS + TEARDOWN_SECONDS, os._exit, (1,))
        watchdog.daemon = True
        watchdog.start()
        self._loop.call_soon_threadsafe(self._begin, sig)

    def _begin(self, sig: int) -> None:
        logger.info("%s: draining", signal.Signals(sig).name)
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self._drained()
        finally:
            self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Take the address before anything is loaded: a port in use is an error at once.

    Raises:
        SdjaxError: it can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        raise SdjaxError(f"can't listen at {host} port {port}: {error.strerror or error}") from error
    return taken


def serve(app: Starlette, settings: Settings, listener: socket.socket) -> None:
    """Answer at a bound socket until a signal says to stop."""
    front = app.state.front
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )

    async def drained() -> None:
        await drain(front)

    DrainingServer(config, drained, settings.drain).run([listener])
