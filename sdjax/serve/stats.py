"""What an engine has done, for metrics and estimates."""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from sdjax.devices.programs import COMPILED


class Leased(NamedTuple):
    """A job that an engine has: its bucket, its pictures, and the steps that all of these have before them."""

    bucket: str
    pictures: int
    left: int


@dataclass(frozen=True)
class Stats:
    """One moment of an engine.

    Attributes:
        slots: how many pictures may be drawn at once.
        drawing: pictures that are.
        pending: pictures of leased jobs that are being prepared, or wait for a slot.
        finishing: jobs whose end is being stored: their pictures, an error, or that they wait again.
        slices: since the start; likewise all that follow.
        rows: pictures in those slices, each counted in every slice.
        places: that their batches had for rows.
        steps: calls of the network, each for a whole batch.
        slice_seconds: what slices took together.
        compiles: programs that were compiled, by anybody in the process.
        ended: jobs by how they ended: "complete", "error", "gone" (cancelled, or taken by another) and "released".
        step_seconds: what one step of one picture takes now, by bucket, in the batch that serves it best.
        leased: the jobs that it has, by id.
        unstored: jobs whose end the store didn't take, and is offered again.
    """

    slots: int
    drawing: int
    pending: int
    finishing: int
    slices: int
    rows: int
    places: int
    steps: int
    slice_seconds: float
    compiles: int
    ended: Mapping[str, int]
    step_seconds: Mapping[str, float]
    leased: Mapping[str, Leased]
    unstored: int = 0

    def eta_queued(self, ahead: Mapping[str, int]) -> float | None:
        """Seconds until a job that waits is complete, about: all that is leased, and what is before it, comes first.

        Args:
            ahead: see `Store.ahead`.
        """
        steps = Counter(ahead)
        for job in self.leased.values():
            steps[job.bucket] += job.left
        return self._seconds(steps)

    def eta_leased(self, job_id: str) -> float | None:
        """Seconds until a leased job is complete, about: pictures that are drawn at once take turns, step by step."""
        this = self.leased.get(job_id)
        if this is None:
            return None
        steps: Counter[str] = Counter()
        for job in self.leased.values():
            steps[job.bucket] += min(job.left, math.ceil(this.left / this.pictures) * job.pictures)
        return self._seconds(steps)

    def _seconds(self, steps: Mapping[str, int]) -> float | None:
        """What so many steps of single pictures take. A bucket that wasn't drawn yet is taken for like the slowest."""
        if not self.step_seconds:
            return None
        guess = max(self.step_seconds.values())
        return sum(count * self.step_seconds.get(bucket, guess) for bucket, count in steps.items())


@dataclass
class Tally:
    """What an engine's thread counts as it goes; the names are those of `Stats`."""

    slices: int = 0
    rows: int = 0
    places: int = 0
    steps: int = 0
    slice_seconds: float = 0.0
    ended: Counter[str] = field(default_factory=lambda: Counter({"complete": 0, "error": 0, "gone": 0, "released": 0}))

    def sliced(self, rows: int, size: int, calls: int, seconds: float) -> None:
        """Count a slice of so many rows in a batch of `size`."""
        self.slices += 1
        self.rows += rows
        self.places += size
        self.steps += calls
        self.slice_seconds += seconds


class Compilations:
    """Counts the programs that XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0

    def start(self) -> None:
        """Count from now on."""
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def stop(self) -> None:
        """Count no more."""
        with suppress(AssertionError):  # somebody has cleared all listeners
            jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == COMPILED


def device_memory() -> dict[str, dict[str, int]]:
    """Bytes of each device of this process: "in_use", and "peak" and "limit" where its backend knows them.

    A backend that keeps no account, as that of a CPU, is taken at the arrays that are alive.
    """
    found = {}
    for device in jax.local_devices():
        account = device.memory_stats()
        if account is None:
            found[str(device)] = {"in_use": _alive(device)}
            continue
        names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
        found[str(device)] = {kind: int(account[name]) for kind, name in names.items() if name in account}
    return found


def _alive(device: jax.Device) -> int:
    total = 0
    for array in jax.live_arrays(device.platform):  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):  # it was donated or deleted in between
            total += sum(shard.data.nbytes for shard in array.addressable_shards if shard.device == device)
    return total
