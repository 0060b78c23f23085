"""The engine's decisions, as functions of what it sees: whom to admit, how to cut pictures into batches, how far to go.

The rule of fairness: jobs are admitted in the order in which they came. Those of one bucket share a batch, and buckets
that draw at once take turns, slice by slice. No more than `BUCKETS_AT_ONCE` do, since each may have weights of its own;
while the job at the head of the queue needs another one, jobs behind it may fill free slots for `PATIENCE` seconds and
no longer. Then nobody is admitted before it, and as the running ones end in a time that is known, it can't starve.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

SLICE_SECONDS = 0.25
"""How long the device is out of reach at a time: what a cancel, a preview or a new job waits for, at most."""
JOIN_SECONDS = 0.05
"""The same while a new job is being prepared, whose slot is empty until a slice ends."""
BUCKETS_AT_ONCE = 2
PATIENCE = 2.0
"""Seconds for which the job at the head of the queue may be overtaken."""


class Blocked(NamedTuple):
    """The head of the queue can't be admitted."""

    bucket: str
    since: float


class Admission(NamedTuple):
    """The bucket to lease from, None for nobody, and who is kept waiting by that."""

    bucket: str | None
    blocked: Blocked | None


def admit(waiting: Sequence[str], running: Collection[str], blocked: Blocked | None, now: float) -> Admission:
    """Choose whose turn it is when a slot is free.

    Args:
        waiting: buckets that jobs wait for, that of the longest waiting first.
        running: buckets that are being drawn.
        blocked: what the last call said.
        now: in seconds, of any clock that only goes forward.
    """
    if not waiting:
        return Admission(None, None)
    head = waiting[0]
    if head in running or len(running) < BUCKETS_AT_ONCE:
        return Admission(head, None)
    if blocked is None or blocked.bucket != head:
        blocked = Blocked(head, now)
    if now - blocked.since > PATIENCE:
        return Admission(None, blocked)
    return Admission(next((bucket for bucket in waiting if bucket in running), None), blocked)


def partition(rows: int, step_seconds: Mapping[int, float]) -> tuple[int, ...]:
    """Cut rows into batches so that a step of all of them takes the least time, by what steps were measured to take.

    Where rows take turns nothing is ever padded; where a batch costs little more than its half, padding pays. Of equals
    it takes the fewest batches.

    Args:
        rows: how many pictures take part, at least 1.
        step_seconds: of a batch of each size that is compiled.

    Returns:
        Sizes, which hold at least `rows` together, the largest first.
    """
    best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
    for count in range(1, rows + 1):
        options = []
        for size, seconds in step_seconds.items():
            before, batches, sizes = best[max(0, count - size)]
            options.append((before + seconds, batches + 1, (*sizes, size)))
        best.append(min(options))
    return tuple(sorted(best[rows][2], reverse=True))


def slice_length(step_seconds: float, seconds: float, limits: Iterable[int]) -> int:
    """How many calls of the network a slice makes: as many as fit into `seconds`, at least one, none beyond a limit."""
    fit = seconds / step_seconds if step_seconds > 0 else math.inf
    return max(1, int(min(fit, *limits)))
