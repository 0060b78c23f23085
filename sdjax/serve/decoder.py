"""Pictures from strangers are decoded in processes that can be killed, so that none holds up a server for long.

Decoders take seconds or minutes for files that were made for that. A picture has a short while at normal priority; then
it goes on at a low one and makes room for the next, and in the end its process is killed. So ordinary pictures wait for
each other alone.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from sdjax.serve.pictures import ORIENTATION, Limits, PictureError
from sdjax.serve.problems import ProblemError

QUICK = 0.25
"""Seconds of processor time that a picture has at normal priority."""
SLOW = 30.0
"""Seconds that it has after that; its processor time has a limit too, see `sdjax.serve.decoder_process`."""
LOOK_EVERY = 0.05
QUICK_AT_ONCE, SLOW_AT_ONCE = 4, 4
NICENESS = 10
STARTS_WITHIN = 30.0
LONGEST_HEAD = 1 << 16
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sdjax.serve.decoder_process import main; main()"


class Decoder:
    """Decodes pictures in child processes, for one event loop."""

    def __init__(self) -> None:
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._quick = asyncio.Semaphore(QUICK_AT_ONCE)
        self._slow = 0
        self._is_closed = False

    async def start(self) -> None:
        """Start a process before the first picture needs one."""
        self._give(await self._take())

    async def read(self, data: bytes, limits: Limits = Limits()) -> Image.Image:  # noqa: B008 (immutable)
        """Decode a PNG, JPEG or WebP file whole; see `sdjax.serve.pictures.read_picture`.

        Raises:
            PictureError: it is something else, broken, beyond the limits, or takes too long.
            ProblemError: too many slow pictures are being decoded, or the server stops (503).
        """
        child = await self._take()
        asked = asyncio.create_task(child.ask(data, limits))
        try:
            await _quickly(child, asked)
            if not asked.done():
                self._demote(child)
                await asyncio.wait([asked], timeout=SLOW)
            if not asked.done():
                raise PictureError(TOO_LONG)
            return asked.result()
        except _LostError:
            if self._is_closed:
                raise ProblemError(503, "draining", "the server stops", headers={"Retry-After": "30"}) from None
            raise PictureError(TOO_LONG) from None
        finally:
            asked.cancel()
            self._give(child)

    async def close(self) -> None:
        """Kill all processes, whatever they are doing."""
        self._is_closed = True
        for child in list(self._all):
            self._drop(child)
        self._idle.clear()
        await asyncio.gather(*self._ending)

    async def _take(self) -> "_Child":
        """A process that waits for a picture, and the place of one that is quick."""
        await self._quick.acquire()
        try:
            while self._idle:
                child = self._idle.pop()
                if child.is_free:
                    return child
                self._drop(child)
            if self._is_closed:
                raise ProblemError(503, "draining", "the server stops", headers={"Retry-After": "30"})
            child = await _start()
        except BaseException:
            self._quick.release()
            raise
        self._all.add(child)
        return child

    def _demote(self, child: "_Child") -> None:
        if self._slow >= SLOW_AT_ONCE:
            message = "too many pictures that take long are being decoded"
            raise ProblemError(503, "busy", message, headers={"Retry-After": "10"})
        self._slow += 1
        child.is_slow = True
        with suppress(OSError, AttributeError):  # it has just ended; there are no priorities on Windows
            os.setpriority(os.PRIO_PROCESS, child.process.pid, NICENESS)
        self._quick.release()

    def _give(self, child: "_Child") -> None:
        """Take back a process and its place. One that was slow keeps its low priority, and so is of no more use."""
        if child.is_slow:
            self._slow -= 1
        else:
            self._quick.release()
        if child.is_free and not child.is_slow and not self._is_closed:
            self._idle.append(child)
        else:
            self._drop(child)

    def _drop(self, child: "_Child") -> None:
        if child in self._all:
            self._all.discard(child)
            ending = asyncio.create_task(child.end())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


class _LostError(Exception):
    """The process ended, or answered what it never should."""


class _Child:
    """A process of `sdjax.serve.decoder_process`.

    Attributes:
        is_slow: it was given a low priority.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.is_slow = False
        self._is_asked = False

    @property
    def is_free(self) -> bool:
        """Whether it lives and waits for a picture."""
        return self.process.returncode is None and not self._is_asked

    async def ask(self, data: bytes, limits: Limits) -> Image.Image:
        """Have a picture decoded.

        Raises:
            PictureError: the process refused it.
            _LostError: the process has ended.
        """
        try:
            return await self._ask(data, limits)
        except PictureError:
            raise
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError, KeyError, TypeError) as error:
            raise _LostError from error

    async def _ask(self, data: bytes, limits: Limits) -> Image.Image:
        self._is_asked = True
        reader, writer = self.process.stdout, self.process.stdin
        assert reader is not None
        assert writer is not None
        writer.write(json.dumps({"bytes": len(data), "limits": limits._asdict()}).encode() + b"\n")
        writer.write(data)
        await writer.drain()
        head = json.loads(await reader.readuntil(b"\n"))
        if "error" in head:
            self._is_asked = False
            raise PictureError(str(head["error"]))
        pixels = await reader.readexactly(min(int(head["bytes"]), 8 * limits.pixels))
        self._is_asked = False
        return await asyncio.to_thread(rebuilt, head, pixels)

    async def end(self) -> None:
        """Kill it, and wait until it and its pipes are gone."""
        with suppress(ProcessLookupError):
            self.process.kill()
        reader, writer = self.process.stdout, self.process.stdin
        assert reader is not None
        assert writer is not None
        writer.close()
        with suppress(OSError, RuntimeError):  # who has asked may be reading still
            while await reader.read(1 << 20):
                pass
        await self.process.wait()


async def _quickly(child: _Child, asked: "asyncio.Task[Image.Image]") -> None:
    """Wait until a picture is decoded or has had its short while; on a busy machine that lasts longer."""
    began = time.monotonic()
    spent = _processor_seconds(child)
    while not asked.done() and time.monotonic() - began < SLOW:
        await asyncio.wait([asked], timeout=LOOK_EVERY)
        now = _processor_seconds(child)
        used = time.monotonic() - began if now is None or spent is None else now - spent
        if used >= QUICK:
            return


def _processor_seconds(child: _Child) -> float | None:
    """What a process has spent so far; None where the system doesn't show it."""
    try:
        fields = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


async def _start() -> _Child:
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _START, json.dumps(sys.path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LONGEST_HEAD,
            start_new_session=True,  # Ctrl-C in a terminal is for the server, which drains first
        )
        assert process.stdout is not None
        async with asyncio.timeout(STARTS_WITHIN):
            await process.stdout.readuntil(b"\n")
    except (OSError, EOFError, TimeoutError) as error:
        raise ProblemError(503, "busy", f"no process can be started: {error}", headers={"Retry-After": "10"}) from error
    return _Child(process)


def rebuilt(head: Mapping[str, Any], pixels: bytes) -> Image.Image:
    """The picture that `sdjax.serve.decoder_process.described` describes."""
    picture = Image.frombytes(head["mode"], tuple(head["size"]), pixels)
    picture.format = head["format"]
    if head["palette"] is not None:
        mode, colors = head["palette"]
        picture.putpalette(bytes(colors), mode)
    transparency = head["transparency"]
    if transparency is not None:
        is_list = isinstance(transparency, list)
        kind: Any = bytes if head["is_bytes"] else tuple
        picture.info["transparency"] = kind(transparency) if is_list else transparency
    if head["orientation"] is not None:
        picture.getexif()[ORIENTATION] = head["orientation"]
    return picture


TOO_LONG = "it takes too long to decode"
