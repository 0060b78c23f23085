"""The way out: jobs, their stories and pictures, with readers woken when something happens.

The store calls back from whatever thread committed; here that becomes a wake-up of the event loop. A wake-up says only
that there may be news: readers look for themselves, and look from time to time without one, so none can be missed.
"""

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ParamSpec, TypeVar

import anyio
from anyio import to_thread

from sdjax.serve.problems import ProblemError, lost_picture, shown
from sdjax.serve.storage import PictureLostError, StorageError, reason
from sdjax.serve.store import FINAL, Event, Job, Store

P = ParamSpec("P")
T = TypeVar("T")

LOOK_EVERY = 1.0
"""Seconds after which a reader looks without being woken: another process may have written to the store."""
CHECK_EVERY = 1.0
"""Seconds between looks at whether the store works."""
READERS = 32
"""Threads that read the store for us at a time."""
AT_ONCE = 16
"""Events that a reader takes from the store at a time, and holds while the client reads them."""
REMEMBERED = 256
LAST_ID = 2**63 - 1

logger = logging.getLogger(__name__)


class JobRegistry:
    """Where jobs are read.

    Args:
        store: keeps them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._changed: set[str] = set()
        self._any = asyncio.Event()
        self._threads: anyio.CapacityLimiter | None = None
        self._end: Callable[[], None] | None = None
        self._checked_at = -CHECK_EVERY
        self._failing: str | None = None
        self.is_closing = False

    def open(self) -> None:
        """Begin to listen to the store, from a running event loop on."""
        loop = asyncio.get_running_loop()
        self._threads = anyio.CapacityLimiter(READERS)

        def changed(job_id: str) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._wake, job_id)

        self._end = self._store.subscribe(changed)

    def close(self) -> None:
        """Stop listening."""
        if self._end is not None:
            self._end()

    def close_streams(self) -> None:
        """End all stories where they are: the process stops."""
        self.is_closing = True
        for job_id in list(self._watchers):
            self._wake(job_id)

    async def job(self, job_id: str, owner: str | None = None) -> Job:
        """One job.

        Args:
            job_id: its id.
            owner: who asks; None may see all.

        Raises:
            ProblemError: there is none that this owner may see (404).
        """
        known = len(job_id) == 32 and job_id.isascii() and job_id.isalnum()
        job = await self._read(self._store.job, job_id) if known else None
        if job is None or (owner is not None and job.owner != owner):
            raise ProblemError(404, "not_found", "there is no such job")
        return job

    async def jobs(self, *, before: str | None, limit: int, owner: str | None = None) -> list[Job]:
        """See `Store.jobs`."""
        return await self._read(lambda: self._store.jobs(before=before, limit=limit, owner=owner))

    async def position(self, job: Job) -> int | None:
        """Where it waits."""
        return await self._read(self._store.position, job.id) if job.state == "queued" else None

    async def ahead(self, job: Job) -> dict[str, int]:
        """See `Store.ahead`."""
        return dict(await self._read(self._store.ahead, job.id))

    async def last_event(self, job: Job) -> Event | None:
        """The newest entry of its story."""
        events = await self._read(self._store.events, job.id)
        return events[-1] if events else None

    async def image(self, job: Job, index: int) -> tuple[str, bytes]:
        """A picture's format and bytes.

        Raises:
            ProblemError: there is none (404), or it was lost (410).
        """
        found = await self._read(self._store.image, job.id, index) if index < job.images else None
        if found is None:
            raise ProblemError(
                404, "not_found", f"the job has {job.images} pictures, and none is number {str(index)[:20]}"
            )
        return found

    async def images(self, job_id: str) -> list[tuple[str, bytes]]:
        """All pictures of a complete job.

        Raises:
            ProblemError: one of them was lost, or the job was deleted (410).
        """

        def read() -> list[tuple[str, bytes]]:
            job = self._store.job(job_id)
            found = [self._store.image(job_id, index) for index in range(job.images if job else 0)]
            pictures = [picture for picture in found if picture is not None]
            if not pictures or len(pictures) < len(found):
                raise PictureLostError("the job was deleted")
            return pictures

        return await self._read(read)

    async def cancel(self, job: Job) -> Job:
        """Cancel it, unless it is final: the job as it is then."""
        return await self._read(self._store.cancel, job.id) or job

    def is_read(self, job: Job) -> bool:
        """Whether anybody listens to its story now."""
        return job.id in self._watchers

    async def delete(self, job: Job) -> bool:
        """Forget it, if it is final."""
        return await self._read(self._store.delete, job.id)

    async def given(self, job: Job, name: str) -> bytes:
        """The bytes of a picture that came with the request, such as its `mask_image`.

        Raises:
            ProblemError: it came with none (404), or it was lost (410).
        """
        kept = job.request.get(name)
        try:
            if isinstance(kept, dict):
                return await self._read(self._store.blob, kept["blob"])
        except KeyError:
            pass  # it was deleted in between
        raise ProblemError(404, "not_found", f"the job came without {shown(name)}")

    async def counts(self) -> dict[str, int]:
        """How many jobs there are in each state."""
        return dict(await self._read(self._store.counts))

    async def place(self, job: Job, last_event_id: str | None) -> int:
        """The event after which a reader goes on. An id that isn't one of this job's is no place in its story, which is
        then told from its beginning.
        """
        if last_event_id is None or not last_event_id.isascii() or not last_event_id.isdigit():
            return 0
        after = int(last_event_id[:19])
        if not 0 < after < LAST_ID:
            return 0
        return after if await self._read(self._store.events, job.id, after - 1, 1) else 0

    async def has_more(self, job: Job, after: int) -> bool:
        """Whether its story goes on after an event."""
        return bool(await self._read(self._store.events, job.id, after, 1))

    async def story(self, job_id: str, after: int = 0) -> AsyncGenerator[Event, None]:
        """The events after `after`, as they come, up to the final one, or until the streams are closed."""
        with self._watching(job_id) as woken:
            while True:
                woken.clear()
                is_last = self.is_closing
                job = await self._read(self._store.job, job_id)
                events = await self._read(self._store.events, job_id, after, AT_ONCE)
                for event in events:
                    yield event
                    after = event.id
                    if event.name in FINAL:
                        return
                if events:
                    continue
                if job is None or job.state in FINAL or is_last:
                    return
                with anyio.move_on_after(LOOK_EVERY):
                    await woken.wait()

    async def finished(self) -> AsyncGenerator[Job, None]:
        """Jobs, each once, when they have come to their end."""
        told: deque[str] = deque(maxlen=REMEMBERED)
        while True:
            await self._any.wait()
            self._any.clear()
            changed, self._changed = self._changed, set()
            for job_id in changed:
                # The last change of a job may be heard after an earlier one that already found it at its end.
                if job_id in told:
                    continue
                job = await self._read(self._store.job, job_id)
                if job is not None and job.state in FINAL:
                    told.append(job_id)
                    yield job
            await anyio.sleep(0.25)  # many slices, one look

    async def storage_failure(self) -> str | None:
        """Why jobs can't be read or stored now, in words for clients; None where they can. It is looked at no more
        often than each second.
        """
        if time.monotonic() - self._checked_at >= CHECK_EVERY:
            self._checked_at = time.monotonic()
            try:
                await self._read(self._store.check)
                failing = None
            except StorageError as error:
                failing = str(error)
                if failing != self._failing:
                    logger.error("not ready: %s", reason(error))
            if failing is None and self._failing is not None:
                logger.info("the store works again")
            self._failing = failing
        return self._failing

    async def free_bytes(self) -> int | None:
        """See `Store.free_bytes`."""
        return await self._read(self._store.free_bytes)

    async def _read(self, function: Callable[P, T], *args: P.args, **_: P.kwargs) -> T:
        try:
            return await to_thread.run_sync(function, *args, limiter=self._threads)
        except PictureLostError as error:
            logger.warning("a picture was lost: %s", error)
            raise lost_picture() from error

    @contextmanager
    def _watching(self, job_id: str) -> Iterator[asyncio.Event]:
        woken = asyncio.Event()
        self._watchers[job_id].add(woken)
        try:
            yield woken
        finally:
            self._watchers[job_id].discard(woken)
            if not self._watchers[job_id]:
                del self._watchers[job_id]

    def _wake(self, job_id: str) -> None:
        self._changed.add(job_id)
        self._any.set()
        for woken in self._watchers.get(job_id, ()):
            woken.set()
