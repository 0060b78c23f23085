"""The sizes of a UNet, read from its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdjax.models.config import check_keys, check_names, check_types, per_block, sides

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCKS = {None: None, "UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet. Tuples have one entry a block, from the highest resolution down, in both directions.

    `native_size`: (height, width) of the latents that it was trained on; `sample_size` in a config.json.
    """

    in_channels: int
    out_channels: int
    native_size: tuple[int, int]
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
    def patch(self) -> int:
        """Number that divides the sides of its latents: any side will do."""
        return 1

    @property
    def context_channels(self) -> int:
        """Channels of the text that cross-attention reads."""
        return self.cross_attention_dim[0]

    @property
    def embeds_guidance(self) -> bool:
        """Whether it was distilled to read the guidance scale, and so is called once a step."""
        return self.time_cond_proj_dim is not None

    @property
    def reads_sizes(self) -> bool:
        """Whether it reads SDXL's micro-conditioning."""
        return self.projection_input_dim is not None

    def time_ids(self, pooled_channels: int) -> int:
        """Count the numbers of SDXL's micro-conditioning that it reads beside pooled text."""
        return ((self.projection_input_dim or 0) - pooled_channels) // (self.addition_time_embed_dim or 1)

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
            native_size=sides(config["sample_size"], key="sample_size", model="UNet"),
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
