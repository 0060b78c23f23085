"""How a computation depends on where it runs: rows at a time, and the precision of products."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def one_by_one() -> bool:
    """Whether the rows of a batch are computed each by itself: on a CPU.

    How a CPU's matrix product sums depends on its shape, so in a shared batch a row's last bits depend on its mates,
    and a seed would not give the same bytes alone. Within a program rows follow one another; `sdjax.sharding.by_rows`
    makes calls of them, which run beside each other.
    """
    return jax.default_backend() == "cpu"


def cores() -> int:
    """How many of a CPU's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_row(function: Callable[[Any], Any], rows: Any, at_once: int | None = None) -> Any:
    """Apply a function of a batch, one row at a time where rows are computed `one_by_one`.

    Args:
        function: of a tree of arrays with a leading batch axis, to the like.
        rows: its argument.
        at_once: rows that a call may take elsewhere, where memory sets a bound.
    """
    batch = jax.tree.leaves(rows)[0].shape[0]
    if not one_by_one() and (at_once is None or batch <= at_once):
        return function(rows)

    def one(row: Any) -> Any:
        return jax.tree.map(lambda x: x[0], function(jax.tree.map(lambda x: x[None], row)))

    return lax.map(one, rows, batch_size=None if one_by_one() else at_once)


def wide(x: ArrayLike) -> Array:
    """Give numbers the height, width and channels that they are the same for."""
    return jnp.asarray(x)[..., None, None, None]


def precision(dtype: str) -> Any:
    """float32 means float32: TPUs and recent GPUs would round the factors of a product, unless told not to."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")
