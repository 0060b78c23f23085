"""Keep the files of a store and what its database says of them together, also after accidents; nothing is lost by it.

A file that no job has is deleted only when its job was deleted just now. One that is found so may belong to jobs that
the database has lost (its log was removed, or an old copy was put in its place): it is set aside, and brought back as
soon as the database names it again.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdjax.errors import SdjaxError
from sdjax.serve.database import Database, Write
from sdjax.serve.files import Files, make_private
from sdjax.serve.storage import PictureLostError, storage_errors
from sdjax.serve.store import Backup
from sdjax.serve.stories import forget_jobs

NAMED = "SELECT digest FROM images UNION SELECT digest FROM blobs"

logger = logging.getLogger(__name__)


def reconcile(database: Database, files: Files) -> None:
    """Set files aside that no job has, bring those back that a job has, and log how many there are of each, and gone.

    The database may be large, and other processes may be at work: it is locked only for what looks wrong.
    """
    found = set(files.digests())
    named = {digest for (digest,) in database.read(NAMED)}
    aside = back = gone = 0
    if found - named:
        with database.write() as write:
            for digest in found - named:
                if not _is_named(write, digest):
                    files.set_aside(digest)
                    aside += 1
    if named - found:
        with database.write() as write:
            for digest in named - found:
                if not _is_named(write, digest):
                    continue
                if files.bring_back(digest):
                    back += 1
                elif not files.has(digest):
                    gone += 1
    if aside:
        logger.warning(
            "%d files that no job in %r has were set aside in %r: they come back when the database that has their jobs "
            "does, and may be deleted otherwise",
            aside,
            str(database.path),
            str(files.orphans),
        )
    if back:
        logger.warning("%d files that had been set aside were brought back", back)
    if gone:
        logger.warning("%d files that jobs in %r have are gone", gone, str(database.path))


def delete(database: Database, files: Files, job_id: str) -> bool:
    """Forget a job that has ended; see `Store.delete`."""
    with database.write() as write:
        found = write.db.execute("SELECT number FROM jobs WHERE id = ? AND finished IS NOT NULL", (job_id,))
        numbers = [number for (number,) in found]
        digests = forget_jobs(write, numbers)
    _delete_unused(database, files, digests)
    return bool(numbers)


def retain(database: Database, files: Files, seconds: float | None, total_bytes: int | None) -> int:
    """Forget the oldest jobs that have ended; see `Store.retain`."""
    with database.write() as write:
        final = write.db.execute(
            "SELECT number, finished, size FROM jobs WHERE finished IS NOT NULL ORDER BY finished, number"
        ).fetchall()
        (total,) = write.db.execute("SELECT coalesce(sum(size), 0) FROM jobs").fetchone()
        oldest = None if seconds is None else time.time() - seconds
        doomed = beyond(final, total, oldest=oldest, total_bytes=total_bytes)
        digests = forget_jobs(write, doomed)
    if doomed:
        _delete_unused(database, files, digests)
        database.shrink()
    return len(doomed)


def beyond(
    final: Sequence[tuple[int, float, int]], total: int, *, oldest: float | None, total_bytes: int | None
) -> list[int]:
    """The jobs that an age and a size leave no room for, by number.

    Args:
        final: number, end and bytes of the jobs that have ended, the oldest first.
        total: bytes of all jobs.
        oldest: jobs that ended before that are too old; in seconds since the epoch.
        total_bytes: that may stay.
    """
    doomed: list[int] = []
    excess = 0 if total_bytes is None else total - total_bytes
    for number, finished, size in final:
        if excess <= 0 and (oldest is None or finished > oldest):
            break
        doomed.append(number)
        excess -= size
    return doomed


def backup(database: Database, files: Files, folder: Path) -> Backup:
    """Copy one moment of the database, and the files that it names, into a folder; see `Store.backup`.

    Files that are there already stay. The database comes last, so that a backup that was interrupted is still the one
    before.

    Raises:
        SdjaxError: the folder is the store's own.
    """
    if folder.resolve() == database.path.parent.resolve():
        raise SdjaxError(f"a backup must go to another folder than {str(folder)!r}, which is the data folder")
    with storage_errors():
        make_private(folder)
    kept = Files(folder / "files", folder / "orphans")
    missing = 0
    with database.copied(folder / "jobs.sqlite3") as db:
        (jobs,) = db.execute("SELECT count(*) FROM jobs").fetchone()
        digests = [digest for (digest,) in db.execute(NAMED)]
        for digest in digests:
            if kept.has(digest):
                continue
            try:
                content = files.read(digest)
            except PictureLostError:
                missing += 1
                continue
            with kept.staged([content]) as parts:
                kept.keep(parts)
    return Backup(jobs, len(digests) - missing, missing)


def _is_named(write: Write, digest: str) -> bool:
    query = "SELECT 1 FROM images WHERE digest = :it UNION ALL SELECT 1 FROM blobs WHERE digest = :it LIMIT 1"
    return write.db.execute(query, {"it": digest}).fetchone() is not None


def _delete_unused(database: Database, files: Files, digests: Iterable[str]) -> None:
    """Delete the files of jobs that were deleted, unless another job has them too.

    The write lock keeps others from giving one of them to a new job meanwhile.
    """
    with database.write() as write:
        for digest in digests:
            if not _is_named(write, digest):
                files.delete(digest)
