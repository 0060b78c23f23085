"""Large arrays out of files: read where they lie, and converted in one pass, a few at a time.

A tensor is copied once, from the mapped file into the memory that stays.
"""

import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike, NDArray

Task = TypeVar("Task")
Result = TypeVar("Result")

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ALIGNMENT = 64
"""Bytes at whose multiples an array must begin for JAX to take it over on a CPU as it is."""
AT_ONCE = min(8, os.cpu_count() or 1)


class MappedFile:
    """A safetensors file whose header has been checked before: its tensors as views, read when they are looked at."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            self._header: dict[str, Any] = json.loads(opened.read(length))
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + length

    def view(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored, read-only."""
        entry = self._header[name]
        shape = tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(
            self._map, jnp.dtype(DTYPES[entry["dtype"]]), count, self._start + entry["data_offsets"][0]
        )
        return flat.reshape(shape)

    def place(self, name: str) -> int:
        """Where in the file a tensor begins."""
        begin: int = self._header[name]["data_offsets"][0]
        return begin

    def expect(self, name: str) -> None:
        """Have the system begin to read a tensor."""
        self._advise("MADV_WILLNEED", name)

    def let_go(self, name: str) -> None:
        """Count a tensor's pages no longer as this process's memory, beside the copies; it can be read again."""
        self._advise("MADV_DONTNEED", name)

    def _advise(self, advice: str, name: str) -> None:
        if hasattr(mmap, advice):  # not on Windows
            begin, end = (self._start + offset for offset in self._header[name]["data_offsets"])
            begin -= begin % mmap.PAGESIZE
            if end > begin:
                self._map.madvise(getattr(mmap, advice), begin, end - begin)


def laid_out(view: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Copy a view into memory of its own, in C order and another dtype; JAX on a CPU takes it over without copying.

    What is too large for the dtype becomes infinite.
    """
    dtype = jnp.dtype(dtype)
    memory = np.empty(view.size * dtype.itemsize + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    out = memory[begin : begin + view.size * dtype.itemsize].view(dtype).reshape(view.shape)
    with np.errstate(over="ignore"):
        out[...] = view
    return out


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Map in threads, a few tasks ahead of whoever takes the results: no more of them are in memory than that."""
    waiting = iter(tasks)
    with ThreadPoolExecutor(AT_ONCE, "sdjax-loading") as threads:
        ahead: deque[Future[Result]] = deque(threads.submit(function, task) for task in islice(waiting, AT_ONCE + 1))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(threads.submit(function, task) for task in islice(waiting, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
