"""What the command line shows a person: what is going on, and pictures in terminals that can."""

import gc
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console


def keep_compiled_programs() -> None:
    """Compile once per machine: programs go to the user's cache folder, unless that can't be written."""
    import jax
    from platformdirs import user_cache_path

    folder = Path(os.environ.get("SDJAX_CACHE_DIR") or user_cache_path("sdjax")) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"compiled programs are not kept: {folder}: {error.strerror}", stacklevel=2)
        return
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)  # type: ignore[no-untyped-call]


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage meanwhile, and never look through what is there at the end.

    Importing, tracing and compiling make hundreds of thousands of objects that stay; going through them over and over,
    and once more when the process ends, is a sixth of the time to a small picture.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Stages:
    """What is going on, told on standard error where a person can see it."""

    def __init__(self, console: "Console | None") -> None:
        self._bar: Any = None
        if console is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

            columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            self._bar = Progress(*columns, TextColumn("{task.fields[speed]}"), console=console, transient=True)
            self._task = self._bar.add_task("", total=None, speed="")
            self._bar.start()
        self._first: tuple[float, int] | None = None

    def __call__(self, stage: str) -> None:
        """Name what is being done."""
        if self._bar is not None:
            self._bar.update(self._task, description=stage)

    def steps(self, done: int, total: int) -> None:
        """Show the sampler's progress; its speed is counted from the first slice on, which may have compiled."""
        if self._bar is None or done == 0:
            return
        now = time.monotonic()
        self._first = self._first or (now, done)
        began, before = self._first
        speed = f"{(done - before) / (now - began):.1f} it/s" if done > before else ""
        stage = "decoding" if done == total else "drawing"
        self._bar.update(self._task, description=stage, completed=done, total=total, speed=speed)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def stages(quiet: bool) -> Iterator[Stages]:
    """Tell what is going on while the block runs, unless nobody watches."""
    console = None
    if not quiet and sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True)
    told = Stages(console)
    try:
        yield told
    finally:
        told.stop()


def printable(text: str) -> str:
    """The text with control characters spelled out, except ends of lines: a file's text must not steer a terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def shortened(text: str, most: int = 400) -> str:
    """The text, without its middle where it is longer than so many characters."""
    if len(text) <= most:
        return text
    half = (most - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first one being the header.

    In a terminal that is too narrow for a row, its last cell goes to a line of its own. In a pipe nothing is cut or
    wrapped: a row is a line.
    """
    from rich.cells import cell_len

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    columns = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    is_wide = width is None or sum(columns) + 2 * len(columns) - 2 <= width
    for row in rows:
        cells = [cell + " " * (size - cell_len(cell)) for cell, size in zip(row, columns, strict=True)]
        lines = ["  ".join(cells)] if is_wide else ["  ".join(cells[:-1]), f"    {row[-1]}"]
        for line in lines:
            print(line.rstrip())


def show(pictures: "Sequence[Image.Image]") -> None:
    """Show pictures in terminals that have a protocol for it: iTerm2's, which WezTerm speaks too, or kitty's."""
    if not sys.stdout.isatty():
        return
    from sdjax.images import to_png

    is_kitty = "kitty" in os.environ.get("TERM", "") or os.environ.get("TERM_PROGRAM") == "ghostty"
    if not is_kitty and os.environ.get("TERM_PROGRAM") not in ("iTerm.app", "WezTerm"):
        return
    import base64

    for picture in pictures:
        data = base64.b64encode(to_png(picture)).decode()
        if is_kitty:
            parts = [data[i : i + 4096] for i in range(0, len(data), 4096)]
            for i, part in enumerate(parts):
                more = int(i < len(parts) - 1)
                head = f"a=T,f=100,m={more}" if i == 0 else f"m={more}"
                sys.stdout.write(f"\x1b_G{head};{part}\x1b\\")
        else:
            sys.stdout.write(f"\x1b]1337;File=inline=1:{data}\a")
        sys.stdout.write("\n")
