"""How long something takes, and the memory that it takes: with the standard library alone, in any process."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple


class Run(NamedTuple):
    """One run: on the clock, and in processor time of all threads (threads that wait in a loop count)."""

    seconds: float
    cpu_seconds: float


def timed(work: Callable[[], object]) -> Run:
    """Do something once."""
    began, computed = time.perf_counter(), time.process_time()
    work()
    return Run(time.perf_counter() - began, time.process_time() - computed)


class Summary(NamedTuple):
    """Several runs: the median, the least, and how far they are apart, as a share of the median."""

    seconds: float
    least_seconds: float
    spread: float


def summary(seconds: Sequence[float]) -> Summary:
    """Sum up the seconds of at least one run."""
    median = statistics.median(seconds)
    return Summary(median, min(seconds), (max(seconds) - min(seconds)) / median)


def resident_bytes() -> int:
    """Memory that this process holds now; where the system does not tell, the most that it ever held."""
    return _of_status("VmRSS", "self") or _most(children=False)


def peak_bytes(process: int | None = None) -> int:
    """The most memory that a process held, since `forget_peak` where that works.

    Args:
        process: its number, of which Linux tells; None is this one. 0 comes back where the system does not tell.
    """
    if process is not None:
        return _of_status("VmHWM", process)
    return _of_status("VmHWM", "self") or _most(children=False)


def peak_bytes_of_children() -> int:
    """The most memory that any one process held that this one started and that has ended."""
    return _most(children=True)


def forget_peak() -> None:
    """Begin `peak_bytes` anew, where the system can (Linux's `clear_refs`)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _of_status(field: str, process: int | str) -> int:
    """A size from Linux's account of a process; 0 where there is none."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def _most(*, children: bool) -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
