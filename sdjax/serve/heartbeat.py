"""Telling the hive that we live. A hive that is down, slow or angry never disturbs the worker."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import httpx

import sdjax
from sdjax.serve.front import Worker
from sdjax.serve.settings import Settings

PATH = "/v1/worker-heartbeat"
EVERY = 30.0
FIRST_RETRY, LAST_RETRY = 1.0, 60.0
TIMEOUT = 5.0
FAREWELL = 2.0
"""Seconds that the last heartbeat may take."""

logger = logging.getLogger(__name__)


def heartbeat(worker: Worker, *, worker_id: str, port: int, running: int) -> dict[str, Any]:
    """What is posted."""
    status = (
        "busy" if worker.status == "ready" and running else {"draining": "stopped"}.get(worker.status, worker.status)
    )
    return {
        "worker": {
            "id": worker_id,
            "model_id": worker.model.name if worker.model else None,
            "device": worker.device,
            "port": port,
            "status": status,
            "implementation": "sdjax",
            "version": sdjax.__version__,
        },
        "timestamp": datetime.now(UTC).isoformat(),
    }


async def keep_beating(url: str, beat: Callable[[], Any], is_ready: Callable[[], bool], every: float = EVERY) -> None:
    """Post a heartbeat when the worker is ready, and again and again; after a failure sooner, then ever less often.

    Args:
        url: of the hive.
        beat: makes (awaits) what is posted.
        is_ready: whether to begin.
        every: seconds between two.
    """
    while not is_ready():
        await anyio.sleep(0.05)
    retry = 0.0
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        while True:
            problem = await _post(client, url, await beat())
            if problem is None:
                if retry:
                    logger.info("the hive hears us again")
                retry = 0.0
                await anyio.sleep(every)
            else:
                if not retry:
                    logger.warning("the hive does not hear our heartbeats (%s); trying on", problem)
                retry = min(2 * retry, LAST_RETRY) if retry else min(FIRST_RETRY, every)
                await anyio.sleep(retry)


async def say_goodbye(url: str, beat: dict[str, Any]) -> None:
    """Post once, and don't wait long."""
    with anyio.move_on_after(FAREWELL):
        async with httpx.AsyncClient(timeout=FAREWELL) as client:
            await _post(client, url, beat)


def worker_name(settings: Settings) -> str:
    """The worker's id, or one by its address."""
    return settings.worker_id or f"sdjax-{settings.port}"


async def _post(client: httpx.AsyncClient, url: str, beat: Any) -> str | None:
    """Post one; the sentence says what went wrong."""
    try:
        answer = await client.post(url + PATH, json=beat)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None if answer.is_success else f"it answered {answer.status_code}"
