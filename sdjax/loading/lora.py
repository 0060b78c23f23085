"""Adapters as data, and the pure function that adds them to parameters.

An adapter says, for some leaves, what is to be added to them. `apply_lora` gives parameters of the same structure,
shapes and dtypes, so every program that was compiled for the old ones runs the new ones; what no adapter touches is
the very same array. Nothing is ever subtracted: to be without an adapter is to use the parameters from before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from sdjax.errors import CheckpointError, RequestError
from sdjax.loading.lora_kinds import Factor, Kind, LowRank, described
from sdjax.loading.weights import LeafPath, tensor_name
from sdjax.models import Params, is_quantised

LARGEST = float(np.finfo(np.float32).max)
RANKS_AT_ONCE = 16
"""Of a low-rank product, in one call of a compiled program. Small ranks are padded to it, larger ones take several."""


class Change(NamedTuple):
    """What an adapter adds to one leaf.

    `factors` are its arrays, in one of the kinds of `lora_kinds`. `scale` is alpha / rank. `magnitude`, where there is
    one, is DoRA's vector of norms, shaped to multiply the weight: (out, 1, ...) or (1, in, ...).
    """

    factors: Kind
    scale: float = 1.0
    magnitude: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA that fits a model.

    Attributes:
        source: the file or folder that it was read from, for messages.
        changes: by the leaf's path in the parameters.
        unused: names in the file that this model has no layer for.
        digest: equal for equal contents; "" if it was not read from a file.
    """

    source: str
    changes: Mapping[LeafPath, Change]
    unused: tuple[str, ...] = ()
    digest: str = ""


def apply_lora(params: Params, adapters: Sequence[tuple[Adapter, float]]) -> Params:
    """Add adapters to parameters.

    With weight w a LoRA gives W + w s B A (for other kinds see `lora_kinds`), and with DoRA's magnitude m (Liu et al.
    2024, arXiv 2402.09353)
    m (W + w s B A) / ||W + w s B A||: as in peft, the weight scales the direction, not the magnitude. Each adapter is
    measured against the unchanged W, and what they add is summed in float32 and rounded once, so their order does
    not matter beyond rounding (in peft a second DoRA rescales the first, so there it does). An adapter that is given
    twice counts once, with the sum of its weights; one whose weight is 0 is not there at all, its DoRA included (where
    peft would still set the magnitudes).

    Args:
        params: of a whole pipeline, {"unet": ..., "text_encoder": ..., ...}.
        adapters: with their weights: any finite numbers, negative ones too.

    Returns:
        Parameters of the same structure, shapes, dtypes and places; untouched leaves are the same objects.

    Raises:
        RequestError: a weight is not a finite number.
        CheckpointError: an adapter was read for another model.
    """
    together: dict[object, tuple[Adapter, float]] = {}
    for adapter, weight in adapters:
        key = adapter.digest or id(adapter)
        together[key] = (adapter, together.get(key, (adapter, 0.0))[1] + checked_weight(weight, adapter.source))
    present = [(adapter, weight) for adapter, weight in together.values() if weight != 0]
    if not present:
        return params
    refuse_int8(params)
    leaves = flatten_dict(params)
    terms: dict[LeafPath, list[tuple[Change, float]]] = {}
    for adapter, weight in present:
        for path, change in adapter.changes.items():
            _check_fit(adapter, path, change, leaves)
            terms.setdefault(path, []).append((change, weight))
    # Leaf by leaf, so that no more than one is in memory in float32.
    changed = {path: _merged(leaves[path], added) for path, added in terms.items()}
    return FrozenDict(unflatten_dict({**leaves, **changed}))


def refuse_int8(params: Params) -> None:
    """Refuse weights that nothing can be added to.

    Raises:
        RequestError: kernels are stored as int8.
    """
    if is_quantised(params):
        raise RequestError(
            "loras can't be added to weights that are stored as int8, which would round most of them away: load the "
            "model without weights='int8', or save it with its adapters merged first"
        )


def checked_weight(weight: object, name: str) -> float:
    """A LoRA's weight as a float.

    Raises:
        RequestError: it is not a number, or not finite in float32.
    """
    try:
        number = math.nan if isinstance(weight, bool | str | bytes) else float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise RequestError(f"the weight of {name} must be a finite number, not {weight!r}")
    return number


def _check_fit(adapter: Adapter, path: LeafPath, change: Change, leaves: Mapping[LeafPath, Array]) -> None:
    if path not in leaves:
        raise CheckpointError(f"{adapter.source} changes {'.'.join(map(str, path))}, which this model lacks")
    shape = leaves[path].shape
    if not change.factors.fits(shape):
        raise CheckpointError(
            f"{adapter.source} was made for another model: for {tensor_name(path)} it has factors "
            f"{described(change.factors)}, and the layer here is {shape}"
        )


def _merged(leaf: Array, terms: Sequence[tuple[Change, float]]) -> Array:
    """A leaf with all that is added to it, where the leaf is."""
    total = _nothing(leaf)
    for change, weight in terms:
        for part in _parts(change):
            total = _plus(total, leaf, part, np.float32(weight * change.scale))
    merged: Array = _sum(leaf, total)
    if isinstance(merged, jax.core.Tracer) or not isinstance(leaf, jax.Array) or not leaf.committed:
        # An array that is bound to a device is another kind of argument than one that isn't, and compiles anew.
        return merged
    placed: Array = jax.device_put(merged, leaf.sharding)
    return placed


def _parts(change: Change) -> list[Change]:
    """Cut a product of matrices into products of one rank, so that a file of any rank runs the same programs."""
    match change:
        case Change(LowRank((np.ndarray() as up, np.ndarray() as down)), _, None):
            ranks = range(0, up.shape[1], RANKS_AT_ONCE)
            return [change._replace(scale=1.0, factors=LowRank(_ranks_from(first, up, down))) for first in ranks]
    return [change._replace(scale=1.0)]


def _ranks_from(first: int, up: NDArray[Any], down: NDArray[Any]) -> Factor:
    """`RANKS_AT_ONCE` of the ranks of two matrices in float32, zeros behind the last."""
    some = slice(first, first + RANKS_AT_ONCE)
    missing = (0, RANKS_AT_ONCE - up[:, some].shape[1])
    left = np.pad(up[:, some].astype(np.float32), ((0, 0), missing))
    return left, np.pad(down[some].astype(np.float32), (missing, *((0, 0),) * (down.ndim - 1)))


@jax.jit
def _nothing(leaf: Array) -> Array:
    return jnp.zeros_like(leaf, jnp.float32)


@jax.jit
def _plus(total: Array, leaf: Array, change: Change, scale: ArrayLike) -> Array:
    """A total, and what a change adds to a leaf, in float32."""
    weight = leaf.astype(jnp.float32)
    delta = change.factors.delta(weight, jnp.asarray(scale, jnp.float32)).reshape(weight.shape)
    if change.magnitude is not None:
        magnitude = jnp.asarray(change.magnitude, jnp.float32)
        summed = weight + delta
        axes = tuple(axis for axis, size in enumerate(magnitude.shape) if size == 1)
        norm = jnp.sqrt(jnp.square(summed).sum(axes, keepdims=True))
        delta = jnp.where(norm > 0, magnitude / norm, 1.0) * summed - weight
    return total + delta


@jax.jit
def _sum(leaf: Array, addition: Array) -> Array:
    return (leaf.astype(jnp.float32) + addition).astype(leaf.dtype)
