"""From the parts of a checkpoint, wherever they came from, to a definition and its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
from flax.core import FrozenDict
from jax.typing import DTypeLike
from numpy.typing import NDArray

from sdjax.devices.target import local_target
from sdjax.errors import CheckpointError
from sdjax.loading.card import EMPTY, Card
from sdjax.loading.tokenizer import ClipTokenizer
from sdjax.loading.weights import LeafPath, Place, Tensor, fill
from sdjax.models import (
    FAMILIES,
    VAE,
    CLIPTextConfig,
    Definition,
    Family,
    Params,
    TextPart,
    VAEConfig,
    define,
    family_of,
)
from sdjax.schedulers import SchedulerConfig

Config = TypeVar("Config")
TEXT_ENCODERS = {part.component: part.tokenizer for family in FAMILIES.values() for part in family.texts}
"""The tokenizer's folder of each text encoder of any family."""


class Parts(NamedTuple):
    """A checkpoint before its weights are read.

    `configs` and `tensors` are by component ("unet", "vae", "text_encoder", "text_encoder_2", and for configs
    "scheduler" and "model_index"), tensors under their published names; `tokenizers` are by text encoder; `card` is
    empty where there is none.
    """

    source: str
    configs: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Tensor]]
    tokenizers: Mapping[str, ClipTokenizer]
    card: Card = EMPTY


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: data and static definition, no behaviour.

    `configs` are the config.json files as they were, for saving.
    """

    source: str
    definition: Definition
    params: Params
    tokenizers: tuple[ClipTokenizer, ...]
    scheduler: SchedulerConfig
    configs: Mapping[str, Mapping[str, Any]]
    card: Card = EMPTY


def assemble(parts: Parts, *, dtype: DTypeLike, placing: Callable[[Family], Place] | None = None) -> Checkpoint:
    """Define every model, then read its parameters one tensor at a time.

    Args:
        parts: what a folder or a file holds.
        dtype: of parameters and arithmetic. In float16 an autoencoder that its config calls fragile (`force_upcast`)
            stays in float32, both ways.
        placing: makes, for the family, the function that places a leaf by its path in the whole; None takes the default
            device.

    Raises:
        CheckpointError: a config, tensor or tokenizer does not fit; it is named.
    """
    dtype = jax.numpy.dtype(dtype)
    try:
        family = family_of(parts.configs)
    except ValueError as error:
        raise CheckpointError(f"{parts.source}: {error}") from error
    config = _config(parts, family.component, family.read_config)
    vae_config = _config(parts, "vae", VAEConfig.from_dict)
    vae_dtype = "float32" if vae_config.force_upcast and dtype == "float16" else dtype
    texts = [part for part in family.texts if part.component in parts.configs]
    unread = (TEXT_ENCODERS.keys() & parts.configs.keys()) - {part.component for part in texts}
    if not texts or unread:
        raise CheckpointError(
            f"{parts.source} has {' and '.join(sorted(unread)) or 'no text encoder'}, and its {family.component} is "
            f"for {' and '.join(part.component for part in family.texts)}"
        )
    text_configs = [_text_config(parts, part) for part in texts]
    try:
        family.check(config, vae_config, text_configs)
    except ValueError as error:
        raise CheckpointError(f"{parts.source}: {error}") from error
    models: list[tuple[str, Any, Any, DTypeLike]] = [
        (family.component, family.model, config, dtype),
        ("vae", VAE, vae_config, vae_dtype),
        *((part.component, part.model, config, dtype) for part, config in zip(texts, text_configs, strict=True)),
    ]
    place = placing(family) if placing is not None else _on_default_device
    target = local_target()
    defined, params = {}, {}
    for name, model, config, arithmetic in models:
        defined[name], shapes = define(model, config, dtype=arithmetic, param_dtype=arithmetic, target=target)
        in_model = partial(_in_model, place, name)
        params[name] = fill(shapes, parts.tensors[name], component=f"{parts.source}: {name}", place=in_model)
    definition = Definition(
        family=family,
        denoiser=defined[family.component],
        vae=defined["vae"],
        text_encoders=tuple((part.component, defined[part.component]) for part in texts),
        dtype=dtype.name,
        target=target,
    )
    return Checkpoint(
        source=parts.source,
        definition=definition,
        params=FrozenDict(params),
        tokenizers=tuple(parts.tokenizers[part.component] for part in texts),
        scheduler=_config(parts, "scheduler", SchedulerConfig.from_dict),
        configs=parts.configs,
        card=parts.card,
    )


def _on_default_device(_: LeafPath, array: NDArray[Any]) -> Any:
    return jax.device_put(array)


def _in_model(place: Place, name: str, path: LeafPath, array: NDArray[Any]) -> Any:
    return place((name, *path), array)


def _config(parts: Parts, name: str, read: Callable[[Mapping[str, Any]], Config]) -> Config:
    if name not in parts.configs:
        raise CheckpointError(f"{parts.source} has no {name}")
    try:
        return read(parts.configs[name])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{parts.source}: {error}") from error


def _text_config(parts: Parts, part: TextPart) -> Any:
    name = part.component
    config = _config(parts, name, part.read_config)
    where = f"{parts.source}: {name}"
    projection = parts.tensors[name].get("text_projection.weight")
    if projection is not None and config.projection_dim not in (None, projection.shape[0]):
        raise CheckpointError(
            f"{where}: projection_dim is {config.projection_dim} in its config, and {projection.shape[0]} in "
            f"{projection.file.name}"
        )
    return _fitted(config, parts.tokenizers[name], where)


def _fitted(config: CLIPTextConfig, tokenizer: ClipTokenizer, where: str) -> CLIPTextConfig:
    """Check that every id the tokenizer can give has a row, for JAX would clamp it without a word."""
    words = tokenizer.text.get_vocab_size(with_added_tokens=True)
    if words > config.vocab_size:
        raise CheckpointError(f"{where} has embeddings for {config.vocab_size} tokens, its tokenizer has {words}")
    if tokenizer.length > config.max_position_embeddings:
        raise CheckpointError(
            f"{where} has {config.max_position_embeddings} positions, its tokenizer fills {tokenizer.length}"
        )
    return replace(config, eos_token_id=tokenizer.end)
