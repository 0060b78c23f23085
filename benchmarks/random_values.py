"""Weights and inputs that cost no time to make: parts of one pool of normal numbers, scaled to tame activations."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

POOL = np.random.default_rng(0).standard_normal(2**22, np.float32)


def normal(shape: Sequence[int], offset: int = 0) -> NDArray[np.float32]:
    """Standard normal numbers, from another place of the pool for another offset."""
    return np.resize(np.roll(POOL, -(offset * 7919) % POOL.size), tuple(shape))


def weight(shape: Sequence[int], fan_in: int, offset: int, *, is_scale: bool = False) -> NDArray[np.float32]:
    """A layer's weight of variance 1 / fan_in; the scale of a norm is near one."""
    drawn = normal(shape, offset)
    drawn *= np.float32(0.1 if is_scale else fan_in**-0.5)
    return drawn + np.float32(1) if is_scale else drawn


def token_ids(batch: int, tokens: int, end: int) -> NDArray[np.int32]:
    """Prompts of random words that fill their row, closed by the end token."""
    ids = np.random.default_rng(1).integers(1, end - 1, (batch, tokens), dtype=np.int32)
    ids[:, -1] = end
    return ids
