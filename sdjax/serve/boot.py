"""From settings to a running server: the store, the model, the engine, and the front."""

import gc
import logging
import os
import sys
from pathlib import Path

from sdjax.arguments import with_variant
from sdjax.errors import SdjaxError
from sdjax.serve.app import create_app
from sdjax.serve.front import Worker
from sdjax.serve.logs import set_up_logging
from sdjax.serve.served import SD_VERSIONS, served_model
from sdjax.serve.server import bind, serve
from sdjax.serve.settings import Settings
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.storage import StorageError, reason
from sdjax.serve.store import Store


def serve_until_stopped(settings: Settings) -> None:
    """Serve until a signal says to stop.

    Raises:
        SdjaxError: the address or the folder can't be had.
    """
    set_up_logging(settings.log_level, as_json=settings.log_json)
    listener = bind(settings.host, settings.port)
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})
    store = SqliteStore(settings.data_dir, attempts=settings.attempts)

    def boot(worker: Worker) -> None:
        load(settings, store, worker)

    serve(create_app(settings, store, boot), settings, listener)
    _end()


def _end() -> None:
    """End the process well, now that all is drained and stored.

    A thread may be inside XLA still, since a compilation can't be interrupted. Python's own end would take it from
    under that thread, and C++ aborts the process then.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def back_up(settings: Settings, folder: Path) -> str:
    """Copy the jobs and pictures of a data folder into another folder, also while a server uses it.

    Returns:
        How much was copied, in a sentence.

    Raises:
        SdjaxError: there is no data folder, or one of the two can't be read or written.
    """
    if not (settings.data_dir / "jobs.sqlite3").is_file():
        raise SdjaxError(f"--backup: there are no jobs in {str(settings.data_dir)!r}; --data-dir names another folder")
    store = SqliteStore(settings.data_dir, attempts=settings.attempts)
    try:
        made = store.backup(folder)
    except StorageError as error:
        raise SdjaxError(f"--backup: {str(folder)!r} can't be written: {reason(error)}") from error
    finally:
        store.close()
    gone = f"; {made.missing} files were gone" if made.missing else ""
    return f"{made.jobs} jobs and {made.files} files are in {str(folder)!r}{gone}"


def load(settings: Settings, store: Store, worker: Worker) -> None:
    """Load the model, start the engine, and wait until everything is compiled.

    Raises:
        Exception: the model can't be loaded, or the engine can't get ready.
    """
    # Here, since they take a second, in which the server answers already that it lives.
    import jax

    from sdjax import Part, Pipeline
    from sdjax.devices.sharding import make_mesh
    from sdjax.serve.engine import GenerationEngine
    from sdjax.serve.programs import default_batch_sizes
    from sdjax.terminal import keep_compiled_programs

    keep_compiled_programs()
    count = len(jax.devices()) if settings.devices == "all" else settings.devices
    pipe = Pipeline.from_pretrained(
        _source(settings),
        dtype=settings.dtype,
        mesh=make_mesh(count) if count > 1 else None,
        variant=settings.variant,
        revision=settings.revision,
        vae=None if settings.vae is None else Part(*with_variant(settings.vae)),
    )
    worker.device = jax.devices()[0].platform
    worker.model = served_model(pipe, settings.sd_version, settings.most_pixels)
    if _is_draining(worker):
        return
    engine = GenerationEngine(
        pipe,
        store,
        name=settings.worker_id,
        slots=settings.slots,
        sizes=settings.sizes,
        batch_sizes=[size * count for size in default_batch_sizes()],
    )
    engine.start()
    worker.engine = engine
    while not engine.ready.wait(LOOK_EVERY):
        if engine.error is not None:
            raise engine.error
        if _is_draining(worker):
            return
    _forgo_what_stays()
    if worker.status == "starting":
        worker.status = "ready"


def _is_draining(worker: Worker) -> bool:
    return worker.status == "draining"


def _forgo_what_stays() -> None:
    """Spare the garbage collector what lives as long as the process: modules, programs and what was traced for them.

    Full collections looked through all of it and held the event loop for a third of a second (`benchmarks/load.py`).
    """
    gc.collect()
    gc.freeze()


def _source(settings: Settings) -> str | None:
    if settings.model is not None:
        return settings.model
    if settings.model_path is not None:
        return str(settings.model_path)
    return SD_VERSIONS[settings.sd_version] if settings.sd_version else None


LOOK_EVERY = 0.1
"""Seconds between looks at whether the engine is ready."""
