"""A model taken apart: a static definition, and the parameters that fill it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, unfreeze
from jax import Array
from jax.typing import DTypeLike

from sdjax.models.clip import CLIPText
from sdjax.models.controlnet import ControlNet
from sdjax.models.quantised import dequantised
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import VAE, VAEConfig

Params: TypeAlias = FrozenDict[Any, Any]
"""A nested immutable mapping whose leaves are arrays; a path joined with dots is the checkpoint's name.

A large weight may be `Quantised` instead of an array."""

TRUNCATED = 0.87962566
"""Standard deviation of a normal variable that is cut off at two of its deviations."""

Module = TypeVar("Module", bound=nnx.Module)
Config = TypeVar("Config")


def define(
    model: Callable[..., Module], config: Any, *, dtype: DTypeLike, param_dtype: DTypeLike
) -> tuple["nnx.GraphDef[Module]", Params]:
    """Describe a model without making any weight.

    Args:
        model: a module's class, built as `model(config, dtype=, make=)`.
        config: its frozen config.
        dtype: of the arithmetic.
        param_dtype: of the parameters.

    Returns:
        The definition, hashable and equal for equal arguments, and the tree of `jax.ShapeDtypeStruct` that it needs.
    """
    definition, state = nnx.split(model(config, dtype=dtype, make=partial(_described, param_dtype)))
    return definition, FrozenDict(nnx.to_pure_dict(state))


def initialise(model: Callable[..., Module], config: Any, *, dtype: DTypeLike, seed: int) -> Params:
    """Draw fresh float32 parameters, as a training run starts from."""

    def draw() -> Any:
        keys = map(partial(jax.random.fold_in, jax.random.key(seed)), count())
        module = model(config, dtype=dtype, make=partial(_drawn, keys))
        return nnx.to_pure_dict(nnx.split(module)[1])

    return FrozenDict(jax.jit(draw)())


def _described(dtype: DTypeLike, shape: tuple[int, ...], mean: float, deviation: float) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _drawn(keys: Iterator[Array], shape: tuple[int, ...], mean: float, deviation: float) -> Array:
    noise = jax.random.truncated_normal(next(keys), -2, 2, shape) if deviation else jnp.zeros(shape)
    return mean + deviation / TRUNCATED * noise


def bind(definition: "nnx.GraphDef[Module]", params: Params) -> Module:
    """Put parameters back into a definition: a module to call, cheap enough to make inside every traced function."""
    module: Module = nnx.merge(definition, dequantised(unfreeze(params)))
    return module


@dataclass(frozen=True)
class Definition:
    """A whole checkpoint without its weights: static, hashable, equal for equal checkpoints.

    Attributes:
        unet: the denoiser's definition, `unet_config` its sizes.
        vae: the autoencoder's definition, `vae_config` its sizes.
        text_encoders: name in `params` and definition of each encoder, in the order in which the UNet reads them.
        dtype: of the denoiser's arithmetic.
        controlnets: name in `params` and definition of each ControlNet that is heard.
    """

    unet: "nnx.GraphDef[UNet]"
    vae: "nnx.GraphDef[VAE]"
    text_encoders: tuple[tuple[str, "nnx.GraphDef[CLIPText]"], ...]
    unet_config: UNetConfig
    vae_config: VAEConfig
    dtype: str
    controlnets: tuple[tuple[str, "nnx.GraphDef[ControlNet]"], ...] = ()

    @property
    def is_xl(self) -> bool:
        """Whether the UNet also hears pooled text and time ids, as SDXL's does."""
        return self.unet_config.projection_input_dim is not None
