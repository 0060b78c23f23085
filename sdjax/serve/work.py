"""The jobs that an engine has leased, each with everything that is known of it: there is no second place for any of it.

What waits for a slot, what is in a batch and what is drawn are not lists that pictures are moved between, but questions
to the jobs. So a failure in the middle of anything leaves every picture where it was, and the next turn finds it.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from PIL import Image

from sdjax.serve.drawing import Key, Row
from sdjax.serve.store import Job, Lease

Phase: TypeAlias = Literal["preparing", "compiling", "drawing", "ending"]
"""Rows are made; likewise, and something is compiled for them; they wait for slots, are walked and decoded; the end is
stored."""


How: TypeAlias = Literal["complete", "error", "released", "gone"]


@dataclass
class Work:
    """A leased job. The engine's thread alone writes it, up to the phase "ending"; then it is the finisher's.

    Attributes:
        lease: the right to draw it.
        pictures: how many it has.
        phase: of `Phase`.
        key: what its rows have in common with those of a batch, once they are made.
        rows: the pictures that are not drawn, by number.
        slots: the numbers of those that have had a slot.
        drawn: finished pictures, by number, each with its last row.
        steps: of each picture's walk.
        told: the last step that its story speaks of.
        error: why it can't be drawn, as soon as that is known.
        ended: how it has ended in the store; the finisher's last word.
        seconds: by phase, for its timings.
    """

    lease: Lease
    pictures: int
    phase: Phase = "preparing"
    key: Key | None = None
    rows: dict[int, Row] = field(default_factory=dict)
    slots: set[int] = field(default_factory=set)
    drawn: dict[int, tuple[Row, Image.Image]] = field(default_factory=dict)
    steps: int = 0
    told: int = 0
    error: Exception | None = None
    ended: How | None = None
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def job(self) -> Job:
        """What was leased."""
        return self.lease.job

    @property
    def preview_every(self) -> int:
        """Steps between previews, 0 for none."""
        return self.job.request.get("preview_every") or 0

    @property
    def done(self) -> int:
        """Steps that are done, of all its pictures together."""
        return sum(row.done for row in list(self.rows.values())) + len(self.drawn) * self.steps

    @property
    def left(self) -> int:
        """Steps that its pictures have before them, as far as it is known."""
        steps = self.steps or self.job.request.get("steps") or 0
        return max(0, self.pictures * steps - self.done)

    def progress(self) -> dict[str, Any]:
        """How far it is; of several pictures, in steps of one."""
        done = self.done / self.pictures
        return {"step": int(done), "total": self.steps, "percent": round(100 * done / max(self.steps, 1), 1)}


class Works:
    """The jobs of one engine, in the order in which they were leased. Other threads may read; each look is a copy."""

    def __init__(self) -> None:
        self._by_id: dict[str, Work] = {}

    def __iter__(self) -> Iterator[Work]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._by_id

    def add(self, work: Work) -> None:
        """Take on a job."""
        self._by_id[work.job.id] = work

    def remove(self, job_id: str) -> None:
        """Forget a job, if it is there; its pictures leave their batches with it."""
        self._by_id.pop(job_id, None)

    def live(self, job_id: str) -> Work | None:
        """A job that goes on."""
        work = self._by_id.get(job_id)
        return None if work is None or work.phase == "ending" or work.error is not None else work

    def in_phase(self, *phases: Phase) -> list[Work]:
        """Those that are there."""
        return [work for work in self if work.phase in phases]

    def undrawn(self) -> list[Work]:
        """Those that aren't ending."""
        return self.in_phase("preparing", "compiling", "drawing")

    def waiting(self) -> list[tuple[Work, int]]:
        """Pictures that wait for a slot."""
        return [(work, number) for work in self._drawn_now() for number in sorted(work.rows.keys() - work.slots)]

    def active(self) -> dict[Key, list[Row]]:
        """Pictures that have a slot and steps before them, by what they may share a batch with."""
        found: defaultdict[Key, list[Row]] = defaultdict(list)
        for work in self._drawn_now():
            if work.key is not None:
                found[work.key] += [row for number, row in list(work.rows.items()) if number in work.slots and row.left]
        return {key: rows for key, rows in found.items() if rows}

    def walked(self) -> list[Row]:
        """Pictures that have a slot and no steps before them: they are to be decoded."""
        return [
            row
            for work in self._drawn_now()
            for number, row in list(work.rows.items())
            if number in work.slots and not row.left
        ]

    def taken(self) -> int:
        """Slots that are taken, or will be as soon as rows are made. What is being compiled for takes none: it may take
        minutes, in which others draw."""
        return (
            sum(work.pictures for work in self.in_phase("preparing"))
            + len(self.waiting())
            + sum(map(len, self.active().values()))
        )

    def _drawn_now(self) -> list[Work]:
        return [work for work in self.in_phase("drawing") if work.error is None]
