"""The SQLite file behind the store: its tables, its connections, its transactions.

A write is one transaction that takes the database's write lock at its start; readers see the last commit and never
wait. The log is forced to the disk at every commit (`synchronous=FULL`): a killed process would lose nothing without
it, since what it wrote is the system's by then, but a power cut would take back answers that were given, and an fsync
costs little beside a slice of the loop.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.errors import SdjaxError

BUSY_SECONDS = 60.0
"""How long a write waits for another process's."""
VERSION = 1

SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    request TEXT NOT NULL,
    bucket TEXT NOT NULL,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    state TEXT NOT NULL DEFAULT 'queued',
    attempts INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    leased_by TEXT,
    expires REAL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    images INTEGER NOT NULL DEFAULT 0,
    timings TEXT NOT NULL DEFAULT '{}',
    told INTEGER,
    size INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_queued ON jobs (number) WHERE state = 'queued';
CREATE INDEX jobs_running ON jobs (expires) WHERE state = 'running';
CREATE INDEX jobs_live ON jobs (owner) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_finished ON jobs (finished) WHERE finished IS NOT NULL;
CREATE INDEX jobs_by_owner ON jobs (owner, number);
CREATE TABLE events (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    id INTEGER NOT NULL,
    name TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, id)
) WITHOUT ROWID;
CREATE TABLE images (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    number INTEGER NOT NULL,
    format TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (job, number)
) WITHOUT ROWID;
CREATE INDEX images_by_digest ON images (digest);
CREATE TABLE blobs (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    digest TEXT NOT NULL,
    PRIMARY KEY (job, digest)
) WITHOUT ROWID;
CREATE INDEX blobs_by_digest ON blobs (digest);
"""

logger = logging.getLogger(__name__)


class Write(NamedTuple):
    """An open transaction, and the jobs whose story it goes on with."""

    db: sqlite3.Connection
    changed: list[str]


class Database:
    """Connections to one file, which any number of threads and processes share.

    Raises:
        SdjaxError: another version wrote the file, or it was closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = threading.Lock()
        self._guard = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self._closed = False
        self._create()

    @contextmanager
    def write(self) -> Iterator[Write]:
        """One transaction; when it is committed, the listeners hear which jobs' stories went on."""
        with self._writer, self._connection() as db:
            write = Write(db, [])
            db.execute("BEGIN IMMEDIATE")
            try:
                yield write
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")
        for job_id in dict.fromkeys(write.changed):
            for listener in self._listeners:
                try:
                    listener(job_id)
                except Exception:
                    logger.exception("a listener failed; what it should have heard is stored")

    def read(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        with self._connection() as db:
            return db.execute(sql, values).fetchall()

    def shrink(self) -> None:
        """Give the pages of deleted rows back to the file system."""
        with self._writer, self._connection() as db:
            db.execute("PRAGMA incremental_vacuum").fetchall()

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """See `Store.subscribe`."""
        with self._guard:
            self._listeners = (*self._listeners, changed)

        def end() -> None:
            with self._guard:
                self._listeners = tuple(listener for listener in self._listeners if listener is not changed)

        return end

    def close(self) -> None:
        """Wait for the write that is under way, then close every connection."""
        with self._writer, self._guard:
            self._closed = True
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()

    def _create(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        with self._connection() as db:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            while True:
                try:
                    db.execute("PRAGMA journal_mode = WAL")
                    break
                except sqlite3.OperationalError:
                    # Two processes make the file at once, and this statement doesn't wait by itself.
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
        with self.write() as write:
            (version,) = write.db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in SCHEMA.split(";"):
                    write.db.execute(statement)
                write.db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise SdjaxError(
                    f"{str(self.path)!r} holds jobs in format {version}; this version of sdjax reads format {VERSION}"
                )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Borrow a connection: a thread has it for itself, and there are as many as threads ever worked at once."""
        with self._guard:
            if self._closed:
                raise SdjaxError(f"{str(self.path)!r} is closed")
            db = self._idle.pop() if self._idle else None
        if db is None:
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = FULL")
        try:
            yield db
        finally:
            with self._guard:
                keep = not self._closed
                if keep:
                    self._idle.append(db)
            if not keep:
                db.close()
