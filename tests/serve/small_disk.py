"""A disk that can be filled."""

import shutil
import subprocess
from contextlib import contextmanager, suppress

import pytest


class SmallDisk:
    """A file system of its own, in memory."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self, leave=0):
        """Leave so many bytes."""
        with (self.folder / "filler").open("wb", buffering=0) as file, suppress(OSError):  # others write meanwhile
            while (free := shutil.disk_usage(self.folder).free) > leave:
                file.write(bytes(min(free - leave, 2**20)))

    def make_room(self):
        (self.folder / "filler").unlink()


@contextmanager
def small_disk(folder, megabytes):
    """Mount one, which the system lets its administrator do."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode:
        pytest.skip(f"a file system can't be mounted here: {made.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
