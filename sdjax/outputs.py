"""Where pictures go: names that are free, and files that are written whole or not at all.

A name that is taken is never written over: the next free number is taken instead.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from sdjax.errors import RequestError

KINDS: Mapping[str, str] = MappingProxyType({".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"})
"""Formats of pictures, by the ends of their files' names."""


class Place(NamedTuple):
    """What pictures are called: `folder/stem.suffix`, or `folder/stem-1.suffix`, `folder/stem-2.suffix`, ...

    Attributes:
        folder: is made when the first picture is written, if its name was given as that of a folder.
        stem: of the names.
        suffix: a key of `KINDS`.
        is_numbered: from the first picture on.
    """

    folder: Path
    stem: str
    suffix: str
    is_numbered: bool

    @property
    def kind(self) -> str:
        """The format, a value of `KINDS`."""
        return KINDS[self.suffix.lower()]

    def numbered(self, number: int) -> Path:
        """The name with a number, 1 being the first."""
        return self.folder / f"{self.stem}-{number}{self.suffix}"

    def fixed(self, pictures: int) -> list[Path]:
        """The names that so many pictures get in an empty folder."""
        if not self.is_numbered:
            return [self.folder / f"{self.stem}{self.suffix}"]
        return [self.numbered(i + 1) for i in range(pictures)]

    def free(self) -> Iterator[Path]:
        """Names in the order in which they are tried: numbers go on after the highest one that is there."""
        if not self.is_numbered:
            yield self.folder / f"{self.stem}{self.suffix}"
        pattern = re.compile(rf"{re.escape(self.stem)}-(\d{{1,9}}){re.escape(self.suffix)}")
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        taken = [int(found[1]) for name in names if (found := pattern.fullmatch(name))]
        yield from map(self.numbered, count(max(taken, default=0) + 1))


def place(given: str, pictures: int, *, stem: str = "out", suffix: str = ".png") -> Place:
    """Read an option `--output`: a file by its suffix, else a folder, which need not be there.

    Args:
        given: the option; what ends in a slash is a folder.
        pictures: how many are wanted; several are numbered.
        stem: of the names in a folder; the suffix likewise.

    Raises:
        RequestError: it can be neither.
    """
    path = Path(given)
    is_folder = path.is_dir() or given.endswith(("/", os.sep)) or not (path.suffix or path.exists())
    if not is_folder and path.suffix.lower() not in KINDS:
        raise RequestError(
            f"--output must be a folder, or a file that ends in {', '.join(KINDS)}, not {given!r}; "
            "a new folder's name ends in a slash"
        )
    if is_folder:
        _check_folder(path)
        return Place(path, stem, suffix, pictures > 1)
    if not path.parent.is_dir():
        raise RequestError(f"--output: there is no folder {str(path.parent)!r}; make it first")
    return Place(path.parent, path.stem, path.suffix, pictures > 1)


def _check_folder(path: Path) -> None:
    """Refuse a folder that can't be made, because a file is in its way."""
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise RequestError(f"--output: {str(there)!r} is a file, no folder")


def write(names: Iterator[Path] | list[Path], content: Callable[[BinaryIO], object]) -> Path:
    """Write a file under the first of some names that is free, whole or not at all.

    Args:
        names: all in one folder, which is made if it is not there.
        content: writes to a file that is open for it.

    Returns:
        The name.

    Raises:
        RequestError: all are taken.
        OSError: it can't be written.
    """
    part: Path | None = None
    try:
        for path in names:
            if part is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f".{path.name}.{os.getpid()}.part")
                with part.open("wb") as file:
                    content(file)
            if _taken_by(part, path):
                return path
        raise RequestError(f"{path} is there already")
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _taken_by(part: Path, path: Path) -> bool:
    """Give a finished file its name; False where another file has that already."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: take the name by an empty file
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
        part.replace(path)
    return True
