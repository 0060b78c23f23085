"""The variational autoencoder between pictures and latents (diffusers `AutoencoderKL`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from typing_extensions import Unpack

from sdjax.models.config import check_keys, check_names, check_types, sides
from sdjax.models.kernels import attend
from sdjax.models.layers import Conv, GroupNorm, Linear, Setup, silu
from sdjax.models.resnet import Downsample, ResnetBlock, Upsample

EPSILON = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of an autoencoder, as its config.json has them."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int = 32

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Read a config.json.

        Raises:
            ValueError: it asks for something that this implementation does not do.
        """
        read = cls.__dataclass_fields__
        check_names(config, ("down_block_types", "up_block_types"), model="VAE")
        block = {"DownEncoderBlock2D"}, {"UpDecoderBlock2D"}
        for key, names in zip(("down_block_types", "up_block_types"), block, strict=True):
            if other := set(config.get(key, names)) - names:
                raise ValueError(f"VAE config: {key} has {sorted(other)}, and only {sorted(names)} is supported")
        check_keys(
            config,
            model="VAE",
            read=[*read, "down_block_types", "up_block_types"],
            fixed={"act_fn": ("silu", "swish"), "shift_factor": (None, 0, 0.0)},
            ignored=(),
        )
        values = {key: config[key] for key in read if config.get(key) is not None}
        if isinstance(widths := values.get("block_out_channels"), list):
            values["block_out_channels"] = tuple(widths)
        if "sample_size" in values:
            values["sample_size"] = sides(values["sample_size"], key="sample_size", model="VAE")[0]
        return check_types(cls(**values), model="VAE")


class Moments(NamedTuple):
    """The Gaussian that the encoder sees a picture as, unscaled: each (batch, height, width, latent_channels)."""

    mean: Array
    log_variance: Array


class _MidBlock(nnx.Module):
    def __init__(self, channels: int, *, groups: int, attends: bool, **setup: Unpack[Setup]) -> None:
        self.resnets = nnx.List(
            [ResnetBlock(channels, channels, groups=groups, epsilon=EPSILON, **setup) for _ in range(2)]
        )
        self.attentions = nnx.List([_PixelAttention(channels, groups=groups, **setup)] if attends else [])

    def __call__(self, x: Array) -> Array:
        first, last = self.resnets
        for layer in (first, *self.attentions, last):
            x = layer(x)
        return x


class _PixelAttention(nnx.Module):
    """One head over all pixels, added to them; its norm lies among the projections, as the checkpoint's does."""

    def __init__(self, channels: int, *, groups: int, **setup: Unpack[Setup]) -> None:
        self.group_norm = GroupNorm(groups, channels, epsilon=EPSILON, **setup)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels, **setup) for _ in range(3))
        self.to_out = nnx.List([Linear(channels, channels, **setup)])
        self.forms = setup["forms"]

    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, 1, channels)
        seen = attend(self.forms, self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](seen).reshape(x.shape)


def _resnets(
    in_channels: int, out_channels: int, *, layers: int, groups: int, **setup: Unpack[Setup]
) -> "nnx.List[ResnetBlock]":
    inputs = [in_channels] + [out_channels] * (layers - 1)
    return nnx.List([ResnetBlock(width, out_channels, groups=groups, epsilon=EPSILON, **setup) for width in inputs])


class _DownBlock(nnx.Module):
    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, groups: int, last: bool, **setup: Unpack[Setup]
    ) -> None:
        self.resnets = _resnets(in_channels, out_channels, layers=layers, groups=groups, **setup)
        self.downsamplers = nnx.List([] if last else [Downsample(out_channels, padding=(0, 1), **setup)])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class _UpBlock(nnx.Module):
    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, groups: int, last: bool, **setup: Unpack[Setup]
    ) -> None:
        self.resnets = _resnets(in_channels, out_channels, layers=layers, groups=groups, **setup)
        self.upsamplers = nnx.List([] if last else [Upsample(out_channels, **setup)])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Pictures to the parameters of a Gaussian over latents."""

    def __init__(self, config: VAEConfig, **setup: Unpack[Setup]) -> None:
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], 3, **setup)
        block = partial(_DownBlock, layers=config.layers_per_block, groups=groups, **setup)
        last = len(widths) - 1
        self.down_blocks = nnx.List(
            [block(widths[max(i - 1, 0)], width, last=i == last) for i, width in enumerate(widths)]
        )
        self.mid_block = _MidBlock(widths[-1], groups=groups, attends=config.mid_block_add_attention, **setup)
        self.conv_norm_out = GroupNorm(groups, widths[-1], epsilon=EPSILON, **setup)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, **setup)

    def __call__(self, x: Array) -> Array:
        """Map (batch, height, width, in) to (batch, height/f, width/f, 2 * latent_channels)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to pictures."""

    def __init__(self, config: VAEConfig, **setup: Unpack[Setup]) -> None:
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3, **setup)
        self.mid_block = _MidBlock(widths[0], groups=groups, attends=config.mid_block_add_attention, **setup)
        block = partial(_UpBlock, layers=config.layers_per_block + 1, groups=groups, **setup)
        last = len(widths) - 1
        self.up_blocks = nnx.List(
            [block(widths[max(i - 1, 0)], width, last=i == last) for i, width in enumerate(widths)]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], epsilon=EPSILON, **setup)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, **setup)

    def __call__(self, x: Array) -> Array:
        """Map (batch, height, width, latent_channels) to (batch, height * f, width * f, out)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Encoder and decoder, in the checkpoint's own (unscaled) latents."""

    def __init__(self, config: VAEConfig, **setup: Unpack[Setup]) -> None:
        channels = config.latent_channels
        self.encoder = Encoder(config, **setup)
        self.decoder = Decoder(config, **setup)
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, **setup) if config.use_quant_conv else None
        self.post_quant_conv = Conv(channels, channels, 1, **setup) if config.use_post_quant_conv else None
        self.config = config

    def encode(self, pictures: Array) -> Moments:
        """Map pictures (batch, height, width, 3) in -1..1 to float32 moments at 1/f of the size."""
        moments = self.encoder(pictures)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: Array) -> Array:
        """Map latents (batch, height, width, latent_channels) to float32 pictures at f times the size, about -1..1."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)
