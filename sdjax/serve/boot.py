"""From settings to a running server: the store, the model, the engine, and the front."""

from sdjax.serve.app import create_app
from sdjax.serve.front import Worker
from sdjax.serve.logs import set_up_logging
from sdjax.serve.served import SD_VERSIONS, served_model
from sdjax.serve.server import bind, serve
from sdjax.serve.settings import Settings
from sdjax.serve.sqlite import SqliteStore


def serve_until_stopped(settings: Settings) -> None:
    """Serve until a signal says to stop.

    Raises:
        SdjaxError: the address or the folder can't be had.
    """
    set_up_logging(settings.log_level, as_json=settings.log_json)
    listener = bind(settings.host, settings.port)
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})
    store = SqliteStore(settings.data_dir)

    def boot(worker: Worker) -> None:
        load(settings, worker)

    serve(create_app(settings, store, boot), settings, listener)


def load(settings: Settings, worker: Worker) -> None:
    """Load the model, start the engine, and compile."""
    import jax

    from sdjax import Pipeline

    name = settings.model or (
        str(settings.model_path) if settings.model_path else SD_VERSIONS.get(settings.sd_version or "")
    )
    pipe = Pipeline.from_pretrained(name, dtype=settings.dtype, variant=settings.variant, revision=settings.revision)
    worker.device = jax.devices()[0].platform
    worker.model = served_model(pipe, settings.sd_version)
