"""Failures of the disk under a store, as one error that clients may read: it names no path.

A storage failure is never the fault of the job that met it: the caller holds what it has and tries again.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["full", "failed", "damaged"]

SENTENCES: dict[Kind, str] = {
    "full": "no space is left on the server's disk",
    "failed": "the server's disk can't be read or written",
    "damaged": "the server's database is damaged",
}
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
DAMAGED_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class StorageError(Exception):
    """A store can't read or write now. The message is for clients, the cause for the log.

    Attributes:
        kind: "full", "failed" (it may work again), or "damaged" (it will not without a person).
    """

    def __init__(self, kind: Kind) -> None:
        super().__init__(SENTENCES[kind])
        self.kind = kind


class PictureLostError(Exception):
    """A picture that a job has is not on the disk any more, or its bytes were changed there."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise what the system and SQLite raise inside as a `StorageError`."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError):
        raise  # mistakes of ours
    except sqlite3.DatabaseError as error:
        raise StorageError(_kind(error)) from error
    except OSError as error:
        raise StorageError("full" if error.errno in FULL_ERRNOS else "failed") from error


def _kind(error: sqlite3.DatabaseError) -> Kind:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return "failed"
    primary = code & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return "full"
    is_exchanged = str(error).startswith(("no such table", "no such column"))  # by another file, or by an empty one
    return "damaged" if is_exchanged or primary in DAMAGED_CODES else "failed"


def reason(error: BaseException) -> str:
    """The error and what caused it, in one line for a log."""
    cause = error.__cause__
    return f"{error} ({type(cause).__name__}: {cause})" if cause is not None else f"{error}"
