"""Stable Diffusion in JAX: weights are immutable pytrees, generation is one jitted loop."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdjax import errors, images, loading, metadata, models, pipeline, schedulers, variants
    from sdjax.devices import sharding, xla_flags
    from sdjax.errors import CheckpointError, NotFiniteError, PromptWarning, RequestError, SdjaxError
    from sdjax.loading import Part
    from sdjax.pipeline import Output, Pipeline

__all__ = [
    "CheckpointError",
    "NotFiniteError",
    "Output",
    "Part",
    "Pipeline",
    "PromptWarning",
    "RequestError",
    "SdjaxError",
    "__version__",
    "errors",
    "images",
    "loading",
    "metadata",
    "models",
    "pipeline",
    "schedulers",
    "sharding",
    "variants",
    "xla_flags",
]
_MODULES = {
    "sharding": "devices.sharding",
    "xla_flags": "devices.xla_flags",
    "Output": "pipeline",
    "Part": "loading",
    "Pipeline": "pipeline",
}
"""Modules of names that are elsewhere: other lower-case names are modules at the top level, the others are errors."""


def __getattr__(name: str) -> object:
    """Import on first use: JAX and Flax take a second, and `sdjax --help` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    if name[0].islower():
        return import_module(f"sdjax.{_MODULES.get(name, name)}")
    return getattr(import_module(f"sdjax.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
