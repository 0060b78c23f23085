"""Pictures on disk, each named by the SHA-256 of its bytes: a name never means two things, and equal ones are one file.

A file is written under a temporary name, forced to the disk, and only then given its name, so that no reader ever finds
half of one, and a record that was committed after it never points at nothing.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ABANDONED_AFTER = 3600.0
"""Seconds after which a file that never got its name belongs to a dead process: nobody writes one for that long."""


class Staged(NamedTuple):
    """Bytes that are safe on the disk, but have no name yet."""

    digest: str
    size: int
    path: Path


class Files:
    """A folder of immutable files. `keep` and `delete` exclude each other by the caller's own lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._staging = folder / "staging"
        self._staging.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def staged(self, contents: Iterable[bytes]) -> Iterator[list[Staged]]:
        """Write contents to the disk; those that were not kept when the block ends are gone."""
        parts: list[Staged] = []
        try:
            parts.extend(map(self._stage, contents))
            yield parts
        finally:
            for part in parts:
                part.path.unlink(missing_ok=True)

    def keep(self, parts: Iterable[Staged]) -> None:
        """Give staged files their names. One that is already there stays."""
        folders = set()
        for part in parts:
            target = self._path(part.digest)
            if not target.exists():
                if not target.parent.exists():
                    target.parent.mkdir(exist_ok=True)
                    folders.add(self.folder)
                part.path.replace(target)
                folders.add(target.parent)
        for folder in folders:
            _sync(folder)

    def read(self, digest: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._path(digest).read_bytes()

    def delete(self, digest: str) -> None:
        """Remove a file, if it is there."""
        self._path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """All that have a name."""
        for folder in self.folder.iterdir():
            if folder != self._staging and folder.is_dir():
                yield from (file.name for file in folder.iterdir())

    def delete_abandoned(self) -> None:
        """Remove what processes that are gone left half-written."""
        for file in self._staging.iterdir():
            try:
                if file.stat().st_mtime < time.time() - ABANDONED_AFTER:
                    file.unlink()
            except FileNotFoundError:
                continue

    def _stage(self, content: bytes) -> Staged:
        path = self._staging / uuid.uuid4().hex
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return Staged(hashlib.sha256(content).hexdigest(), len(content), path)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest


def _sync(folder: Path) -> None:
    """Force a folder's entries to the disk; Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
