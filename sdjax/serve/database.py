"""The SQLite file behind the store: its connections, its transactions, its copies.

A write is one transaction that takes the database's write lock at its start; readers see the last commit and never
wait. The log is forced to the disk at every commit (`synchronous=FULL`): a killed process would lose nothing without
it, since what it wrote is the system's by then, but a power cut would take back answers that were given, and an fsync
costs little beside a slice of the loop. From time to time the log is copied into the file: until then a copy of the
file alone lacks what is in the log.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.errors import SdjaxError
from sdjax.serve.files import FILE_MODE
from sdjax.serve.schema import VERSION, bring_up_to_date
from sdjax.serve.storage import StorageError, reason, storage_errors

BUSY_SECONDS = 60.0
"""How long a write waits for another process's."""
CHECKPOINT_SECONDS = 5.0
"""How far the file alone may be behind, once nobody reads what it lacks."""
LOG_BYTES = 2**24
"""The log's file is cut to that size after a checkpoint."""

logger = logging.getLogger(__name__)


class Write(NamedTuple):
    """An open transaction, and the jobs whose story it goes on with."""

    db: sqlite3.Connection
    changed: list[str]


class Database:
    """Connections to one file, which any number of threads and processes share.

    Raises:
        SdjaxError: a newer version wrote the file, or it was closed.
        StorageError: it can't be read or written, or is damaged; every method raises it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = threading.Lock()
        self._guard = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self._closed = False
        self._stopping = threading.Event()
        self._has_log = threading.Event()
        self._create()
        self._checkpoints = threading.Thread(target=self._checkpoint, name="sdjax-checkpoint", daemon=True)
        self._checkpoints.start()

    @contextmanager
    def write(self) -> Iterator[Write]:
        """One transaction; when it is committed, the listeners hear which jobs' stories went on."""
        with self._writer, self._connection() as db:
            write = Write(db, [])
            with storage_errors():
                db.execute("BEGIN IMMEDIATE")
            try:
                with _sqlite_errors():
                    yield write
                    db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    with storage_errors():
                        db.execute("ROLLBACK")
        self._has_log.set()
        for job_id in dict.fromkeys(write.changed):
            for listener in self._listeners:
                try:
                    listener(job_id)
                except Exception:
                    logger.exception("a listener failed; what it should have heard is stored")

    def read(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        with self._connection() as db, storage_errors():
            return db.execute(sql, values).fetchall()

    def shrink(self) -> None:
        """Give the pages of deleted rows back to the file system."""
        with self._writer, self._connection() as db, storage_errors():
            db.execute("PRAGMA incremental_vacuum").fetchall()

    @contextmanager
    def copied(self, target: Path) -> Iterator[sqlite3.Connection]:
        """Read one moment of the file inside the block, and write that moment into another file at its end."""
        with self._connection() as db, storage_errors():
            db.execute("BEGIN")
            try:
                db.execute("SELECT count(*) FROM jobs").fetchone()  # the moment
                yield db
                _create_privately(target)
                copy = sqlite3.connect(target)
                try:
                    db.backup(copy)
                finally:
                    copy.close()
            finally:
                db.execute("ROLLBACK")

    def check(self) -> None:
        """Raise a `StorageError` where the file is gone or can't be read, as a new connection finds it: those that are
        open remember some of it.
        """
        with storage_errors():
            self.path.stat()
        with closing(self._connect()) as db, storage_errors():
            db.execute("SELECT id FROM jobs ORDER BY number DESC LIMIT 1").fetchall()

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
        self._stopping.set()
        self._checkpoints.join()
        with self._writer, self._guard:
            self._closed = True
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()

    def _create(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        with storage_errors():
            _create_privately(self.path)
        with self._connection() as db, storage_errors():
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            while True:
                try:
                    db.execute("PRAGMA journal_mode = WAL")
                    break
                except sqlite3.OperationalError as error:
                    # Two processes make the file at once, and this statement doesn't wait by itself.
                    if time.monotonic() > deadline or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                        raise
                    time.sleep(0.02)
            if db.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]:
                raise StorageError("damaged")
        with self.write() as write:
            version = bring_up_to_date(write.db)
        if version != VERSION:
            raise SdjaxError(
                f"{str(self.path)!r} holds jobs in format {version}; this version of sdjax reads format {VERSION}"
            )

    def _checkpoint(self) -> None:
        while not self._stopping.wait(CHECKPOINT_SECONDS):
            if not self._has_log.is_set():
                continue
            self._has_log.clear()
            try:
                with closing(self._connect()) as db, storage_errors():
                    busy, in_log, copied = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except StorageError as error:
                logger.warning("the log of %r could not be copied into it: %s", str(self.path), reason(error))
                self._has_log.set()
            else:
                if busy or in_log != copied:
                    self._has_log.set()  # somebody reads an older moment

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Borrow a connection: a thread has it for itself, and there are as many as threads ever worked at once."""
        with self._guard:
            if self._closed:
                raise SdjaxError(f"{str(self.path)!r} is closed")
            db = self._idle.pop() if self._idle else None
        if db is None:
            db = self._connect()
        try:
            yield db
        finally:
            with self._guard:
                keep = not self._closed and not db.in_transaction
                if keep:
                    self._idle.append(db)
            if not keep:
                db.close()

    def _connect(self) -> sqlite3.Connection:
        with storage_errors():
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        return db


@contextmanager
def _sqlite_errors() -> Iterator[None]:
    """Like `storage_errors`, for SQLite's alone: the block has errors of its own."""
    try:
        yield
    except sqlite3.Error as error:
        with storage_errors():
            raise error


def _create_privately(path: Path) -> None:
    """Make a file that this user alone may read, if it isn't there; SQLite gives its log the same mode."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, FILE_MODE))
    for file in (path, *path.parent.glob(f"{path.name}-*")):
        with suppress(FileNotFoundError):  # another process has just closed its log
            if file.stat().st_mode & 0o077:
                file.chmod(FILE_MODE)
