"""The store for one machine: SQLite for what is said about jobs, files for their pictures.

Any number of threads and processes may share the folder; every method is one transaction.
"""

import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdjax.serve.database import Database, Write
from sdjax.serve.files import Files
from sdjax.serve.store import ATTEMPTS, POSITIONS_TOLD, Event, Job, Lease, QueueFullError, Tick

JOB = "SELECT id, request, bucket, owner, state, attempts, created, started, finished, images, timings FROM jobs"
HELD = "id = ? AND fence = ? AND state = 'running'"


class SqliteStore:
    """A `Store` in a folder.

    Args:
        folder: made if it isn't there; `jobs.sqlite3` and `files/` in it are the store's.
        attempts: how many leases a job may have before it ends as an error with the code "lost".

    Raises:
        SdjaxError: the folder was written by another version.
    """

    def __init__(self, folder: str | Path, *, attempts: int = ATTEMPTS) -> None:
        self.folder = Path(folder)
        self.attempts = attempts
        self._files = Files(self.folder / "files")
        self._database = Database(self.folder / "jobs.sqlite3")
        self._delete_orphans(self._files.digests())
        self._files.delete_abandoned()

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
        """See `Store.submit`."""
        for digest, content in (blobs or {}).items():
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"blob {digest!r} is not named by the SHA-256 of its bytes")
        text = _to_json(request)
        with self._files.staged((blobs or {}).values()) as parts, self._database.write() as write:
            if idempotency_key is not None:
                same = (owner, idempotency_key)
                first = write.db.execute(f"{JOB} WHERE owner = ? AND idempotency_key = ?", same).fetchone()
                if first is not None:
                    return _job(first)
            _check_room(write.db, owner, queue_limit, owner_limit)
            job_id = uuid.uuid4().hex
            size = len(text) + sum(part.size for part in parts)
            number = write.db.execute(
                "INSERT INTO jobs (id, request, bucket, owner, idempotency_key, created, size)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (job_id, text, bucket, owner, idempotency_key, time.time(), size),
            ).lastrowid
            write.db.executemany(
                "INSERT INTO blobs (job, digest) VALUES (?, ?)", [(number, part.digest) for part in parts]
            )
            self._files.keep(parts)
            _queued(write, job_id)
            return _job(write.db.execute(f"{JOB} WHERE number = ?", (number,)).fetchone())

    def lease(self, bucket: str | None, count: int, *, owner: str, seconds: float) -> list[Lease]:
        """See `Store.lease`."""
        if count < 1:
            return []
        now = time.time()
        with self._database.write() as write:
            self._requeue_lost(write, now)
            if bucket is None:
                first = write.db.execute("SELECT bucket FROM jobs WHERE state = 'queued' ORDER BY number").fetchone()
                if first is None:
                    return []
                bucket = first[0]
            taken = write.db.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, fence = fence + 1, leased_by = ?,"
                " expires = ?, started = ?, told = NULL WHERE number IN"
                " (SELECT number FROM jobs WHERE state = 'queued' AND bucket = ? ORDER BY number LIMIT ?)"
                " RETURNING number, fence",
                (owner, now + seconds, now, bucket, count),
            ).fetchall()
            leases = [
                Lease(_job(write.db.execute(f"{JOB} WHERE number = ?", (number,)).fetchone()), fence, now + seconds)
                for number, fence in sorted(taken)
            ]
            if leases:
                _tell_positions(write)
        return leases

    def tick(self, ticks: Sequence[Tick], *, seconds: float) -> frozenset[str]:
        """See `Store.tick`."""
        gone = set()
        now = time.time()
        with self._database.write() as write:
            for tick in ticks:
                held = write.db.execute(
                    f"UPDATE jobs SET expires = ? WHERE {HELD}", (now + seconds, tick.job_id, tick.fence)
                )
                if not held.rowcount:
                    gone.add(tick.job_id)
                    continue
                for name, data in tick.events:
                    _append(write, tick.job_id, name, data)
            self._requeue_lost(write, now)
        return frozenset(gone)

    def finish(self, job_id: str, fence: int, images: Sequence[tuple[str, bytes]], *, data: Mapping[str, Any]) -> bool:
        """See `Store.finish`."""
        with self._files.staged(content for _, content in images) as parts, self._database.write() as write:
            if not _end(write, job_id, fence, "complete", data):
                return False
            write.db.executemany(
                "INSERT INTO images (job, number, format, digest) SELECT number, ?, ?, ? FROM jobs WHERE id = ?",
                [(i, images[i][0], part.digest, job_id) for i, part in enumerate(parts)],
            )
            write.db.execute(
                "UPDATE jobs SET images = ?, timings = ?, size = size + ? WHERE id = ?",
                (len(parts), _to_json(data.get("timings", {})), sum(part.size for part in parts), job_id),
            )
            self._files.keep(parts)
        return True

    def fail(self, job_id: str, fence: int, code: str, message: str) -> bool:
        """See `Store.fail`."""
        with self._database.write() as write:
            return _end(write, job_id, fence, "error", {"code": code, "message": message})

    def release(self, job_id: str, fence: int) -> bool:
        """See `Store.release`."""
        with self._database.write() as write:
            held = write.db.execute(f"UPDATE jobs SET attempts = attempts - 1 WHERE {HELD}", (job_id, fence))
            if held.rowcount:
                _queued(write, job_id)
            return bool(held.rowcount)

    def cancel(self, job_id: str) -> Job | None:
        """See `Store.cancel`."""
        with self._database.write() as write:
            ended = write.db.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ? WHERE id = ? AND state IN ('queued', 'running')",
                (time.time(), job_id),
            )
            if ended.rowcount:
                _append(write, job_id, "cancelled", {})
                _tell_positions(write)
        return self.job(job_id)

    def events(self, job_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
        """See `Store.events`."""
        rows = self._database.read(
            "SELECT id, name, data FROM events WHERE job = (SELECT number FROM jobs WHERE id = ?) AND id > ?"
            " ORDER BY id LIMIT ?",
            job_id,
            after,
            -1 if limit is None else limit,
        )
        return [Event(number, name, json.loads(data)) for number, name, data in rows]

    def job(self, job_id: str) -> Job | None:
        """See `Store.job`."""
        return next((_job(row) for row in self._database.read(f"{JOB} WHERE id = ?", job_id)), None)

    def jobs(self, *, before: str | None = None, limit: int = 50, owner: str | None = None) -> list[Job]:
        """See `Store.jobs`."""
        conditions: list[tuple[str, str]] = []
        if before is not None:
            conditions.append(("number < (SELECT number FROM jobs WHERE id = ?)", before))
        if owner is not None:
            conditions.append(("owner = ?", owner))
        where = " AND ".join(condition for condition, _ in conditions) or "TRUE"
        values = [value for _, value in conditions]
        return [
            _job(row)
            for row in self._database.read(f"{JOB} WHERE {where} ORDER BY number DESC LIMIT ?", *values, max(0, limit))
        ]

    def image(self, job_id: str, index: int) -> tuple[str, bytes] | None:
        """See `Store.image`."""
        rows = self._database.read(
            "SELECT format, digest FROM images WHERE job = (SELECT number FROM jobs WHERE id = ?) AND number = ?",
            job_id,
            index,
        )
        with suppress(FileNotFoundError):  # retention took it in between
            return next(((image_format, self._files.read(digest)) for image_format, digest in rows), None)
        return None

    def blob(self, digest: str) -> bytes:
        """See `Store.blob`."""
        try:
            if self._database.read("SELECT 1 FROM blobs WHERE digest = ? LIMIT 1", digest):
                return self._files.read(digest)
        except FileNotFoundError:
            pass
        raise KeyError(digest)

    def position(self, job_id: str) -> int | None:
        """See `Store.position`."""
        found = self._database.read(
            "SELECT (SELECT count(*) FROM jobs WHERE state = 'queued' AND number <= this.number)"
            " FROM jobs AS this WHERE id = ? AND state = 'queued'",
            job_id,
        )
        return found[0][0] if found else None

    def ahead(self, job_id: str) -> Mapping[str, int]:
        """See `Store.ahead`."""
        wanted = "coalesce(json_extract(request, '$.steps'), 0) * coalesce(json_extract(request, '$.num_images'), 1)"
        return dict(
            self._database.read(
                f"SELECT bucket, sum({wanted}) FROM jobs WHERE state = 'queued' AND number <="
                " (SELECT number FROM jobs WHERE id = ?) GROUP BY bucket",
                job_id,
            )
        )

    def counts(self) -> Mapping[str, int]:
        """See `Store.counts`."""
        found = dict(self._database.read("SELECT state, count(*) FROM jobs GROUP BY state"))
        return {state: found.get(state, 0) for state in ("queued", "running", "complete", "error", "cancelled")}

    def waiting(self) -> Mapping[str, int]:
        """See `Store.waiting`."""
        return dict(
            self._database.read(
                "SELECT bucket, count(*) FROM jobs WHERE state = 'queued' GROUP BY bucket ORDER BY min(number)"
            )
        )

    def delete(self, job_id: str) -> bool:
        """See `Store.delete`."""
        with self._database.write() as write:
            found = write.db.execute("SELECT number FROM jobs WHERE id = ? AND finished IS NOT NULL", (job_id,))
            numbers = [number for (number,) in found]
            digests = _forget(write, numbers)
        self._delete_orphans(digests)
        return bool(numbers)

    def retain(self, *, seconds: float | None, total_bytes: int | None) -> int:
        """See `Store.retain`. Bytes are those of requests, events and pictures; equal pictures count each time."""
        with self._database.write() as write:
            doomed: set[int] = set()
            final = write.db.execute(
                "SELECT number, finished, size FROM jobs WHERE finished IS NOT NULL ORDER BY finished, number"
            ).fetchall()
            excess = 0
            if total_bytes is not None:
                excess = write.db.execute("SELECT coalesce(sum(size), 0) FROM jobs").fetchone()[0] - total_bytes
            oldest = None if seconds is None else time.time() - seconds
            for number, finished, size in final:
                if excess <= 0 and (oldest is None or finished > oldest):
                    break
                doomed.add(number)
                excess -= size
            digests = _forget(write, doomed)
        if doomed:
            self._delete_orphans(digests)
            self._database.shrink()
        return len(doomed)

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """See `Store.subscribe`."""
        return self._database.subscribe(changed)

    def close(self) -> None:
        """See `Store.close`."""
        self._database.close()

    def _requeue_lost(self, write: Write, now: float) -> None:
        """Let jobs whose lease ran out wait again, or end those that had all their attempts."""
        # Ordered by a sum, or SQLite would read all jobs there are, in their order, instead of those that run.
        lost = write.db.execute(
            "SELECT id, fence, attempts FROM jobs WHERE state = 'running' AND expires <= ? ORDER BY number + 0", (now,)
        ).fetchall()
        for job_id, fence, attempts in lost:
            if attempts < self.attempts:
                _queued(write, job_id)
            else:
                message = f"the process that drew it ended without a word, {attempts} times: it isn't tried again"
                _end(write, job_id, fence, "error", {"code": "lost", "message": message})

    def _delete_orphans(self, digests: Iterable[str]) -> None:
        """Remove files that no job has. The write lock keeps others from giving one of them to a new job meanwhile."""
        with self._database.write() as write:
            for digest in digests:
                used = write.db.execute(
                    "SELECT 1 FROM images WHERE digest = ?1 UNION ALL SELECT 1 FROM blobs WHERE digest = ?1 LIMIT 1",
                    (digest,),
                ).fetchone()
                if used is None:
                    self._files.delete(digest)


def _check_room(db: sqlite3.Connection, owner: str, queue_limit: int | None, owner_limit: int | None) -> None:
    if queue_limit is not None:
        (queued,) = db.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()
        if queued >= queue_limit:
            raise QueueFullError(f"{queued} jobs wait, and no more than {queue_limit} may")
    if owner_limit is not None:
        (live,) = db.execute(
            "SELECT count(*) FROM jobs WHERE owner = ? AND state IN ('queued', 'running')", (owner,)
        ).fetchone()
        if live >= owner_limit:
            raise QueueFullError(f"you have {live} jobs that are not done, and no more than {owner_limit} may be")


def _append(write: Write, job_id: str, name: str, data: Mapping[str, Any]) -> None:
    text = _to_json({"type": name, **data})
    write.db.execute(
        "INSERT INTO events (job, id, name, data) SELECT number,"
        " (SELECT coalesce(max(id), 0) + 1 FROM events WHERE job = jobs.number), ?, ? FROM jobs WHERE id = ?",
        (name, text, job_id),
    )
    write.db.execute("UPDATE jobs SET size = size + ? WHERE id = ?", (len(text), job_id))
    write.changed.append(job_id)


def _queued(write: Write, job_id: str) -> None:
    """Put a job where it stands in the queue, by the order of submission, and say where that is."""
    (position,) = write.db.execute(
        "UPDATE jobs SET state = 'queued', leased_by = NULL, expires = NULL, started = NULL, told ="
        " (SELECT count(*) FROM jobs AS other WHERE (other.state = 'queued' AND other.number < jobs.number)) + 1"
        " WHERE id = ? RETURNING told",
        (job_id,),
    ).fetchone()
    _append(write, job_id, "queued", {"position": position})


def _tell_positions(write: Write) -> None:
    """Tell the first in the queue where they are now, if that isn't what they were told last."""
    first = write.db.execute(
        "SELECT number, id, told FROM jobs WHERE state = 'queued' ORDER BY number LIMIT ?", (POSITIONS_TOLD,)
    ).fetchall()
    for position, (number, job_id, told) in enumerate(first, 1):
        if told != position:
            write.db.execute("UPDATE jobs SET told = ? WHERE number = ?", (position, number))
            _append(write, job_id, "queued", {"position": position})


def _end(write: Write, job_id: str, fence: int, state: str, data: Mapping[str, Any]) -> bool:
    ended = write.db.execute(
        f"UPDATE jobs SET state = ?, finished = ? WHERE {HELD}", (state, time.time(), job_id, fence)
    )
    if ended.rowcount:
        _append(write, job_id, state, data)
    return bool(ended.rowcount)


def _forget(write: Write, numbers: Iterable[int]) -> frozenset[str]:
    """Delete jobs, and give the files that they had."""
    values = [(number,) for number in numbers]
    digests = frozenset(
        digest
        for number in values
        for (digest,) in write.db.execute(
            "SELECT digest FROM images WHERE job = ?1 UNION SELECT digest FROM blobs WHERE job = ?1", number
        )
    )
    write.db.executemany("DELETE FROM jobs WHERE number = ?", values)
    return digests


def _job(row: Any) -> Job:
    job_id, request, bucket, owner, state, attempts, created, started, finished, images, timings = row
    return Job(
        job_id,
        json.loads(request),
        bucket,
        owner,
        state,
        attempts,
        created,
        started,
        finished,
        images,
        json.loads(timings),
    )


def _to_json(value: object) -> str:
    """Strict JSON: NaN and infinity are no numbers there, and browsers refuse them. In ASCII, half a surrogate pair
    can be stored too."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
