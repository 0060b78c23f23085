"""From a lease to rows that can join a batch, and from rows to a program for them, beside the loop: nobody who is being
drawn waits for it.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import jax

from sdjax.serve import drawing
from sdjax.serve.drawing import Key, Row
from sdjax.serve.lanes import Lane
from sdjax.serve.logs import about_job
from sdjax.serve.patience import pause
from sdjax.serve.programs import Programs, UnwantedError
from sdjax.serve.storage import StorageError, reason
from sdjax.serve.store import Lease, Store

STORAGE_TRIES = 15
"""How often the pictures of a request are read, about a minute long, before its job ends for a disk that can't."""

Prepared = Callable[[str, Key, list[Row], float], None]
"""Called with a job, what its rows have in common, the rows, and the seconds that it took."""

logger = logging.getLogger(__name__)


class Preparer:
    """A lane that makes rows, one that compiles larger batches, and a thread for each first picture that something is
    compiled for: a large one takes minutes, and a small one isn't to wait behind it.

    Args:
        store: has the pictures that jobs start from.
        programs: what is compiled.
        prepared: called on these threads, once for each job, unless `failed` is.
        failed: likewise, with a job and why it can't be drawn.
    """

    def __init__(
        self, store: Store, programs: Programs, *, prepared: Prepared, failed: Callable[[str, Exception], None]
    ) -> None:
        self._store = store
        self._programs = programs
        self._prepared = prepared
        self._failed = failed
        self._preparing, self._compiling = Lane("sdjax-prepare"), Lane("sdjax-compile")

    def prepare(self, lease: Lease, *, is_quick: bool = True) -> None:
        """Make the rows of a job: after those that were asked for before, or, where something may have to be compiled
        for it, in a thread of its own.
        """
        if is_quick:
            self._preparing.do(partial(self._prepare, lease))
        else:
            threading.Thread(target=self._prepare, args=(lease,), name="sdjax-prepare-first", daemon=True).start()

    def compile_first(
        self, key: Key, row: Row, is_wanted: Callable[[], bool], done: Callable[[Exception | None], None]
    ) -> None:
        """Compile the smallest batch in a thread of its own.

        Args:
            key: of the rows that wait for it.
            row: any of them.
            is_wanted: asked now and then; it stops when nobody waits any more.
            done: called once, with what failed.
        """
        compiling = partial(self._compile_first, key, row, is_wanted, done)
        threading.Thread(target=compiling, name="sdjax-compile-first", daemon=True).start()

    def compile_larger(
        self, key: Key, row: Row, size: int, is_wanted: Callable[[], bool], done: Callable[[], None]
    ) -> None:
        """Compile a larger batch; the smaller ones serve meanwhile, and for good where it can't be."""
        self._compiling.do(partial(self._compile_larger, key, row, size, is_wanted, done))

    def close(self) -> None:
        """Take no more; what is under way isn't waited for."""
        self._preparing.close(0.0)
        self._compiling.close(0.0)

    def _prepare(self, lease: Lease, tries: int = 0) -> None:
        job, pipe = lease.job, self._programs.pipe
        began = time.perf_counter()
        with about_job(job.id):
            try:
                asked = drawing.requests(pipe, self._store, job.request)
                rows = drawing.prepare(pipe, job.id, asked)
                for leaf in jax.tree.leaves([row.batch for row in rows]):
                    leaf.block_until_ready()
                key = drawing.key(rows[0])
            except StorageError as error:
                if tries + 1 < STORAGE_TRIES:
                    logger.warning("its pictures can't be read now, and are tried again: %s", reason(error))
                    self._preparing.do(partial(self._prepare, lease, tries + 1), after=pause(tries + 1))
                else:
                    self._failed(job.id, error)
            except Exception as error:
                self._failed(job.id, error)
            else:
                self._prepared(job.id, key, rows, time.perf_counter() - began)

    def _compile_first(
        self, key: Key, row: Row, is_wanted: Callable[[], bool], done: Callable[[Exception | None], None]
    ) -> None:
        try:
            self._programs.compile(key, row, self._programs.sizes[0], is_wanted)
        except UnwantedError:
            logger.info("compiling was stopped: nobody waits for it any more")
            done(None)
        except Exception as error:
            done(error)
        else:
            done(None)

    def _compile_larger(
        self, key: Key, row: Row, size: int, is_wanted: Callable[[], bool], done: Callable[[], None]
    ) -> None:
        try:
            self._programs.compile(key, row, size, is_wanted)
        except UnwantedError:
            pass  # it is compiled when so many draw again
        except Exception as error:
            logger.warning("batches of %d could not be compiled: %s", size, error)
            self._programs.too_large(key, size)
        finally:
            done()
