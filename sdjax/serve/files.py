"""Pictures on disk, each named by the SHA-256 of its bytes: a name never means two things, and equal ones are one file.

A file is written under a temporary name, forced to the disk, and only then given its name, so that no reader ever finds
half of one, and a record that was committed after it never points at nothing.
"""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from sdjax.serve.storage import PictureLostError, storage_errors

ABANDONED_AFTER = 3600.0
"""Seconds after which a file that never got its name belongs to a dead process: nobody writes one for that long."""
PROBE_BYTES = 2**20
"""As much as a picture has is written to see whether the disk takes it."""
FOLDER_MODE, FILE_MODE = 0o700, 0o600
"""Prompts and pictures are for the server's user alone."""


class Staged(NamedTuple):
    """Bytes that are safe on the disk, but have no name yet."""

    digest: str
    size: int
    path: Path


class Files:
    """A folder of immutable files. `keep` and `delete` exclude each other by the caller's own lock.

    Args:
        folder: made if it isn't there.
        orphans: the folder for files that nobody knows, made when there is one.
    """

    def __init__(self, folder: Path, orphans: Path) -> None:
        self.folder = folder
        self.orphans = orphans
        self._staging = folder / "staging"
        with storage_errors():
            make_private(folder)
            make_private(self._staging)

    @contextmanager
    def staged(self, contents: Iterable[bytes]) -> Iterator[list[Staged]]:
        """Write contents to the disk; those that were not kept when the block ends are gone."""
        parts: list[Staged] = []
        try:
            parts.extend(map(self._stage, contents))
            yield parts
        finally:
            with storage_errors():
                for part in parts:
                    part.path.unlink(missing_ok=True)

    def keep(self, parts: Iterable[Staged]) -> None:
        """Give staged files their names. One that is already there has the same bytes, or should have."""
        folders = set()
        with storage_errors():
            for part in parts:
                target = self._path(part.digest)
                if not target.parent.exists():
                    target.parent.mkdir(FOLDER_MODE, exist_ok=True)
                    folders.add(self.folder)
                part.path.replace(target)
                folders.add(target.parent)
            for folder in folders:
                _sync(folder)

    def read(self, digest: str) -> bytes:
        """The bytes of a file.

        Raises:
            PictureLostError: there is none, or it has other bytes than its name promises.
        """
        path = self._path(digest)
        try:
            with storage_errors():
                content = path.read_bytes()
        except Exception as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise PictureLostError(f"there is no file {str(path)!r}") from error
            raise
        if hashlib.sha256(content).hexdigest() != digest:
            raise PictureLostError(f"the bytes of {str(path)!r} were changed")
        return content

    def has(self, digest: str) -> bool:
        """Whether there is a file of that name."""
        with storage_errors():
            return self._path(digest).exists()

    def delete(self, digest: str) -> None:
        """Remove a file, if it is there."""
        with storage_errors():
            self._path(digest).unlink(missing_ok=True)

    def set_aside(self, digest: str) -> None:
        """Move a file that nobody knows to the orphans, if it is there."""
        with storage_errors():
            if self._path(digest).exists():
                make_private(self.orphans)
                shutil.move(self._path(digest), self.orphans / digest)

    def bring_back(self, digest: str) -> bool:
        """Give a file that was set aside its place again; False where it isn't among the orphans."""
        orphan = self.orphans / digest
        with storage_errors():
            if not orphan.exists():
                return False
            self._path(digest).parent.mkdir(FOLDER_MODE, exist_ok=True)
            shutil.move(orphan, self._path(digest))
        return True

    def digests(self) -> Iterator[str]:
        """All that have a name."""
        with storage_errors():
            for folder in self.folder.iterdir():
                if folder != self._staging and folder.is_dir():
                    yield from (file.name for file in folder.iterdir())

    def delete_abandoned(self) -> None:
        """Remove what processes that are gone left half-written."""
        with storage_errors():
            for file in self._staging.iterdir():
                try:
                    if file.stat().st_mtime < time.time() - ABANDONED_AFTER:
                        file.unlink()
                except FileNotFoundError:
                    continue

    def probe(self) -> None:
        """Write about as much as a picture has, and remove it: whether the disk takes it now."""
        path = self._staging / uuid.uuid4().hex
        with storage_errors():
            try:
                with _created(path) as file:
                    file.write(bytes(PROBE_BYTES))
            finally:
                path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """What the file system leaves to this user."""
        with storage_errors():
            return shutil.disk_usage(self.folder).free

    def _stage(self, content: bytes) -> Staged:
        path = self._staging / uuid.uuid4().hex
        with storage_errors():
            try:
                with _created(path) as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return Staged(hashlib.sha256(content).hexdigest(), len(content), path)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest


def make_private(folder: Path) -> None:
    """Make a folder for this user alone; one that is there becomes so."""
    folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(FOLDER_MODE)


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb") as file:
        yield file


def _sync(folder: Path) -> None:
    """Force a folder's entries to the disk; Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
