"""From the parts of a checkpoint, wherever they came from, to a definition and its parameters."""

from collections.abc import Callable, Mapping, Sequence
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
from sdjax.models import VAE, CLIPText, CLIPTextConfig, Definition, Params, UNet, UNetConfig, VAEConfig, define
from sdjax.schedulers import SchedulerConfig

Config = TypeVar("Config")
TIME_IDS = (5, 6)
"""Numbers of SDXL's micro-conditioning: sizes and crop (6), or sizes, crop and an aesthetic score (5, a refiner)."""
TEXT_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


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


def assemble(parts: Parts, *, dtype: DTypeLike, place: Place | None = None) -> Checkpoint:
    """Define every model, then read its parameters one tensor at a time.

    Args:
        parts: what a folder or a file holds.
        dtype: of parameters and arithmetic. In float16 an autoencoder that its config calls fragile (`force_upcast`)
            stays in float32, both ways.
        place: puts a leaf, by its path in the whole, on its device or devices; the default device without it.

    Raises:
        CheckpointError: a config, tensor or tokenizer does not fit; it is named.
    """
    place = place or (lambda _, array: jax.device_put(array))
    dtype = jax.numpy.dtype(dtype)
    unet_config = _config(parts, "unet", UNetConfig.from_dict)
    vae_config = _config(parts, "vae", VAEConfig.from_dict)
    vae_dtype = "float32" if vae_config.force_upcast and dtype == "float16" else dtype
    models: dict[str, tuple[Any, Any, DTypeLike]] = {
        "unet": (UNet, unet_config, dtype),
        "vae": (VAE, vae_config, vae_dtype),
    }
    encoders = [name for name in TEXT_ENCODERS if name in parts.configs]
    if not encoders:
        raise CheckpointError(f"{parts.source} has no text encoder")
    for name in encoders:
        config = _config(parts, name, CLIPTextConfig.from_dict)
        where = f"{parts.source}: {name}"
        projection = parts.tensors[name].get("text_projection.weight")
        if projection is not None and config.projection_dim not in (None, projection.shape[0]):
            raise CheckpointError(
                f"{where}: projection_dim is {config.projection_dim} in its config, and {projection.shape[0]} in "
                f"{projection.file.name}"
            )
        models[name] = (CLIPText, _fitted(config, parts.tokenizers[name], where), dtype)
    _check_widths(parts.source, unet_config, vae_config, [models[name][1] for name in encoders])
    definitions, params = {}, {}
    for name, (model, config, arithmetic) in models.items():
        definitions[name], shapes = define(model, config, dtype=arithmetic, param_dtype=arithmetic)
        in_model = partial(_in_model, place, name)
        params[name] = fill(shapes, parts.tensors[name], component=f"{parts.source}: {name}", place=in_model)
    definition = Definition(
        unet=definitions["unet"],
        vae=definitions["vae"],
        text_encoders=tuple((name, definitions[name]) for name in encoders),
        dtype=dtype.name,
        target=local_target(),
    )
    return Checkpoint(
        source=parts.source,
        definition=definition,
        params=FrozenDict(params),
        tokenizers=tuple(parts.tokenizers[name] for name in encoders),
        scheduler=_config(parts, "scheduler", SchedulerConfig.from_dict),
        configs=parts.configs,
        card=parts.card,
    )


def _in_model(place: Place, name: str, path: LeafPath, array: NDArray[Any]) -> Any:
    return place((name, *path), array)


def _config(parts: Parts, name: str, read: Callable[[Mapping[str, Any]], Config]) -> Config:
    if name not in parts.configs:
        raise CheckpointError(f"{parts.source} has no {name}")
    try:
        return read(parts.configs[name])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{parts.source}: {error}") from error


def _check_widths(source: str, unet: UNetConfig, vae: VAEConfig, texts: Sequence[CLIPTextConfig]) -> None:
    """Check that what one model gives is what the other takes: each may be well formed, and from another checkpoint."""
    text = sum(config.hidden_size for config in texts)
    if unet.context_channels != text:
        raise CheckpointError(
            f"{source}: the UNet's cross_attention_dim is {unet.context_channels}, and the text encoders give {text} "
            "channels"
        )
    inpainting = 2 * vae.latent_channels + 1
    if unet.in_channels not in (vae.latent_channels, inpainting):
        raise CheckpointError(
            f"{source}: the UNet's in_channels is {unet.in_channels}, and only {vae.latent_channels} (the latents) and "
            f"{inpainting} (for inpainting a mask and masked latents too) are supported"
        )
    if unet.projection_input_dim is not None:
        pooled = texts[-1].projection_dim or texts[-1].hidden_size
        each = unet.addition_time_embed_dim or 0
        if each <= 0 or unet.projection_input_dim not in (pooled + ids * each for ids in TIME_IDS):
            raise CheckpointError(
                f"{source}: the UNet's projection_class_embeddings_input_dim is {unet.projection_input_dim}, which is "
                f"not the pooled text's {pooled} and {' or '.join(map(str, TIME_IDS))} time ids of {each}"
            )


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
