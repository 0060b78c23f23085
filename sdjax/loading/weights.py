"""Tensors of safetensors files to parameters: which tensor fills which leaf, and in which orientation."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from sdjax.models import Params

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def tensor_name(path: tuple[str | int, ...]) -> str:
    """The published name of the leaf at `path`: `("conv_in", "kernel")` is `conv_in.weight`."""
    *modules, leaf = path
    return ".".join([*map(str, modules), LEAF_NAMES[str(leaf)]])


def from_torch(path: tuple[str | int, ...], tensor: np.ndarray) -> np.ndarray:
    """Turn a tensor as PyTorch stores it into the leaf's orientation, without copying."""
    return _reorient(path, tensor, convolution=(2, 3, 1, 0))


def to_torch(path: tuple[str | int, ...], leaf: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`."""
    return _reorient(path, leaf, convolution=(3, 2, 0, 1))


def _reorient(path: tuple[str | int, ...], array: np.ndarray, convolution: tuple[int, ...]) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(convolution)
