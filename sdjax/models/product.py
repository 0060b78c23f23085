"""The matrix product of activations with a weight as PyTorch stores it."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def multiply(x: Array, weight: Array) -> Array:
    """Multiply (..., in) by the transpose of (out, in): (..., out), in their common dtype.

    No backend needs the transpose in memory: a product reads its factors along either axis.
    """
    # XLA uses a CPU's bfloat16 instructions only where it is asked for sums in float32. Accelerators sum so anyway.
    return accumulate(x, weight).astype(x.dtype) if jax.default_backend() == "cpu" else _product(x, weight, None)


def accumulate(x: Array, weight: Array) -> Array:
    """The same, but for sums that are in float32 at least."""
    return _product(x, weight, sum_dtype(x.dtype))


def sum_dtype(dtype: DTypeLike) -> DTypeLike:
    """What `accumulate` sums in, for factors of a dtype."""
    return jnp.promote_types(dtype, jnp.float32)


def _product(x: Array, weight: Array, sums: DTypeLike | None) -> Array:
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=sums)
