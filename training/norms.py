"""Group normalisation in fewer passes over memory, for the training on a CPU.

    unet = with_native_norms(bind(DEFINITION, params))

gives the same network, whose group norms are computed by `native/norms.cc`, forwards and backwards, in float32 with
long sums in float64. Where the kernels are not available it is left as it is.
"""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sdjax.models.layers import GroupNorm
from training.native import available

Module = TypeVar("Module", bound=nnx.Module)


class NativeGroupNorm(GroupNorm):
    """`GroupNorm` by the native kernels."""

    def __call__(self, x: Array) -> Array:
        """Normalise (batch, ..., channels) float32."""
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return group_norm(self.groups, self.epsilon, flat, self.weight[...], self.bias[...]).reshape(x.shape)


def with_native_norms(module: Module) -> Module:
    """The module, its group norms computed natively. It is changed in place."""
    if available():
        for _, part in nnx.iter_graph(module):
            if isinstance(part, GroupNorm):
                part.__class__ = NativeGroupNorm
    return module


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def group_norm(groups: int, epsilon: float, x: Array, weight: Array, bias: Array) -> Array:
    """Normalise x (batch, pixels, channels) over the pixels and each group's channels, then weight and shift it."""
    call = jax.ffi.ffi_call("sdjax_normalise", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(x, weight, bias, groups=groups, epsilon=epsilon)


def _forward(groups: int, epsilon: float, x: Array, weight: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return group_norm(groups, epsilon, x, weight, bias), (x, weight)


def _backward(groups: int, epsilon: float, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, weight = kept
    each = jax.ShapeDtypeStruct((x.shape[0], x.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call("sdjax_normalise_gradient", (jax.ShapeDtypeStruct(x.shape, jnp.float32), each, each))
    by_x, by_weight, by_bias = call(x, weight, gradient, groups=groups, epsilon=epsilon)
    return by_x, by_weight.sum(0), by_bias.sum(0)


group_norm.defvjp(_forward, _backward)
