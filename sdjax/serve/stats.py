"""What an engine has done, for metrics and estimates."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Stats:
    """One moment of an engine.

    Attributes:
        slots: how many pictures may be drawn at once.
        drawing: pictures that are.
        pending: pictures of leased jobs that are being prepared, or wait for a slot.
        finishing: jobs whose pictures are being decoded, encoded and stored.
        slices: since the start.
        compiles: programs that were compiled since the start, by anybody in the process.
        ended: jobs by how they ended: "complete", "error", "gone" (cancelled, or taken by another) and "released".
        seconds: of all complete jobs together, by phase: "queued", "prepare", "denoise", "decode" and "encode".
        step_seconds: what one step of one picture takes, by bucket, in the batch that serves it best.
    """

    slots: int
    drawing: int
    pending: int
    finishing: int
    slices: int
    compiles: int
    ended: Mapping[str, int]
    seconds: Mapping[str, float]
    step_seconds: Mapping[str, float]

    def eta(self, bucket: str, steps: int) -> float | None:
        """Seconds that so many steps, of all pictures together, take; None while nothing is known.

        Args:
            bucket: one that wasn't drawn yet is taken for like the others.
            steps: of the jobs before one, and its own.
        """
        if not self.step_seconds:
            return None
        guess = max(self.step_seconds.values())
        return self.step_seconds.get(bucket, guess) * steps


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
        self.count += event == "/jax/core/compile/backend_compile_duration"
