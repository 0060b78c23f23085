"""The conditional UNet of SD 1, SD 2 and SDXL (diffusers `UNet2DConditionModel`)."""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from typing_extensions import Unpack

from sdjax.models.attention import Transformer2D
from sdjax.models.layers import Conv, GroupNorm, Linear, Setup, silu, timestep_embedding
from sdjax.models.resnet import Downsample, ResnetBlock, Upsample
from sdjax.models.unet.config import UNetConfig


class AddedConditioning(NamedTuple):
    """Conditioning beside the text that is attended to; each part is None in models that do not read it.

    Attributes:
        text_embeds: SDXL's pooled text, (batch, channels).
        time_ids: SDXL's micro-conditioning, (batch, 6), or its refiner's, (batch, 5).
        guidance: sinusoids of the guidance scale, (batch, time_cond_proj_dim), of models distilled to read it.
    """

    text_embeds: Array | None = None
    time_ids: Array | None = None
    guidance: Array | None = None


class TimestepMLP(nnx.Module):
    """Map sinusoids to the vector that conditions every residual block."""

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
                raise ValueError("this UNet was distilled to read the guidance scale: it needs `added.guidance`")
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


def embed_time(model: _HasTimeLayers, config: UNetConfig, timesteps: Array, added: AddedConditioning | None) -> Array:
    """Embed timesteps and added conditioning for a model's residual blocks: (batch, time channels)."""

    def sinusoids(numbers: Array, channels: int) -> Array:
        return timestep_embedding(
            numbers, channels, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        ).astype(model.dtype)

    added = AddedConditioning() if added is None else added
    time = model.time_embedding(sinusoids(timesteps, config.block_out_channels[0]), added.guidance)
    if model.add_embedding is None:
        return time
    if added.text_embeds is None or added.time_ids is None:
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
    """Predict noise, velocity or clean latents, as it was trained, from noisy latents, a time and a text."""

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
        residuals: Sequence[Array] | None = None,
    ) -> Array:
        """Predict.

        Args:
            sample: (batch, height, width, in_channels).
            timesteps: (batch,), real numbers on the training schedule's axis.
            context: the text, (batch, tokens, context_channels).
            added: conditioning of SDXL and of models distilled for guidance; the others take None.
            residuals: a ControlNet's sums for each feature map of the way down, and last for the lowest one.

        Returns:
            (batch, height, width, out_channels) in the compute dtype.
        """
        sample, context = sample.astype(self.dtype), context.astype(self.dtype)
        time = embed_time(self, self.config, timesteps, added)
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
