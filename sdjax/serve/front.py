"""What the routes share, put together once by `app.create_app`."""

import time
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias

import anyio
from starlette.requests import Request

from sdjax.serve.decoder import Decoder
from sdjax.serve.metrics import Metrics
from sdjax.serve.problems import ProblemError
from sdjax.serve.queue import RequestQueue
from sdjax.serve.registry import JobRegistry
from sdjax.serve.served import ServedModel
from sdjax.serve.settings import Settings
from sdjax.serve.stats import Stats

SUBMITTERS = 4
"""Requests that are checked and stored at a time."""

Status: TypeAlias = Literal["starting", "ready", "draining", "error"]


class Engine(Protocol):
    """What draws the jobs of the store, as far as the front has to do with it."""

    def stats(self) -> Stats:
        """What it has done so far."""

    def drain(self, seconds: float) -> None:
        """Take no more jobs, give the running ones so long to finish, give the rest back to the store, and return."""


@dataclass
class Worker:
    """What is going on behind the front. The thread that loads the model writes it, and everybody reads it.

    Attributes:
        status: "ready" once the model is loaded and compiled.
        model: what is served, from the moment that it is loaded.
        engine: what draws, likewise.
        device: what it draws on.
        since: when the process began, in seconds since the epoch.
    """

    status: Status = "starting"
    model: ServedModel | None = None
    engine: Engine | None = None
    device: str = ""
    since: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Front:
    """The parts of a server; `submitters` counts the threads in which requests are checked and stored.

    `link_secret` signs links to pictures, which open without a key; None where no key is asked for.
    """

    settings: Settings
    queue: RequestQueue
    registry: JobRegistry
    metrics: Metrics
    worker: Worker
    link_secret: bytes | None = None
    decoder: Decoder = field(default_factory=Decoder)
    submitters: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(SUBMITTERS))

    def model(self) -> ServedModel:
        """What is served, for a request that would add work.

        Raises:
            ProblemError: it isn't there yet, or the server is about to stop (503).
        """
        if self.worker.status == "draining":
            raise ProblemError(503, "draining", "the server is about to stop", headers={"Retry-After": "30"})
        if self.worker.status == "error":
            raise ProblemError(503, "unavailable", "the model could not be loaded; the server's log says why")
        if self.worker.model is None:
            raise ProblemError(503, "starting", "the model is being loaded", headers={"Retry-After": "2"})
        model = self.worker.model
        return replace(model, aliases=model.aliases.union(self.settings.alias))


def front_of(request: Request) -> Front:
    """The server that a request came to."""
    front: Front = request.app.state.front
    return front


def owner_of(request: Request) -> str:
    """Whose key the request carries; "" where none is asked for."""
    owner: str = request.state.owner
    return owner


def viewer_of(request: Request) -> str | None:
    """Whose jobs the request may see; None is everybody's, where no key is asked for."""
    return owner_of(request) or None
