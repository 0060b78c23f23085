"""The matrix product of activations with a weight as PyTorch stores it."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def multiply(x: Array, weight: Array) -> Array:
    """Multiply (..., in) by the transpose of (out, in): (..., out), in their common dtype.

    No backend needs the transpose in memory: a product reads its factors along either axis.
    """
    return _product(x, weight, None)


def multiply_wide(x: Array, weight: Array) -> Array:
    """`multiply`, asked for sums in float32: a CPU's bfloat16 instructions are used only then.

    Accelerators sum in float32 without being asked.
    """
    return accumulate(x, weight).astype(x.dtype)


def accumulate(x: Array, weight: Array) -> Array:
    """`multiply`, with the result in the dtype of the sums: float32 or wider."""
    return _product(x, weight, sum_dtype(x.dtype))


def sum_dtype(dtype: DTypeLike) -> DTypeLike:
    """Give the dtype that `accumulate` sums in, for factors of a dtype."""
    return jnp.promote_types(dtype, jnp.float32)


def _product(x: Array, weight: Array, sums: DTypeLike | None) -> Array:
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=sums)
