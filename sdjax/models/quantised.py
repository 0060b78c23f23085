"""Weights in a quarter of their memory: as int8 with a scale for each output channel.

Only the storage is so; arithmetic is what it was. A weight becomes floating-point numbers again where a model
is put together (`bind`), inside the traced function: in a loop at every turn, and XLA decides how many are whole at a
time. So it costs time in every step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import ArrayLike

from sdjax.devices.staging import NOT_KEPT

LEVELS = 127
LEAST = 2**12
"""Numbers in a weight from which on it is stored as int8: smaller ones take no memory to speak of."""


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("dtype",))
@dataclass(frozen=True)
class Quantised:
    """A weight, about `values * scale`: a pytree node in the place of the array.

    Attributes:
        values: int8, of the weight's shape (out, in, ...), from -127 to 127.
        scale: (out, 1, ...) float32.
        dtype: of the weight that it stands for.
    """

    values: Array
    scale: Array
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape


def quantise_weight(weight: ArrayLike) -> Quantised:
    """Round to the nearest of 255 levels, symmetric about 0, of each output channel (the first axis); on the host.

    The error is at most half a level, 1/254 of the channel's largest weight.
    """
    given = np.asarray(weight)
    wide = given.astype(np.float32)
    largest = np.abs(wide).max(tuple(range(1, wide.ndim)), keepdims=True)
    scale = np.where(largest > 0, largest / LEVELS, 1).astype(np.float32)
    wide /= scale
    values = np.rint(wide, out=wide).astype(np.int8)
    return Quantised(jax.device_put(values), jax.device_put(scale), given.dtype.name)


def is_quantised(params: Any) -> bool:
    """Whether any weight of a tree is stored as int8."""
    return any(isinstance(leaf, Quantised) for leaf in jax.tree.leaves(params, is_leaf=_is_node))


def is_large_weight(path: Sequence[str | int], shape: Sequence[int]) -> bool:
    """Whether `quantise` stores a leaf as int8.

    Large factors of a product are; embeddings are looked up, and of an autoencoder's errors every one is seen.
    """
    is_product = len(shape) > 1 and "embeddings" not in path
    return is_product and path[0] != "vae" and math.prod(shape) >= LEAST


def quantise(params: "FrozenDict[Any, Any]") -> "FrozenDict[Any, Any]":
    """Store the large weights of a whole checkpoint's denoiser and text encoders as int8.

    Args:
        params: {"unet": ..., "vae": ..., "text_encoder": ..., ...}.

    Returns:
        The same tree with a `Quantised` in the place of each such weight; all else is the very same arrays.
    """
    leaves = flatten_dict(params)
    stored = {
        path: quantise_weight(leaf) if not isinstance(leaf, Quantised) and is_large_weight(path, leaf.shape) else leaf
        for path, leaf in leaves.items()
    }
    return FrozenDict(unflatten_dict(stored))


def dequantised(params: Any) -> Any:
    """The same tree with arrays alone."""
    return jax.tree.map(lambda leaf: _restored(leaf) if _is_node(leaf) else leaf, params, is_leaf=_is_node)


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, Quantised)


def _multiplied(weight: Quantised) -> Array:
    return (weight.values.astype(jnp.float32) * weight.scale).astype(weight.dtype)


_multiplied.__name__ = NOT_KEPT
_restored = jax.jit(_multiplied)
