"""Log lines for people or for machines, each with the job that it is about."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from urllib.parse import quote

from starlette.types import Scope

from sdjax.serve.store import Job

_job: ContextVar[str | None] = ContextVar("job", default=None)
_jobs = logging.getLogger("sdjax.serve.jobs")
_access = logging.getLogger("sdjax.serve.access")
_TEXT = "%(asctime)s %(levelname)s %(name)s%(about)s %(message)s"


@contextmanager
def about_job(job_id: str) -> Iterator[None]:
    """Put the job's id on every line that is logged inside, in this thread or task."""
    token = _job.set(job_id)
    try:
        yield
    finally:
        _job.reset(token)


def set_up_logging(level: str, *, as_json: bool) -> None:
    """Send all lines of the process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_with_job)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    warnings.showwarning = _show_warning
    for noisy in ("httpx", "httpcore", "sse_starlette", "asyncio", "PIL", "uvicorn.error", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_accepted(job: Job) -> None:
    """Log a job that was accepted, and its warnings."""
    with about_job(job.id):
        _jobs.info("accepted: %s", job.bucket)
        for warning in job.request.get("warnings", ()):
            _jobs.warning("%s", warning)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (RFC 3339), level, logger, job, message, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "job": getattr(record, "job", None),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value is not None}, ensure_ascii=False)


def log_request(scope: Scope) -> Callable[[int], None]:
    """Give what logs a request when it is called with the status of its answer, which has ended then.

    Queries are left out: they may hold a link's signature.
    """
    began = time.monotonic()
    method, path = scope["method"], quote(scope["path"], safe="/")
    client = scope["client"][0] if scope.get("client") else "-"

    def ended(status: int) -> None:
        _access.info("%s %s %s %d %.3f s", client, method, path, status, time.monotonic() - began)

    return ended


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line like the others: where in the code it was given helps nobody who runs a server."""
    logging.getLogger("py.warnings").warning("%s", message)


def _with_job(record: logging.LogRecord) -> bool:
    job = getattr(record, "job", None) or _job.get()
    record.job = job
    record.about = f" job={job}" if job else ""
    return True
