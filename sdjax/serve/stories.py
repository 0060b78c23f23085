"""What is written of a job inside an open transaction: its events, its place in the queue, its end."""

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sdjax.serve.database import Write
from sdjax.serve.store import POSITIONS_TOLD, Job, QueueFullError

COLUMNS = "id, request, bucket, owner, state, attempts, created, started, finished, images, timings"
HELD = "id = ? AND fence = ? AND state = 'running'"


def check_room(db: sqlite3.Connection, owner: str, queue_limit: int | None, owner_limit: int | None) -> None:
    """Raise a QueueFullError where no more jobs may wait, or this owner may have no more; see `Store.submit`."""
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


def append_event(write: Write, job_id: str, name: str, data: Mapping[str, Any]) -> None:
    """Add an event to a job's story."""
    text = to_json({"type": name, **data})
    write.db.execute(
        "INSERT INTO events (job, id, name, data) SELECT number,"
        " (SELECT coalesce(max(id), 0) + 1 FROM events WHERE job = jobs.number), ?, ? FROM jobs WHERE id = ?",
        (name, text, job_id),
    )
    write.db.execute("UPDATE jobs SET size = size + ? WHERE id = ?", (len(text), job_id))
    write.changed.append(job_id)


def put_in_queue(write: Write, job_id: str) -> None:
    """Put a job where it stands in the queue, by the order of submission, and say where that is."""
    (position,) = write.db.execute(
        "UPDATE jobs SET state = 'queued', leased_by = NULL, expires = NULL, started = NULL, told ="
        " (SELECT count(*) FROM jobs AS other WHERE (other.state = 'queued' AND other.number < jobs.number)) + 1"
        " WHERE id = ? RETURNING told",
        (job_id,),
    ).fetchone()
    append_event(write, job_id, "queued", {"position": position})


def tell_positions(write: Write) -> None:
    """Tell the first in the queue where they are now, if that isn't what they were told last."""
    first = write.db.execute(
        "SELECT number, id, told FROM jobs WHERE state = 'queued' ORDER BY number LIMIT ?", (POSITIONS_TOLD,)
    ).fetchall()
    for position, (number, job_id, told) in enumerate(first, 1):
        if told != position:
            write.db.execute("UPDATE jobs SET told = ? WHERE number = ?", (position, number))
            append_event(write, job_id, "queued", {"position": position})


def end_job(write: Write, job_id: str, fence: int, state: str, data: Mapping[str, Any]) -> bool:
    """End a leased job with an event; False where the fence is old or the job is final."""
    ended = write.db.execute(
        f"UPDATE jobs SET state = ?, finished = ? WHERE {HELD}", (state, time.time(), job_id, fence)
    )
    if ended.rowcount:
        append_event(write, job_id, state, data)
    return bool(ended.rowcount)


def forget_jobs(write: Write, numbers: Iterable[int]) -> frozenset[str]:
    """Delete jobs, and give the files that they had."""
    doomed = list(numbers)
    digests = frozenset(
        digest
        for number in doomed
        for (digest,) in write.db.execute(
            "SELECT digest FROM images WHERE job = :it UNION SELECT digest FROM blobs WHERE job = :it", {"it": number}
        )
    )
    write.db.executemany("DELETE FROM jobs WHERE number = ?", [(number,) for number in doomed])
    return digests


def job_of(row: Any) -> Job:
    """A row of `COLUMNS` as a job."""
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


def to_json(value: object) -> str:
    """Strict JSON: NaN and infinity are no numbers there, and browsers refuse them. In ASCII, half a surrogate pair
    can be stored too."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
