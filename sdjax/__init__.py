"""Stable Diffusion in JAX: weights are immutable pytrees, generation is one jitted loop."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdjax import pipeline, schedulers
    from sdjax.errors import CheckpointError, NotFiniteError, RequestError, SdjaxError
    from sdjax.pipeline import Output, Pipeline

__all__ = [
    "CheckpointError",
    "NotFiniteError",
    "Output",
    "Pipeline",
    "RequestError",
    "SdjaxError",
    "__version__",
    "pipeline",
    "schedulers",
]


def __getattr__(name: str) -> object:
    """Import on first use: JAX and Flax take a second, and `sdjax --help` needs neither."""
    if name in ("pipeline", "schedulers"):
        return import_module(f"sdjax.{name}")
    if name in ("Pipeline", "Output"):
        return getattr(import_module("sdjax.pipeline"), name)
    if name in __all__:
        return getattr(import_module("sdjax.errors"), name)
    raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
