"""The kinds of adapters: each is arrays, the shape of a leaf that they fit, and the change of that leaf.

These are linear in the adapter's weight; for rotations see `lora_rotations`.
"""

import math
from typing import NamedTuple, Protocol, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

Factor: TypeAlias = tuple[ArrayLike, ...]
"""A matrix or kernel: itself; or a (out, rank) times b (rank, in...); or, with a core between them as in Tucker's
decomposition, a (out, rank), core (rank, rank', height, width) and b (rank', in)."""


class Kind(Protocol):
    """The arrays of one leaf's change."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether they change a leaf of this shape; a pointwise convolution's kernel may be stored as a matrix."""

    def delta(self, weight: Array, scale: Array) -> Array:
        """What is added to a leaf, float32 of its shape or one of as many numbers.

        Args:
            weight: the unchanged leaf, float32.
            scale: the adapter's weight times the change's own scale.
        """


class LowRank(NamedTuple):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) and, for convolutions, LoCon: one product of small matrices."""

    product: Factor

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        return _same(_product_shape(self.product), shape)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        return scale * _product(self.product)


class Hadamard(NamedTuple):
    """LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): two products, multiplied entry by entry."""

    first: Factor
    second: Factor

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        return all(_same(_product_shape(factor), shape) for factor in self)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        return scale * _product(self.first).reshape(weight.shape) * _product(self.second).reshape(weight.shape)


class Kronecker(NamedTuple):
    """LoKr (Yeh et al. 2023, arXiv 2309.14859): the Kronecker product of a small matrix and another or a kernel."""

    first: Factor
    second: Factor

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        left, right = (_product_shape(factor) for factor in self)
        if left is None or right is None:
            return False
        length = max(len(left), len(right))
        left, right = ((*product, *(1,) * (length - len(product))) for product in (left, right))
        return _same(tuple(a * b for a, b in zip(left, right, strict=True)), shape)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        first, second = (_product(factor) for factor in self)
        dimensions = max(first.ndim, second.ndim)
        first, second = (x.reshape(*x.shape, *(1,) * (dimensions - x.ndim)) for x in (first, second))
        return scale * jnp.kron(first, second)


class Generalised(NamedTuple):
    """GLoRA (Chavan et al. 2023, arXiv 2306.07967), as LyCORIS has it: W A + B, both of low rank.

    `inner` is A, (in, in), a product of two matrices; `outer` is B, of the leaf's shape.
    """

    inner: Factor
    outer: Factor

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        square = len(shape) > 1 and _product_shape(self.inner) == (shape[1], shape[1])
        return square and _same(_product_shape(self.outer), shape)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        a, b = (jnp.asarray(part, jnp.float32) for part in self.inner)
        inside = jnp.einsum("oi...,ir,rj->oj...", weight, a, b, precision=lax.Precision.HIGHEST)
        return scale * (inside + _product(self.outer).reshape(weight.shape))


class Difference(NamedTuple):
    """The difference itself: LyCORIS's full training and norms, and biases."""

    values: ArrayLike

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        return _trimmed(np.shape(self.values)) == _trimmed(shape)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        return scale * jnp.asarray(self.values).astype(jnp.float32)


class Replacement(NamedTuple):
    """New numbers in a leaf's place (peft's `modules_to_save` and `bias`); a weight between 0 and 1 is a mixture."""

    values: ArrayLike

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        return _trimmed(np.shape(self.values)) == _trimmed(shape)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        return scale * (jnp.asarray(self.values).astype(jnp.float32).reshape(weight.shape) - weight)


class Rows(NamedTuple):
    """New rows of a matrix (peft's `trainable_token_indices`): indices (n,) int32, values (n, width)."""

    indices: ArrayLike
    values: ArrayLike

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        return len(shape) == 2 and np.shape(self.values) == (*np.shape(self.indices), shape[1])

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        rows = jnp.asarray(self.values).astype(jnp.float32) - weight[self.indices]
        return jnp.zeros_like(weight).at[self.indices].set(scale * rows)


class Rescaled(NamedTuple):
    """(IA)^3 (Liu et al. 2022, arXiv 2205.05638): outputs or inputs times 1 + `more`, broadcast over the leaf."""

    more: ArrayLike

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        more = np.shape(self.more)
        return len(more) == len(shape) and all(side in (1, ours) for side, ours in zip(more, shape, strict=True))

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        return scale * jnp.asarray(self.more).astype(jnp.float32) * weight


def described(kind: Kind) -> str:
    """The shapes of a kind's arrays, for messages."""
    parts = [part if isinstance(part, tuple) else (part,) for part in kind if part is not None]  # type: ignore[attr-defined]
    return " and ".join(" x ".join(str(np.shape(array)) for array in part) for part in parts)


def _product_shape(factor: Factor) -> tuple[int, ...] | None:
    """The shape that a factor multiplies out to, or None if its parts do not fit together."""
    parts = [np.shape(part) for part in factor]
    if any(len(part) < 2 or 0 in part for part in parts):
        return None
    match parts:
        case [whole]:
            return whole
        case [(out, rank), (rank_, *rest)] if rank == rank_:
            return (out, *rest)
        case [(out, rank), (rank_, inner, *window), (inner_, width)] if (rank, inner) == (rank_, inner_):
            return (out, width, *window)
    return None


def _product(factor: Factor) -> Array:
    parts = [jnp.asarray(part).astype(jnp.float32) for part in factor]
    terms = {1: "o...->o...", 2: "or,r...->o...", 3: "or,rs...,si->oi..."}[len(parts)]
    # The default precision of a matrix product is less than float32 on a TPU and on most GPUs.
    return jnp.einsum(terms, *parts, precision=lax.Precision.HIGHEST)


def _same(product: tuple[int, ...] | None, shape: tuple[int, ...]) -> bool:
    """Whether a product is a leaf's, up to a kernel that is stored as a matrix."""
    if product is None or len(shape) < 2:
        return False
    if len(product) > 2:
        return _trimmed(product) == _trimmed(shape)
    return product == (shape[0], math.prod(shape[1:]))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape
