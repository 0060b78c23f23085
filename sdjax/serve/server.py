"""The process: uvicorn, and a drain before it stops."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from sdjax.errors import SdjaxError
from sdjax.serve.app import drain
from sdjax.serve.connections import protocol
from sdjax.serve.front import Front
from sdjax.serve.settings import Settings

IDLE_SECONDS = 75
"""How long a connection without a request stays open. Clients and proxies keep theirs for 5 to 60 seconds: whoever ends
it first must not be the server, or a request that is on its way gets no answer."""
CLOSING_SECONDS = 5
"""What open connections have for their last bytes, once the jobs are drained."""
SPARE_FILES = 256
"""Open files beside the connections: the store's, the model's, those of child processes."""
TEARDOWN_SECONDS = 10.0
"""After this, beyond all that, the process ends whatever still holds it: a compilation can't be interrupted."""

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """A server whose first signal begins a drain, during which it goes on to answer; a second one stops it at once.

    Args:
        app: what it serves, made by `create_app`.
        told: called when the first signal comes.
    """

    def __init__(self, app: Starlette, told: Callable[[], None] = lambda: None) -> None:
        front: Front = app.state.front
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(front.settings.connections),
                ws="none",
                proxy_headers=False,  # `sdjax.serve.forwarded` reads them, with the host and the prefix
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self._front = front
        self._told = told
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            logger.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn. A terminal that is closed sends SIGHUP, which asks to stop like the others; `nohup` has it
        ignored, and then it stays so.
        """
        hangup = getattr(signal, "SIGHUP", None)  # not on Windows
        with super().capture_signals():
            is_main = threading.current_thread() is threading.main_thread()
            if hangup is None or not is_main or signal.getsignal(hangup) == signal.SIG_IGN:
                yield
                return
            before = signal.signal(hangup, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(hangup, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or stop. The signal isn't raised again afterwards: a process that was asked to stop, and did,
        ends well.
        """
        if self._loop is None or self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._told()
        self._loop.call_soon_threadsafe(self._begin, sig)

    def _begin(self, sig: int) -> None:
        logger.info("%s: draining", signal.Signals(sig).name)
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await drain(self._front)
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


def allow_open_files(count: int) -> None:
    """Raise the process's limit of open files to what so many connections need, as far as the system lets us."""
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return
    wanted = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        logger.warning(
            "the system allows %d open files: with --connections %d some clients may get no answer", most, count
        )


def serve(app: Starlette, settings: Settings, listener: socket.socket) -> None:
    """Answer at a bound socket until a signal says to stop."""

    def watch() -> None:
        # A thread, since nothing else is sure to run by then.
        watchdog = threading.Timer(settings.drain + CLOSING_SECONDS + TEARDOWN_SECONDS, os._exit, (1,))
        watchdog.daemon = True
        watchdog.start()

    allow_open_files(settings.connections)
    DrainingServer(app, watch).run([listener])
