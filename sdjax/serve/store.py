"""What keeps jobs: the narrow interface in which those who submit and read meet the engines that draw.

An engine *leases* a job for a while and renews the lease at every slice of the loop (`tick`). Each lease carries a
fence, a number that grows with every lease of the job: an owner that froze, and whose job was given to another, comes
back with an old fence and is refused, so a job completes exactly once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

State: TypeAlias = Literal["queued", "running", "complete", "error", "cancelled"]
FINAL: frozenset[State] = frozenset({"complete", "error", "cancelled"})

ATTEMPTS = 2
"""Leases that a job may lose to processes that die; a job that takes down two isn't given a third."""
CLOCK_STEP = 5.0
"""Seconds by which a clock may be corrected while leases go on."""
POSITIONS_TOLD = 10
"""So many of the first in the queue hear of each move; a job far behind would fill its story with numbers."""


@dataclass(frozen=True)
class Job:
    """A job as it was accepted, and how far it has come.

    Attributes:
        id: of 32 hexadecimal digits.
        request: the validated request as JSON values, every default filled in, the seed fixed. Pictures in it are
            `{"blob": digest}`, see `Store.blob`.
        bucket: jobs of one bucket may share a batch (same size, guided or not, same adapters).
        owner: who submitted it: a digest of the API key, or "" where none is asked for.
        state: of `State`.
        attempts: leases so far; a job that took a process down too often is not tried again.
        created: seconds since the epoch, likewise `started` and `finished`, None until then.
        images: how many pictures it has.
        timings: seconds by phase, once it is complete.
    """

    id: str
    request: Mapping[str, Any]
    bucket: str
    owner: str
    state: State
    attempts: int
    created: float
    started: float | None
    finished: float | None
    images: int
    timings: Mapping[str, float]


class Lease(NamedTuple):
    """The right to draw a job until `expires` (seconds since the epoch), renewed by `tick`."""

    job: Job
    fence: int
    expires: float


class Event(NamedTuple):
    """One entry of a job's story; `id` counts from 1 within the job, without gaps, and `data` repeats the name as
    `type`, as clients are sent it.
    """

    id: int
    name: str
    data: Mapping[str, Any]


class Tick(NamedTuple):
    """A sign of life for one lease, with the events (name, data) that have happened since the last."""

    job_id: str
    fence: int
    events: Sequence[tuple[str, Mapping[str, Any]]]


class QueueFullError(Exception):
    """The queue holds as many jobs as it may; try again later."""


class Backup(NamedTuple):
    """How much a backup holds, its files being the pictures of requests and results; `missing` ones were gone."""

    jobs: int
    files: int
    missing: int


def is_lost(renewed: float, expires: float, now: float) -> bool:
    """Whether a lease counts no more: it ran out, or it was renewed in a future that only a clock set back explains.

    Args:
        renewed: when its owner gave the last sign of life, in seconds since the epoch.
        expires: until when it was given.
        now: by the clock of whoever asks.
    """
    return now >= expires or renewed > now + CLOCK_STEP


class Store(Protocol):
    """Jobs, their events and pictures. Every method is atomic, durable when it returns, and may be called by any
    thread. A job's story begins with `queued` and ends with exactly one of `complete`, `error` or `cancelled`.

    Every method raises a `StorageError` where what it stands on (a disk, a connection) fails: nothing was changed then,
    and the same call may work later.
    """

    def submit(
        self,
        request: Mapping[str, Any],
        *,
        bucket: str,
        owner: str = "",
        idempotency_key: str | None = None,
        blobs: Mapping[str, bytes] | None = None,
        queue_limit: int | None = None,
        owner_limit: int | None = None,
    ) -> Job:
        """Accept a job, or return the one that this owner's idempotency key was first used for.

        Raises:
            ValueError: a blob's name is not the SHA-256 of its bytes.
            QueueFullError: `queue_limit` jobs wait, or this owner has `owner_limit` that are not final.
        """

    def lease(self, bucket: str | None, count: int, *, owner: str, seconds: float) -> list[Lease]:
        """Take up to `count` jobs, the longest waiting first, of one bucket (None: the bucket of the first).

        Jobs whose lease has run out wait again, at their old place; one that has had its share of attempts ends as
        an error with the code "lost".
        """

    def tick(self, ticks: Sequence[Tick], *, seconds: float) -> frozenset[str]:
        """Append events and renew leases. Returns the jobs that are lost or cancelled: stop drawing them."""

    def finish(self, job_id: str, fence: int, images: Sequence[tuple[str, bytes]], *, data: Mapping[str, Any]) -> bool:
        """Keep a job's pictures (format, bytes) and end it with the event `complete`, whose data is `data`.

        False where the fence is old or the job is final: nothing was written.
        """

    def fail(self, job_id: str, fence: int, code: str, message: str) -> bool:
        """End a job with the event `error`; False as in `finish`."""

    def release(self, job_id: str, fence: int) -> bool:
        """Give a job back unfinished (the process drains); the attempt does not count."""

    def cancel(self, job_id: str) -> Job | None:
        """End a job with the event `cancelled`, unless it is final; None where there is no such job."""

    def events(self, job_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
        """The story after event `after`, no more than `limit` of it: previews are large."""

    def job(self, job_id: str) -> Job | None:
        """One job."""

    def jobs(self, *, before: str | None = None, limit: int = 50, owner: str | None = None) -> list[Job]:
        """Newest first, from the one after `before` on."""

    def image(self, job_id: str, index: int) -> tuple[str, bytes] | None:
        """A picture's format and bytes; None where the job has no such picture.

        Raises:
            PictureLostError: the job has it, but it can't be read any more.
        """

    def blob(self, digest: str) -> bytes:
        """Bytes that came with a request, by their SHA-256.

        Raises:
            KeyError: no job has them.
            PictureLostError: a job has them, but they can't be read any more.
        """

    def position(self, job_id: str) -> int | None:
        """How many queued jobs are before this one, plus one; None when it does not wait."""

    def ahead(self, job_id: str) -> Mapping[str, int]:
        """Steps that queued jobs want up to this one, it among them, of all their pictures together, by bucket."""

    def counts(self) -> Mapping[str, int]:
        """How many jobs there are in each state."""

    def waiting(self) -> Mapping[str, int]:
        """How many jobs wait in each bucket, the bucket of the longest waiting first."""

    def delete(self, job_id: str) -> bool:
        """Forget a final job: its request, its story, its pictures. False where there is no such job, or it is live."""

    def retain(self, *, seconds: float | None, total_bytes: int | None) -> int:
        """Delete the oldest final jobs beyond an age or a size; returns how many."""

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Call `changed(job_id)` after every commit that adds events, from the committing thread; returns what ends it.

        Stores that several processes share may miss changes of others: readers also look from time to time.
        """

    def check(self) -> None:
        """Return where a job could be read and stored now; raise a `StorageError` where it could not."""

    def free_bytes(self) -> int | None:
        """Bytes that are left for pictures; None where nobody knows."""

    def backup(self, folder: Path) -> Backup:
        """Copy jobs and pictures, as they are at one moment, into a folder that a store can be opened in."""

    def close(self) -> None:
        """Let go of files and connections."""
