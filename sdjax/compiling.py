"""How this package has its programs compiled, so that they take little memory."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax

OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}
"""XLA's options by backend. On a CPU its usual order of operations keeps far more buffers at once than are needed: of
SD 1.5's UNet 0.59 GiB instead of 0.18, of its decoder 1.62 instead of 0.64; the results are the same to the bit."""
LONG = 5.0
"""Seconds of compiling that leave enough memory behind to be worth looking for."""
COMPILED = "/jax/core/compile/backend_compile_duration"


def jit(function: Callable[..., Any], **settings: Any) -> Any:
    """`jax.jit` with this backend's options; what compiling leaves in memory is given back.

    It asks JAX for its devices, so it is called when something is about to run, not when a module is imported.

    Args:
        function: as `jax.jit` takes it.
        settings: likewise.
    """
    _watch_compiling()
    return jax.jit(function, compiler_options=OPTIONS.get(jax.default_backend()), **settings)


def give_back_freed() -> None:
    """Have the C library return to the system what has been freed; without effect where it isn't glibc.

    LLVM takes hundreds of megabytes for a large model, in many small pieces and several threads, and glibc keeps them
    for allocations of the like, which never come: what a program computes with is too large to be taken from there.
    """
    if trim := _malloc_trim():
        trim(0)


@contextmanager
def watched() -> Iterator[list[float]]:
    """The seconds that XLA takes for each program of this process, in any thread, until the end."""
    seconds: list[float] = []

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS have none, Windows not even a library to ask
        return None
    return found


@cache
def _watch_compiling() -> None:
    """Give memory back between compiling and the program's first run, which would come on top of it."""

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED and duration_secs > LONG:
            give_back_freed()

    jax.monitoring.register_event_duration_secs_listener(compiled)
