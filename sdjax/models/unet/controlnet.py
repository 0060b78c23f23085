"""ControlNet: a copy of the UNet's way down that also sees a picture, and adds to the UNet's feature maps.

Zhang et al. 2023, arXiv 2302.05543; diffusers `ControlNetModel`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flax import nnx
from jax import Array
from typing_extensions import Unpack

from sdjax.models.config import check_names, check_types
from sdjax.models.layers import Conv, Setup, silu
from sdjax.models.unet.config import UNetConfig
from sdjax.models.unet.unet import AddedConditioning, DownBlock, MidBlock, embed_time, feature_maps, time_layers


@dataclass(frozen=True)
class ControlNetConfig:
    """The sizes of a ControlNet: of the UNet that it copies, and of the layers that read the picture.

    Attributes:
        unet: sizes of the way down; those of the way up mean nothing.
        hint_channels: channels of the picture's feature maps, from its own resolution down by halves.
        bgr: whether the picture's channels are read in reverse.
    """

    unet: UNetConfig
    hint_channels: tuple[int, ...]
    bgr: bool

    @property
    def in_channels(self) -> int:
        """Channels of the latents that it sees."""
        return self.unet.in_channels

    @property
    def feature_maps(self) -> int:
        """How many it adds to."""
        return len(feature_maps(self.unet)) + 1

    def misfit(self, denoiser: Any) -> str | None:
        """Say why it can't condition a denoiser of this config; None where it can."""
        for field in ("block_out_channels", "layers_per_block", "cross_attention_dim"):
            theirs, ours = getattr(self.unet, field), getattr(denoiser, field, None)
            if ours != theirs:
                return f"its {field} is {theirs}, this one's {ours}"
        return None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ControlNetConfig":
        """Read a config.json.

        Raises:
            ValueError: it asks for something that this implementation does not do.
        """
        if config.get("global_pool_conditions"):
            raise ValueError("ControlNet config: global_pool_conditions is not supported")
        if config.get("conditioning_channels", 3) != 3:
            raise ValueError(f"ControlNet config: conditioning_channels is {config['conditioning_channels']}, not 3")
        order = config.get("controlnet_conditioning_channel_order", "rgb")
        if order not in ("rgb", "bgr"):
            raise ValueError(
                f"ControlNet config: controlnet_conditioning_channel_order is {order!r}, not 'rgb' or 'bgr'"
            )
        check_names(config, ("down_block_types",), model="ControlNet")
        hints = config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
        if not isinstance(hints, list | tuple):
            raise ValueError(f"ControlNet config: conditioning_embedding_out_channels is {hints!r}, not a list")
        down = config.get("down_block_types") or (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
        rest = {key: value for key, value in config.items() if key not in _OWN}
        up = ["CrossAttnUpBlock2D" if "Attn" in name else "UpBlock2D" for name in reversed(down)]
        made = cls(
            unet=UNetConfig.from_dict({**rest, "down_block_types": down, "up_block_types": up}),
            hint_channels=tuple(hints),
            bgr=order == "bgr",
        )
        return check_types(made, model="ControlNet")


_OWN = (
    "global_pool_conditions",
    "conditioning_channels",
    "controlnet_conditioning_channel_order",
    "conditioning_embedding_out_channels",
)


class _HintEmbedding(nnx.Module):
    """A picture to feature maps of the latents' size."""

    def __init__(self, channels: tuple[int, ...], out_channels: int, **setup: Unpack[Setup]) -> None:
        self.conv_in = Conv(3, channels[0], 3, **setup)
        blocks = []
        for width, wider in pairwise(channels):
            blocks += [Conv(width, width, 3, **setup), Conv(width, wider, 3, stride=2, **setup)]
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv(channels[-1], out_channels, 3, **setup)

    def __call__(self, x: Array) -> Array:
        x = silu(self.conv_in(x))
        for block in self.blocks:
            x = silu(block(x))
        return self.conv_out(x)


class ControlNet(nnx.Module):
    """Predicts, from what the UNet sees and a hint, what to add to each of the UNet's feature maps."""

    def __init__(self, config: ControlNetConfig, **setup: Unpack[Setup]) -> None:
        unet = config.unet
        widths = unet.block_out_channels
        self.conv_in = Conv(unet.in_channels, widths[0], 3, **setup)
        self.controlnet_cond_embedding = _HintEmbedding(config.hint_channels, widths[0], **setup)
        self.time_embedding, self.add_embedding = time_layers(unet, **setup)
        self.down_blocks = nnx.List(
            [DownBlock(unet, level, widths[max(level - 1, 0)], **setup) for level in range(len(widths))]
        )
        self.mid_block = MidBlock(unet, **setup)
        self.controlnet_down_blocks = nnx.List([Conv(width, width, 1, **setup) for width in feature_maps(unet)])
        self.controlnet_mid_block = Conv(widths[-1], widths[-1], 1, **setup)
        self.config = config
        self.dtype = setup["dtype"]

    def hint(self, pictures: Array) -> Array:
        """Map pictures (batch, height, width, 3) in 0..1 to hints at the latents' size, (batch, h, w, channels)."""
        pictures = pictures[..., ::-1] if self.config.bgr else pictures
        embedded: Array = self.controlnet_cond_embedding(pictures.astype(self.dtype))
        return embedded

    def __call__(
        self,
        sample: Array,
        timesteps: Array,
        context: Array,
        hint: Array,
        added: AddedConditioning | None = None,
    ) -> list[Array]:
        """Predict.

        Args:
            sample: (batch, height, width, in_channels).
            timesteps: (batch,).
            context: the text, (batch, tokens, context_channels).
            hint: of `hint`.
            added: SDXL's pooled text and time ids, else None.

        Returns:
            What to add to each feature map of the UNet's way down, and last to its lowest one.
        """
        sample, context = sample.astype(self.dtype), context.astype(self.dtype)
        time = embed_time(self, self.config.unet, timesteps, added)
        x = self.conv_in(sample) + hint.astype(self.dtype)
        maps = [x]
        for block in self.down_blocks:
            maps += block(maps[-1], time, context)
        out = [conv(x) for conv, x in zip(self.controlnet_down_blocks, maps, strict=True)]
        return [*out, self.controlnet_mid_block(self.mid_block(maps[-1], time, context))]
