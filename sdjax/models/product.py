"""The matrix product of activations with a weight as PyTorch stores it."""

from jax import Array, lax


def multiply(x: Array, weight: Array) -> Array:
    """Multiply (..., in) by the transpose of (out, in): (..., out), in their common dtype.

    No backend needs the transpose in memory: a product reads its factors along either axis.
    """
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
