"""A process that draws what waits in a folder until it is killed: `drawing_process.py FOLDER CACHE ATTEMPTS`.

The prompt "poison" kills it, as a job does that drives a device's driver mad. It prints "ready" when it takes jobs.
"""

import os
import signal
import sys
import threading

import jax

import sdjax
from sdjax.serve import drawing
from sdjax.serve.engine import GenerationEngine
from sdjax.serve.sqlite import SqliteStore


def main() -> None:
    """Run until killed."""
    folder, cache, attempts = sys.argv[1:]
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    walk = drawing.walk

    def fatal(pipe, rows, size, calls):
        if any(row.request.prompts == ("poison",) for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return walk(pipe, rows, size, calls)

    drawing.walk = fatal
    store = SqliteStore(folder, attempts=int(attempts))
    engine = GenerationEngine(sdjax.Pipeline.from_pretrained(), store, slots=3, sizes=(), lease_seconds=1.5)
    engine.start()
    engine.wait_until_ready()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
