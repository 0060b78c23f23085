"""The store for one machine: SQLite for what is said about jobs, files for their pictures.

Any number of threads and processes may share the folder; every method is one transaction.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.errors import SdjaxError
from sdjax.serve import upkeep
from sdjax.serve.database import Database, Write
from sdjax.serve.files import Files, make_private
from sdjax.serve.storage import PictureLostError, StorageError, reason, storage_errors
from sdjax.serve.store import ATTEMPTS, Backup, Event, Job, Lease, Tick, is_lost
from sdjax.serve.stories import (
    COLUMNS,
    HELD,
    append_event,
    check_room,
    end_job,
    job_of,
    put_in_queue,
    tell_positions,
    to_json,
)

JOB = f"SELECT {COLUMNS} FROM jobs"


class SqliteStore:
    """A `Store` in a folder.

    Args:
        folder: made if it isn't there; `jobs.sqlite3`, `files/` and `orphans/` in it are the store's, and for its user
            alone.
        attempts: how many leases a job may have before it ends as an error with the code "lost".

    Raises:
        SdjaxError: the folder can't be used, its database is damaged, or another version wrote it.
    """

    def __init__(self, folder: str | Path, *, attempts: int = ATTEMPTS) -> None:
        self.folder = Path(folder)
        self.attempts = attempts
        try:
            if not self.folder.exists():
                with storage_errors():
                    make_private(self.folder)
            self._files = Files(self.folder / "files", self.folder / "orphans")
            self._database = Database(self.folder / "jobs.sqlite3")
            upkeep.reconcile(self._database, self._files)
            self._files.delete_abandoned()
        except StorageError as error:
            what = "put back a backup of it, or move it away" if error.kind == "damaged" else "see --data-dir"
            raise SdjaxError(f"the data folder {str(self.folder)!r} can't be used: {reason(error)}: {what}") from error

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
        text = to_json(request)
        with self._files.staged((blobs or {}).values()) as parts, self._database.write() as write:
            if idempotency_key is not None:
                same = (owner, idempotency_key)
                first = write.db.execute(f"{JOB} WHERE owner = ? AND idempotency_key = ?", same).fetchone()
                if first is not None:
                    return job_of(first)
            check_room(write.db, owner, queue_limit, owner_limit)
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
            put_in_queue(write, job_id)
            return job_of(write.db.execute(f"{JOB} WHERE number = ?", (number,)).fetchone())

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
                " renewed = ?, expires = ?, started = ?, told = NULL WHERE number IN"
                " (SELECT number FROM jobs WHERE state = 'queued' AND bucket = ? ORDER BY number LIMIT ?)"
                " RETURNING number, fence",
                (owner, now, now + seconds, now, bucket, count),
            ).fetchall()
            leases = [
                Lease(job_of(write.db.execute(f"{JOB} WHERE number = ?", (number,)).fetchone()), fence, now + seconds)
                for number, fence in sorted(taken)
            ]
            if leases:
                tell_positions(write)
        return leases

    def tick(self, ticks: Sequence[Tick], *, seconds: float) -> frozenset[str]:
        """See `Store.tick`."""
        gone = set()
        now = time.time()
        with self._database.write() as write:
            for tick in ticks:
                held = write.db.execute(
                    f"UPDATE jobs SET renewed = ?, expires = ? WHERE {HELD}",
                    (now, now + seconds, tick.job_id, tick.fence),
                )
                if not held.rowcount:
                    gone.add(tick.job_id)
                    continue
                for name, data in tick.events:
                    append_event(write, tick.job_id, name, data)
            self._requeue_lost(write, now)
        return frozenset(gone)

    def finish(self, job_id: str, fence: int, images: Sequence[tuple[str, bytes]], *, data: Mapping[str, Any]) -> bool:
        """See `Store.finish`."""
        with self._files.staged(content for _, content in images) as parts, self._database.write() as write:
            if not end_job(write, job_id, fence, "complete", data):
                return False
            write.db.executemany(
                "INSERT INTO images (job, number, format, digest) SELECT number, ?, ?, ? FROM jobs WHERE id = ?",
                [(i, images[i][0], part.digest, job_id) for i, part in enumerate(parts)],
            )
            write.db.execute(
                "UPDATE jobs SET images = ?, timings = ?, size = size + ? WHERE id = ?",
                (len(parts), to_json(data.get("timings", {})), sum(part.size for part in parts), job_id),
            )
            self._files.keep(parts)
        return True

    def fail(self, job_id: str, fence: int, code: str, message: str) -> bool:
        """See `Store.fail`."""
        with self._database.write() as write:
            return end_job(write, job_id, fence, "error", {"code": code, "message": message})

    def release(self, job_id: str, fence: int) -> bool:
        """See `Store.release`."""
        with self._database.write() as write:
            held = write.db.execute(f"UPDATE jobs SET attempts = attempts - 1 WHERE {HELD}", (job_id, fence))
            if held.rowcount:
                put_in_queue(write, job_id)
            return bool(held.rowcount)

    def cancel(self, job_id: str) -> Job | None:
        """See `Store.cancel`."""
        with self._database.write() as write:
            ended = write.db.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ? WHERE id = ? AND state IN ('queued', 'running')",
                (time.time(), job_id),
            )
            if ended.rowcount:
                append_event(write, job_id, "cancelled", {})
                tell_positions(write)
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
        return next((job_of(row) for row in self._database.read(f"{JOB} WHERE id = ?", job_id)), None)

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
            job_of(row)
            for row in self._database.read(f"{JOB} WHERE {where} ORDER BY number DESC LIMIT ?", *values, max(0, limit))
        ]

    def image(self, job_id: str, index: int) -> tuple[str, bytes] | None:
        """See `Store.image`."""
        query = "SELECT format, digest FROM images WHERE job = (SELECT number FROM jobs WHERE id = ?) AND number = ?"
        for kind, digest in self._database.read(query, job_id, index):
            try:
                return kind, self._files.read(digest)
            except PictureLostError:
                if self._database.read(query, job_id, index):
                    raise
                # Its job was deleted in between.
        return None

    def blob(self, digest: str) -> bytes:
        """See `Store.blob`."""
        query = "SELECT 1 FROM blobs WHERE digest = ? LIMIT 1"
        if self._database.read(query, digest):
            try:
                return self._files.read(digest)
            except PictureLostError:
                if self._database.read(query, digest):
                    raise
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
        return upkeep.delete(self._database, self._files, job_id)

    def retain(self, *, seconds: float | None, total_bytes: int | None) -> int:
        """See `Store.retain`. Bytes are those of requests, events and pictures; equal pictures count each time."""
        return upkeep.retain(self._database, self._files, seconds, total_bytes)

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """See `Store.subscribe`."""
        return self._database.subscribe(changed)

    def check(self) -> None:
        """See `Store.check`."""
        self._files.probe()
        self._database.check()

    def free_bytes(self) -> int | None:
        """See `Store.free_bytes`."""
        return self._files.free_bytes()

    def backup(self, folder: Path) -> Backup:
        """See `Store.backup`."""
        return upkeep.backup(self._database, self._files, folder)

    def close(self) -> None:
        """See `Store.close`."""
        self._database.close()

    def _requeue_lost(self, write: Write, now: float) -> None:
        """Let jobs whose lease ran out wait again, or end those that had all their attempts."""
        # Ordered by a sum, or SQLite would read all jobs there are, in their order, instead of those that run.
        running = write.db.execute(
            "SELECT id, fence, attempts, renewed, expires FROM jobs WHERE state = 'running' ORDER BY number + 0"
        ).fetchall()
        for job_id, fence, attempts, renewed, expires in running:
            if not is_lost(renewed, expires, now):
                continue
            if attempts < self.attempts:
                put_in_queue(write, job_id)
            else:
                message = f"the process that drew it ended without a word, {attempts} times: it isn't tried again"
                end_job(write, job_id, fence, "error", {"code": "lost", "message": message})
