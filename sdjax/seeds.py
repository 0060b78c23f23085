"""Seeds of a call: one, a list, or JAX keys, as one whole number for each picture."""

import secrets
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.checks import whole
from sdjax.errors import RequestError
from sdjax.limits import LAST_SEED

KEYS = "threefry2x32"
"""The implementation of JAX's generator whose keys are seeds: that of `sdjax.generation`, and JAX's default."""


def seeds_of(given: Any, prompts: int, num_images: int) -> tuple[int, ...]:
    """Give each picture a seed.

    Args:
        given: None draws one. A number, or a key of `jax.random.key`, is the first picture's, and the pictures after it
            take the numbers that follow. A list or array of either has one for each prompt, whose further pictures take
            the numbers that follow, or one for each picture.
        prompts: how many there are.
        num_images: of each.

    Returns:
        prompts * num_images numbers from 0 to 2**64 - 1; `jax.random.key(7)` is 7.

    Raises:
        RequestError: it is none of these, or a list of another length.
    """
    pictures = prompts * num_images
    if given is None:
        return _following(secrets.randbits(32), pictures)
    if isinstance(given, jax.Array) and not _is_key(given):
        if given.dtype == np.uint32 and given.shape[-1:] == (2,):
            raise RequestError("seed is a raw PRNG key: give a number, or jax.random.wrap_key_data(key)")
        given = np.asarray(given)
    if isinstance(given, np.ndarray | jax.Array) and given.ndim:
        if given.ndim > 1:
            raise RequestError(f"seed must be a number or a list of them, not an array of shape {given.shape}")
        given = list(given)
    if isinstance(given, str) or not isinstance(given, Sequence):
        return _following(_seed("seed", given), pictures)
    seeds = [_seed(f"seed[{i}]", each) for i, each in enumerate(given)]
    if len(seeds) == prompts:
        return tuple(following for seed in seeds for following in _following(seed, num_images))
    if len(seeds) == pictures:
        return tuple(seeds)
    each = f"one for each of {prompts} prompts" if prompts > 1 else "one for the prompt"
    each += f", or one for each of {pictures} pictures" if pictures > prompts else ""
    raise RequestError(f"seed is a list of {len(seeds)}: give one number, {each}")


def _following(seed: int, count: int) -> tuple[int, ...]:
    return tuple((seed + i) % (LAST_SEED + 1) for i in range(count))


def _is_key(given: jax.Array) -> bool:
    return bool(jnp.issubdtype(given.dtype, jax.dtypes.prng_key))


def _seed(name: str, given: Any) -> int:
    if isinstance(given, jax.Array) and _is_key(given):
        if given.shape or str(jax.random.key_impl(given)) != KEYS:
            raise RequestError(f"{name} is a key of {jax.random.key_impl(given)}: only those of {KEYS} are seeds")
        high, low = np.asarray(jax.random.key_data(given)).tolist()
        return int(high << 32 | low)
    return whole(name, given, 0, LAST_SEED)
