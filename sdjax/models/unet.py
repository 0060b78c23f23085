"""The conditional UNet of SD 1, SD 2 and SDXL (diffusers `UNet2DConditionModel`)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from typing_extensions import Unpack

from sdjax.devices.sharding import INPUT, OUTPUT, Split
from sdjax.models.attention import Transformer2D
from sdjax.models.config import check_keys, check_names, check_types, per_block, sides
from sdjax.models.layers import Conv, GroupNorm, Linear, Setup, silu, timestep_embedding
from sdjax.models.resnet import Downsample, ResnetBlock, Upsample

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCKS = {None: None, "UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet. Tuples have one entry a block, from the highest resolution down, in both directions.

    `sample_sides`: (height, width) of the latents that it was trained on; `sample_size` in a config.json.
    """

    in_channels: int
    out_channels: int
    sample_sides: tuple[int, int]
    block_out_channels: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    mid_attention: bool | None
    layers_per_block: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    heads: tuple[int, ...]
    cross_attention_dim: tuple[int, ...]
    use_linear_projection: bool
    norm_num_groups: int
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: float
    time_cond_proj_dim: int | None
    addition_time_embed_dim: int | None
    projection_input_dim: int | None

    @property
    def context_channels(self) -> int:
        """Channels of the text that cross-attention reads."""
        return self.cross_attention_dim[0]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Read a config.json, with the defaults of diffusers for what it leaves out.

        Raises:
            ValueError: it asks for something that this implementation does not do, or a list has a wrong length.
        """
        check_keys(config, model="UNet", read=_READ, fixed=_FIXED, ignored=_IGNORED)
        given = {key: value for key, value in config.items() if value is not None or key == "mid_block_type"}
        config = {**_DEFAULTS, **given}
        check_names(config, ("down_block_types", "up_block_types"), model="UNet")
        widths = config["block_out_channels"]
        if not isinstance(widths, list | tuple):
            raise ValueError(f"UNet config: block_out_channels is {widths!r}, which should be a list of whole numbers")
        blocks = len(widths)

        def each(key: str, value: Any = None) -> tuple[Any, ...]:
            return per_block(config[key] if value is None else value, blocks, key=key, model="UNet")

        def attends(key: str, known: Mapping[Any, Any]) -> tuple[bool, ...]:
            if unknown := [name for name in config[key] if name not in known]:
                raise ValueError(f"UNet config: {key} has {unknown[0]!r}, and only {' and '.join(known)} are supported")
            return each(key, [known[name] for name in config[key]])

        if config["mid_block_type"] not in tuple(MID_BLOCKS):
            raise ValueError(f"UNet config: mid_block_type is {config['mid_block_type']!r}, which is not supported")
        if config["addition_embed_type"] not in (None, "text_time"):
            raise ValueError(f"UNet config: addition_embed_type is {config['addition_embed_type']!r}, not 'text_time'")
        has_time_ids = config["addition_embed_type"] == "text_time"
        # `attention_head_dim` has always meant the number of heads (diffusers issue 2011); published configs rely on it
        heads_key = "num_attention_heads" if config["num_attention_heads"] is not None else "attention_head_dim"
        made = cls(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            sample_sides=sides(config["sample_size"], key="sample_size", model="UNet"),
            block_out_channels=tuple(widths),
            down_attention=attends("down_block_types", DOWN_BLOCKS),
            up_attention=attends("up_block_types", UP_BLOCKS)[::-1],
            mid_attention=MID_BLOCKS[config["mid_block_type"]],
            layers_per_block=each("layers_per_block"),
            transformer_layers=each("transformer_layers_per_block"),
            heads=each(heads_key),
            cross_attention_dim=each("cross_attention_dim"),
            use_linear_projection=config["use_linear_projection"],
            norm_num_groups=config["norm_num_groups"],
            norm_eps=config["norm_eps"],
            flip_sin_to_cos=config["flip_sin_to_cos"],
            freq_shift=config["freq_shift"],
            time_cond_proj_dim=config["time_cond_proj_dim"],
            addition_time_embed_dim=config["addition_time_embed_dim"] if has_time_ids else None,
            projection_input_dim=config["projection_class_embeddings_input_dim"] if has_time_ids else None,
        )
        return check_types(made, model="UNet")


_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_cond_proj_dim": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
_READ = tuple(_DEFAULTS)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_only_cross_attention": (None, False),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
# Softmax and its scores are in float32 here always, so `upcast_attention` has nothing left to ask for.
_IGNORED = ("upcast_attention", "dropout", "addition_embed_type_num_heads")


SPLITS = tuple(
    Split(re.compile(rf"^(unet|controlnet\w*)\..*{pattern}"), axis)
    for pattern, axis in (
        (r"\.attn\d\.to_[qkv]\.weight", OUTPUT),
        (r"\.attn\d\.to_out\.0\.weight", INPUT),
        (r"\.ff\.net\.0\.proj\.(weight|bias)", OUTPUT),
        (r"\.ff\.net\.2\.weight", INPUT),
        (r"\.resnets\.\d+\.(conv1|time_emb_proj)\.(weight|bias)", OUTPUT),
        (r"\.resnets\.\d+\.norm2\.(weight|bias)", OUTPUT),
        (r"\.resnets\.\d+\.conv2\.weight", INPUT),
    )
)
"""Parameters that a mesh splits over `model`. The rest is whole on every device: text encoders and autoencoder, which
run once a picture; convolutions without a second one to pair with; biases of a sum; norms of what is whole."""


class AddedConditioning(NamedTuple):
    """What SDXL's UNet hears beside the prompt: pooled text (batch, channels) and time ids (batch, 5 or 6)."""

    text_embeds: Array
    time_ids: Array


class TimestepMLP(nnx.Module):
    """Sinusoids to the vector that every residual block hears."""

    def __init__(
        self, in_channels: int, channels: int, *, condition_channels: int | None = None, **setup: Unpack[Setup]
    ) -> None:
        self.linear_1 = Linear(in_channels, channels, **setup)
        self.linear_2 = Linear(channels, channels, **setup)
        self.cond_proj = (
            None if condition_channels is None else Linear(condition_channels, in_channels, use_bias=False, **setup)
        )

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """Map (batch, in_channels) to (batch, channels)."""
        if self.cond_proj is not None:
            if condition is None:
                raise ValueError(
                    "this UNet needs `timestep_condition`: it was distilled for an embedded guidance scale"
                )
            x = x + self.cond_proj(condition)
        return self.linear_2(silu(self.linear_1(x)))


def time_layers(config: UNetConfig, **setup: Unpack[Setup]) -> tuple[TimestepMLP, TimestepMLP | None]:
    """The layers `time_embedding` and, for SDXL, `add_embedding`."""
    width = config.block_out_channels[0]
    time = TimestepMLP(width, 4 * width, condition_channels=config.time_cond_proj_dim, **setup)
    if config.projection_input_dim is None:
        return time, None
    return time, TimestepMLP(config.projection_input_dim, 4 * width, **setup)


class _HasTimeLayers(Protocol):
    time_embedding: TimestepMLP
    add_embedding: TimestepMLP | None
    dtype: DTypeLike


def embed_time(
    model: _HasTimeLayers,
    config: UNetConfig,
    timesteps: Array,
    added: AddedConditioning | None,
    condition: Array | None,
) -> Array:
    """What a model's residual blocks hear: (batch, time channels), of its timesteps and added conditioning."""

    def sinusoids(numbers: Array, channels: int) -> Array:
        return timestep_embedding(
            numbers, channels, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        ).astype(model.dtype)

    time = model.time_embedding(sinusoids(timesteps, config.block_out_channels[0]), condition)
    if model.add_embedding is None:
        return time
    if added is None:
        raise ValueError("this UNet needs `added`: pooled text embeddings and time ids (SDXL)")
    ids = sinusoids(added.time_ids.reshape(-1), config.addition_time_embed_dim or 0).reshape(timesteps.shape[0], -1)
    return time + model.add_embedding(jnp.concatenate([added.text_embeds.astype(model.dtype), ids], axis=-1))


def feature_maps(config: UNetConfig) -> list[int]:
    """Channels of every feature map that the way down gives to the way up."""
    widths = config.block_out_channels
    maps = [widths[0]]
    for level, width in enumerate(widths):
        maps += [width] * (config.layers_per_block[level] + (level < len(widths) - 1))
    return maps


def _resnets(config: UNetConfig, channels: int, inputs: Sequence[int], **setup: Unpack[Setup]) -> "nnx.List[Any]":
    block = partial(
        ResnetBlock,
        groups=config.norm_num_groups,
        epsilon=config.norm_eps,
        time_channels=4 * config.block_out_channels[0],
        **setup,
    )
    return nnx.List([block(width, channels) for width in inputs])


def _transformers(config: UNetConfig, level: int, count: int, **setup: Unpack[Setup]) -> "nnx.List[Any]":
    return nnx.List(
        [
            Transformer2D(
                config.block_out_channels[level],
                config.cross_attention_dim[level],
                config.heads[level],
                layers=config.transformer_layers[level],
                groups=config.norm_num_groups,
                linear_projection=config.use_linear_projection,
                **setup,
            )
            for _ in range(count)
        ]
    )


class DownBlock(nnx.Module):
    """One resolution of the way down; gives its feature maps to the way up."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int, **setup: Unpack[Setup]) -> None:
        channels, layers = config.block_out_channels[level], config.layers_per_block[level]
        last = level == len(config.block_out_channels) - 1
        self.resnets = _resnets(config, channels, [in_channels] + [channels] * (layers - 1), **setup)
        self.attentions = _transformers(config, level, layers if config.down_attention[level] else 0, **setup)
        self.downsamplers = nnx.List([] if last else [Downsample(channels, **setup)])

    def __call__(self, x: Array, time: Array, context: Array) -> list[Array]:
        """Give every feature map, the lowest resolution last."""
        skips = []
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = resnet(x, time)
            x = x if transformer is None else transformer(x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return skips


class MidBlock(nnx.Module):
    """The lowest resolution: residual, transformer, residual."""

    def __init__(self, config: UNetConfig, **setup: Unpack[Setup]) -> None:
        channels = config.block_out_channels[-1]
        # diffusers' block without attention has one residual block only, the other two
        self.resnets = _resnets(config, channels, [channels] * (2 if config.mid_attention else 1), **setup)
        self.attentions = _transformers(config, -1, 1 if config.mid_attention else 0, **setup)

    def __call__(self, x: Array, time: Array, context: Array) -> Array:
        """Keep the size of x, (batch, height, width, channels)."""
        first, *rest = self.resnets
        x = first(x, time)
        for transformer, resnet in zip(self.attentions, rest, strict=True):
            x = resnet(transformer(x, context), time)
        return x


class _UpBlock(nnx.Module):
    """One resolution of the way up; every residual block reads one feature map of the way down."""

    def __init__(
        self, config: UNetConfig, level: int, in_channels: int, skips: Sequence[int], **setup: Unpack[Setup]
    ) -> None:
        channels = config.block_out_channels[level]
        previous = [in_channels] + [channels] * (len(skips) - 1)
        inputs = [width + skip for width, skip in zip(previous, skips, strict=True)]
        self.resnets = _resnets(config, channels, inputs, **setup)
        self.attentions = _transformers(config, level, len(skips) if config.up_attention[level] else 0, **setup)
        self.upsamplers = nnx.List([] if level == 0 else [Upsample(channels, **setup)])

    def __call__(self, x: Array, time: Array, context: Array, skips: Sequence[Array], size: tuple[int, int]) -> Array:
        for resnet, transformer, skip in zip_longest(self.resnets, self.attentions, skips):
            x = resnet(jnp.concatenate([x, skip], axis=-1), time)
            x = x if transformer is None else transformer(x, context)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet(nnx.Module):
    """Predicts, from noisy latents, a time and a text, what a sampler needs (noise, velocity or the clean latents)."""

    def __init__(self, config: UNetConfig, **setup: Unpack[Setup]) -> None:
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], 3, **setup)
        self.time_embedding, self.add_embedding = time_layers(config, **setup)
        self.down_blocks = nnx.List(
            [DownBlock(config, level, widths[max(level - 1, 0)], **setup) for level in range(len(widths))]
        )
        self.mid_block = None if config.mid_attention is None else MidBlock(config, **setup)
        skips = feature_maps(config)
        blocks, below = [], widths[-1]
        for level in reversed(range(len(widths))):
            taken = [skips.pop() for _ in range(config.layers_per_block[level] + 1)]
            blocks.append(_UpBlock(config, level, below, taken, **setup))
            below = widths[level]
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], epsilon=config.norm_eps, **setup)
        self.conv_out = Conv(widths[0], config.out_channels, 3, **setup)
        self.config = config
        self.dtype = setup["dtype"]

    def __call__(
        self,
        sample: Array,
        timesteps: Array,
        context: Array,
        added: AddedConditioning | None = None,
        timestep_condition: Array | None = None,
        residuals: Sequence[Array] | None = None,
    ) -> Array:
        """Predict.

        Args:
            sample: (batch, height, width, in_channels).
            timesteps: (batch,), real numbers on the training schedule's axis.
            context: the text, (batch, tokens, context_channels).
            added: SDXL's pooled text and time ids; models without them take None.
            timestep_condition: (batch, time_cond_proj_dim) of models distilled for guidance, else None.
            residuals: what ControlNets add to each feature map of the way down, and last to the lowest one.

        Returns:
            (batch, height, width, out_channels) in the compute dtype.
        """
        sample, context = sample.astype(self.dtype), context.astype(self.dtype)
        time = embed_time(self, self.config, timesteps, added, timestep_condition)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time, context)
        x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], time, context)
        if residuals is not None:
            *skips, x = (a + b.astype(self.dtype) for a, b in zip([*skips, x], residuals, strict=True))
        for up in self.up_blocks:
            taken = [skips.pop() for _ in up.resnets]
            height, width = skips[-1].shape[1:3] if skips else x.shape[1:3]
            x = up(x, time, context, taken, (height, width))
        return self.conv_out(silu(self.conv_norm_out(x)))
