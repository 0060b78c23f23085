"""A model taken apart: what it is built from, which is static, and the parameters that fill it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, unfreeze
from jax import Array
from jax.typing import DTypeLike

from sdjax.devices.target import Target, local_target
from sdjax.models.family import DenoiserConfig, Family
from sdjax.models.kernels import Forms, forms_for
from sdjax.models.quantised import dequantised
from sdjax.models.vae import VAE, VAEConfig

Params: TypeAlias = FrozenDict[Any, Any]
"""A nested immutable mapping whose leaves are arrays; a path joined with dots is the checkpoint's name.

A large weight may be `Quantised` instead of an array."""

TRUNCATED = 0.87962566
"""Standard deviation of a normal variable that is cut off at two of its deviations."""

Module = TypeVar("Module", bound=nnx.Module)
Config = TypeVar("Config")


@dataclass(frozen=True)
class Architecture(Generic[Module]):
    """A model without its parameters: static, and equal where it is built from the same.

    A call of a compiled function hashes what is static. Flax's `GraphDef` walks the whole network for that, which takes
    milliseconds, so what it is made from stands for it.

    Attributes:
        model: the module's class, built as `model(config, dtype=, forms=, make=)`.
        config: its frozen config.
        dtype: of the arithmetic.
        forms: of its kernels, which depend on the device.
    """

    model: Callable[..., Module]
    config: Any
    dtype: str
    forms: Forms


def define(
    model: Callable[..., Module],
    config: Any,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    target: Target | None = None,
) -> tuple[Architecture[Module], Params]:
    """Describe a model without making any weight.

    Args:
        model: a module's class, built as `model(config, dtype=, forms=, make=)`.
        config: its frozen config.
        dtype: of the arithmetic.
        param_dtype: of the parameters.
        target: the kind of device that it is for; None is this process's own.

    Returns:
        The architecture, and the tree of `jax.ShapeDtypeStruct` that it needs.
    """
    architecture = Architecture(model, config, jnp.dtype(dtype).name, forms_for(target or local_target()))
    _, shapes = _split(architecture)
    return architecture, FrozenDict(jax.tree.map(lambda leaf: leaf.update(dtype=param_dtype), shapes))


@cache
def _split(architecture: Architecture[Module]) -> tuple["nnx.GraphDef[Module]", Any]:
    described = architecture.model(
        architecture.config, dtype=architecture.dtype, forms=architecture.forms, make=_described
    )
    graph, state = nnx.split(described)
    return graph, nnx.to_pure_dict(state)


def initialise(model: Callable[..., Module], config: Any, *, dtype: DTypeLike, seed: int) -> Params:
    """Draw fresh float32 parameters, as a training run starts from."""

    def draw() -> Any:
        keys = map(partial(jax.random.fold_in, jax.random.key(seed)), count())
        module = model(config, dtype=dtype, forms=forms_for(local_target()), make=partial(_drawn, keys))
        return nnx.to_pure_dict(nnx.split(module)[1])

    return FrozenDict(jax.jit(draw)())


def _described(shape: tuple[int, ...], mean: float, deviation: float) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[no-untyped-call]


def _drawn(keys: Iterator[Array], shape: tuple[int, ...], mean: float, deviation: float) -> Array:
    noise = jax.random.truncated_normal(next(keys), -2, 2, shape) if deviation else jnp.zeros(shape)
    return mean + deviation / TRUNCATED * noise


def bind(architecture: Architecture[Module], params: Params) -> Module:
    """Put parameters into an architecture: a module to call, cheap enough to make inside every traced function."""
    graph, _ = _split(architecture)
    module: Module = nnx.merge(graph, dequantised(unfreeze(params)))
    return module


@dataclass(frozen=True)
class Definition:
    """A whole checkpoint without its weights: static, hashable, equal for equal checkpoints.

    Attributes:
        family: how its parts work together.
        denoiser: under `family.component` in `params`.
        vae: the autoencoder, under "vae".
        text_encoders: each encoder's name in `params`, and itself, in the order of `family.texts`.
        dtype: of the denoiser's arithmetic.
        target: the kind of device that its programs are traced for.
        controlnets: each ControlNet's name in `params`, and itself.
    """

    family: Family
    denoiser: Architecture[Any]
    vae: Architecture[VAE]
    text_encoders: tuple[tuple[str, Architecture[Any]], ...]
    dtype: str
    target: Target
    controlnets: tuple[tuple[str, Architecture[Any]], ...] = ()

    def on(self, target: Target) -> "Definition":
        """The same models for another kind of device."""
        return replace(self.with_forms(forms_for(target)), target=target)

    def with_forms(self, forms: Forms) -> "Definition":
        """The same models with their kernels computed in other forms."""

        def moved(named: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
            return tuple((name, replace(architecture, forms=forms)) for name, architecture in named)

        return replace(
            self,
            denoiser=replace(self.denoiser, forms=forms),
            vae=replace(self.vae, forms=forms),
            text_encoders=moved(self.text_encoders),
            controlnets=moved(self.controlnets),
        )

    @property
    def networks(self) -> tuple[str, ...]:
        """Names in `params` of the denoiser and its ControlNets."""
        return self.family.component, *(name for name, _ in self.controlnets)

    @property
    def denoiser_config(self) -> DenoiserConfig:
        """The denoiser's sizes."""
        config: DenoiserConfig = self.denoiser.config
        return config

    @property
    def vae_config(self) -> VAEConfig:
        """The autoencoder's sizes."""
        config: VAEConfig = self.vae.config
        return config

    @property
    def multiple(self) -> int:
        """Number of pixels that divides the sides of its pictures."""
        return self.vae_config.factor * self.denoiser_config.patch

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels of the pictures that it was trained on."""
        height, width = self.denoiser_config.native_size
        return width * self.vae_config.factor, height * self.vae_config.factor

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser sees a mask and masked latents beside the latents, and does nothing but inpaint."""
        return self.denoiser_config.in_channels != self.vae_config.latent_channels
