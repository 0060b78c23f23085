"""Attention on accelerators: which kernel computes it, and how its heads are made to fit.

cuDNN's flash attention (Dao et al. 2022, arXiv 2205.14135) never writes the scores to memory. It takes 16-bit numbers
and heads of a multiple of 8 channels up to a limit; XLA's own form takes anything.
"""

from enum import Enum
from functools import cache

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

MULTIPLE = 8
WIDEST = {8: 128, 9: 256}
"""The widest head that cuDNN takes, by the generation of the GPU (the major number of its compute capability)."""
SHORT = 2**14
"""Scores of a head up to which there is nothing to gain: XLA fuses small ones as it likes."""


class Kernel(Enum):
    """Who computes it, as `jax.nn.dot_product_attention` names them."""

    CUDNN = "cudnn"
    XLA = "xla"


def choose(*, capability: tuple[int, int] | None, dtype: DTypeLike, queries: int, keys: int, channels: int) -> Kernel:
    """Choose the kernel.

    Args:
        capability: the compute capability of an NVIDIA GPU, None for any other device.
        dtype: of queries, keys and values.
        queries: of each head.
        keys: of each head.
        channels: of each head, before `padding`.
    """
    if capability is None or capability[0] < min(WIDEST) or jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        return Kernel.XLA
    widest = WIDEST[min(capability[0], max(WIDEST))]
    fits = channels + padding(channels) <= widest
    return Kernel.CUDNN if fits and queries * keys > SHORT else Kernel.XLA


def padding(channels: int) -> int:
    """Channels of zeros that make a head a multiple of 8; they change no score, and their values are cut off."""
    return -channels % MULTIPLE


def attend(query: Array, key: Array, value: Array, *, causal: bool) -> Array:
    """Scaled dot-product attention by the kernel that fits, (batch, tokens, heads, channels) as in `attention`."""
    channels = query.shape[-1]
    kernel = choose(
        capability=_capability(), dtype=query.dtype, queries=query.shape[1], keys=key.shape[1], channels=channels
    )
    return run(kernel, query, key, value, causal=causal)


def run(kernel: Kernel, query: Array, key: Array, value: Array, *, causal: bool) -> Array:
    """Compute it with a kernel, padding heads for it."""
    channels = query.shape[-1]
    more = padding(channels) if kernel is Kernel.CUDNN else 0
    if more:
        query, key, value = (jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) for x in (query, key, value))
    # The scale is that of the channels which there are.
    seen: Array = jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, scale=channels**-0.5, implementation=kernel.value
    )
    return seen[..., :channels]


@cache
def _capability() -> tuple[int, int] | None:
    """The compute capability of the default device, None where that is no NVIDIA GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return None
    major, _, minor = device.compute_capability.partition(".")
    return int(major), int(minor)
