"""The UNet of an original-layout file (`model.diffusion_model.*`): its names, and its sizes from its tensors.

| of the config | from |
| --- | --- |
| in_channels, out_channels | the kernels of `input_blocks.0.0` and `out.2` |
| block_out_channels | the kernels of each level's first residual block; a level ends with a downsampler (`.0.op`) |
| layers_per_block | residual blocks of each level |
| block types | whether a level's residual blocks are followed by a transformer (`input_blocks.i.1`) |
| transformer_layers_per_block | `transformer_blocks` of a level's transformer; the last level's from the middle block |
| cross_attention_dim | the width that `attn2.to_k` reads |
| use_linear_projection | whether `proj_in` is a matrix or a 1x1 convolution |
| projection_class_embeddings_input_dim | the width that `label_emb` reads (SDXL) |
| addition_time_embed_dim | what of that width the pooled text leaves, over 6 time ids (a refiner: 5) |
| heads | can't be seen: 8 a level in SD 1, heads of 64 channels in SD 2 and SDXL |
| norm_num_groups | can't be seen: 32, as in all of them |
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.errors import CheckpointError
from sdjax.loading.renaming import counted, renamed, shape_of
from sdjax.loading.weights import Tensor

GROUPS = 32
HEAD_CHANNELS = 64
SD1_HEADS = 8

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


class _Level(NamedTuple):
    """One resolution: its width, its residual blocks' indices, and its transformers' depth (0 without attention)."""

    channels: int
    blocks: tuple[int, ...]
    depth: int


def unet_tensors(tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Give a UNet's tensors their published names.

    Args:
        tensors: by their names without `model.diffusion_model.`.
        where: how errors begin.

    Raises:
        CheckpointError: a tensor is unknown, or one that sizes are read from is missing; it is named.
    """
    levels = _levels(tensors, where)
    modules = dict(ENDS)
    for level, (_, blocks, _) in enumerate(levels):
        for layer, block in enumerate(blocks):
            modules |= _residual(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}")
            modules[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
        modules[f"input_blocks.{blocks[-1] + 1}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    modules |= _residual("middle_block.0", "mid_block.resnets.0") | _residual("middle_block.2", "mid_block.resnets.1")
    modules["middle_block.1"] = "mid_block.attentions.0"
    block = 0
    for up, (_, blocks, _) in enumerate(reversed(levels)):
        for layer in range(len(blocks) + 1):
            modules |= _residual(f"output_blocks.{block}.0", f"up_blocks.{up}.resnets.{layer}")
            modules[f"output_blocks.{block}.1"] = f"up_blocks.{up}.attentions.{layer}"
            for place in (1, 2):
                modules[f"output_blocks.{block}.{place}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
            block += 1
    return renamed(tensors, modules, where=where)


def unet_config(
    tensors: Mapping[str, Tensor], *, heads_of_sd1: bool, sample_size: int, time_ids: int, pooled: int, where: str
) -> dict[str, Any]:
    """Infer a UNet's config.json, see the table above.

    Args:
        tensors: by their names without `model.diffusion_model.`.
        heads_of_sd1: whether the heads are counted as in SD 1.
        sample_size: side of the latents that it was trained on.
        time_ids: numbers beside the pooled text in `label_emb`'s input.
        pooled: width of the pooled text.
        where: how errors begin.

    Raises:
        CheckpointError: the sizes are not those of a Stable Diffusion model.
    """
    levels = _levels(tensors, where)
    widths = [level.channels for level in levels]
    counts = [len(level.blocks) for level in levels]
    middle = _depth(tensors, "middle_block.1")
    if not middle:
        raise CheckpointError(f"{where} lacks a transformer in its middle block, which every Stable Diffusion has")
    if levels[-1].depth not in (0, middle):
        raise CheckpointError(
            f"{where}: the lowest level has transformers of {levels[-1].depth} layers, the middle block of {middle}"
        )
    first = next((f"input_blocks.{level.blocks[0]}.1" for level in levels if level.depth), "middle_block.1")
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": shape_of(tensors, "input_blocks.0.0.weight", where=where)[1],
        "out_channels": shape_of(tensors, "out.2.weight", where=where)[0],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if level.depth else "DownBlock2D" for level in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if level.depth else "UpBlock2D" for level in levels[::-1]],
        "layers_per_block": counts[0] if len(set(counts)) == 1 else counts,
        "transformer_layers_per_block": [level.depth or 1 for level in levels[:-1]] + [middle],
        "cross_attention_dim": shape_of(tensors, f"{first}.transformer_blocks.0.attn2.to_k.weight", where=where)[1],
        "use_linear_projection": len(shape_of(tensors, f"{first}.proj_in.weight", where=where)) == 2,
        "attention_head_dim": SD1_HEADS if heads_of_sd1 else [_heads(width, where) for width in widths],
        "norm_num_groups": _groups(widths, where),
    }
    if "label_emb.0.0.weight" in tensors:
        width = shape_of(tensors, "label_emb.0.0.weight", where=where)[1]
        if width <= pooled or (width - pooled) % time_ids:
            raise CheckpointError(
                f"{where}: label_emb reads {width} numbers, and the pooled text's {pooled} leave no equal parts for "
                f"{time_ids} time ids"
            )
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled) // time_ids,
            "projection_class_embeddings_input_dim": width,
        }
    return config


def _levels(tensors: Mapping[str, Tensor], where: str) -> list[_Level]:
    """Group the blocks of the way down by resolution, from the highest; block 0 is the first convolution."""
    blocks = counted(tensors, "input_blocks.")
    if blocks != list(range(len(blocks))) or len(blocks) < 2:
        raise CheckpointError(f"{where}: input_blocks has {blocks}, which are not numbered from 0 on without a gap")
    groups: list[list[int]] = [[]]
    for block in blocks[1:]:
        if f"input_blocks.{block}.0.op.weight" in tensors:
            groups.append([])
        else:
            groups[-1].append(block)
    if not all(groups):
        raise CheckpointError(f"{where}: input_blocks has a resolution without a residual block")
    levels = []
    for group in groups:
        depths = {_depth(tensors, f"input_blocks.{block}.1") for block in group}
        if len(depths) > 1:
            raise CheckpointError(
                f"{where}: the transformers of input_blocks {group} differ in depth: {sorted(depths)}"
            )
        width = shape_of(tensors, f"input_blocks.{group[0]}.0.in_layers.2.weight", where=where)[0]
        levels.append(_Level(width, tuple(group), depths.pop()))
    return levels


def _depth(tensors: Mapping[str, Tensor], transformer: str) -> int:
    return len(counted(tensors, f"{transformer}.transformer_blocks."))


def _heads(width: int, where: str) -> int:
    if width % HEAD_CHANNELS:
        raise CheckpointError(
            f"{where}: a level of {width} channels has no whole number of heads of {HEAD_CHANNELS}, and a file in the "
            "original layout does not say how many it has; load the model from a folder in diffusers layout"
        )
    return width // HEAD_CHANNELS


def _groups(widths: list[int], where: str) -> int:
    if odd := [width for width in widths if width % GROUPS]:
        raise CheckpointError(
            f"{where}: {odd[0]} channels can't be normalised in the {GROUPS} groups of the original layout; load the "
            "model from a folder in diffusers layout"
        )
    return GROUPS


def _residual(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{layer}": f"{new}.{name}" for layer, name in RESIDUAL.items()}
