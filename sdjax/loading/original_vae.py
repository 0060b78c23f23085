"""The autoencoder of an original-layout file (`first_stage_model.*`): its names, and its sizes from its tensors.

| of the config | from |
| --- | --- |
| in_channels, out_channels | the kernels of the encoder's first and the decoder's last convolution |
| latent_channels | the kernel of the decoder's first convolution |
| block_out_channels | the kernels of each `encoder.down.i` |
| layers_per_block | the blocks of `encoder.down.0` |
| use_quant_conv, use_post_quant_conv | whether they are there |
| scaling_factor | can't be seen: 0.13025 in SDXL's layout, else 0.18215 |
| norm_num_groups | can't be seen: 32, as in all of them |
"""

from collections.abc import Mapping
from typing import Any

from sdjax.errors import CheckpointError
from sdjax.loading.renaming import counted, renamed, shape_of
from sdjax.loading.weights import Tensor

GROUPS = 32

_ATTENTION = {
    "group_norm": ("norm", "group_norm"),
    "to_q": ("q", "query", "to_q"),
    "to_k": ("k", "key", "to_k"),
    "to_v": ("v", "value", "to_v"),
    "to_out.0": ("proj_out", "proj_attn", "to_out.0"),
}
"""The attention layers by their name of today, with all that files call them."""
_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}


def vae_tensors(tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Give an autoencoder's tensors their published names.

    Args:
        tensors: by their names without `first_stage_model.`.
        where: how errors begin.

    Raises:
        CheckpointError: a tensor is unknown; it is named.
    """
    levels = len(counted(tensors, "encoder.down."))
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        modules |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
        }
        for block in (1, 2):
            modules |= _residual(f"{half}.mid.block_{block}", f"{half}.mid_block.resnets.{block - 1}")
        for new, spellings in _ATTENTION.items():
            for old in spellings:
                modules[f"{half}.mid.attn_1.{old}"] = f"{half}.mid_block.attentions.0.{new}"
    for level in range(levels):
        # The decoder's levels are numbered from the highest resolution down in this layout, as the encoder's are.
        up = levels - 1 - level
        for old, new in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}"),
            (f"decoder.up.{level}", f"decoder.up_blocks.{up}"),
        ):
            for block in counted(tensors, f"{old}.block."):
                modules |= _residual(f"{old}.block.{block}", f"{new}.resnets.{block}")
        modules[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        modules[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return renamed(tensors, modules, where=where)


def vae_config(tensors: Mapping[str, Tensor], *, scaling_factor: float, sample_size: int, where: str) -> dict[str, Any]:
    """Infer an autoencoder's config.json, see the table above.

    Args:
        tensors: by their names without `first_stage_model.`.
        scaling_factor: of latents.
        sample_size: side of the pictures that it was trained on.
        where: how errors begin.

    Raises:
        CheckpointError: a tensor that sizes are read from is missing.
    """
    levels = counted(tensors, "encoder.down.")
    widths = [shape_of(tensors, f"encoder.down.{level}.block.0.conv1.weight", where=where)[0] for level in levels]
    if odd := [width for width in widths if width % GROUPS]:
        raise CheckpointError(
            f"{where}: {odd[0]} channels can't be normalised in the {GROUPS} groups of the original layout; load the "
            "model from a folder in diffusers layout"
        )
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", where=where)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", where=where)[0],
        "latent_channels": shape_of(tensors, "decoder.conv_in.weight", where=where)[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": len(counted(tensors, "encoder.down.0.block.")),
        "norm_num_groups": GROUPS,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def _residual(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{layer}": f"{new}.{name}" for layer, name in _RESIDUAL.items()}
