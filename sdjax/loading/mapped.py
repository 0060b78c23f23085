"""Large arrays out of files, a few at a time, each copied once: into the memory that stays.

What is stored as it is wanted is read into that memory; what has to be converted is looked at where it lies, mapped.
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

from sdjax.errors import CheckpointError

Task = TypeVar("Task")
Result = TypeVar("Result")

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SMALL_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""Of adapters alone, which are converted before anything is computed; safetensors has no NumPy dtype for them."""
ALIGNMENT = 64
"""Bytes at whose multiples an array must begin for JAX to take it over on a CPU as it is."""
OWN_PAGES = 2**20
"""Bytes from which an array has pages of its own, which the system gives and takes back whole. What a thread asks of
the allocator comes from a heap of its own, which takes longer to grow, and keeps what was let go."""
AT_ONCE = min(8, os.cpu_count() or 1)
AHEAD = 16
"""Tensors that may be read, or be in memory already, before their turn comes."""


class MappedFile:
    """A safetensors file whose header has been checked before: its tensors read, or mapped."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            self._header: dict[str, Any] = json.loads(opened.read(length))
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + length

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored, in memory of its own.

        Raises:
            CheckpointError: the file has become shorter than its header says.
        """
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        memory = _memory(end - begin)
        with self._file.open("rb") as opened:
            opened.seek(self._start + begin)
            if opened.readinto(memory.data) != end - begin:
                raise CheckpointError(f"{self._file} ends within {name}")
        whole: NDArray[Any] = memory.view(_dtype(entry["dtype"])).reshape(entry["shape"])
        return whole

    def view(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored, where it lies: read-only."""
        entry = self._header[name]
        shape = tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(self._map, _dtype(entry["dtype"]), count, self._start + entry["data_offsets"][0])
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


def _dtype(name: str) -> Any:
    return jnp.dtype({**DTYPES, **SMALL_DTYPES}[name])


def laid_out(view: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Copy a view into memory of its own, in C order and another dtype; JAX on a CPU takes it over without copying.

    What is too large for the dtype becomes infinite.
    """
    dtype = jnp.dtype(dtype)
    out = _memory(view.size * dtype.itemsize).view(dtype).reshape(view.shape)
    with np.errstate(over="ignore"):
        out[...] = view
    return out


def _memory(size: int) -> NDArray[np.uint8]:
    """So many bytes, aligned."""
    if size >= OWN_PAGES and hasattr(mmap, "MAP_ANONYMOUS"):  # not on Windows
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, np.uint8)
    spacious = np.empty(size + ALIGNMENT, np.uint8)
    begin = -spacious.ctypes.data % ALIGNMENT
    return spacious[begin : begin + size]


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Map in threads, `AHEAD` tasks before whoever takes the results: no more of them are in memory than that."""
    waiting = iter(tasks)
    with ThreadPoolExecutor(AT_ONCE, "sdjax-loading") as threads:
        ahead: deque[Future[Result]] = deque(threads.submit(function, task) for task in islice(waiting, AHEAD))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(threads.submit(function, task) for task in islice(waiting, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
