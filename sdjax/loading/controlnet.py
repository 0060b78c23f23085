"""ControlNets: from folders, from single files, and from the hub.

A file in the original layout (`control_model.*`) or in that of diffusers has no config. A ControlNet is a copy of the
UNet's way down, so whatever its tensors do not show is that UNet's.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
from jax.typing import DTypeLike

from sdjax.devices.target import Target
from sdjax.errors import CheckpointError
from sdjax.loading.folder import read_json
from sdjax.loading.original_unet import unet_tensors
from sdjax.loading.part import Part, find_part, read_part
from sdjax.loading.passengers import without_passengers
from sdjax.loading.renaming import counted, renamed, shape_of
from sdjax.loading.weights import Place, Tensor, fill
from sdjax.models import ControlNet, ControlNetConfig, Params, UNetConfig, define

KEPT = 4
"""ControlNets that stay in memory after their call, the latest ones."""
ORIGINAL = "control_model."
HINT = "controlnet_cond_embedding"


def load_controlnet(
    part: Part, *, like: UNetConfig, dtype: DTypeLike, target: Target, place: Place
) -> tuple[Any, Params, ControlNetConfig]:
    """Load a ControlNet; the same files, unchanged, are not read again for an equal `place`.

    Args:
        part: where it lies.
        like: the sizes of the UNet that it steers, for what a file without a config does not show.
        dtype: of parameters and arithmetic.
        target: the kind of device that it is for.
        place: puts a leaf, whose path begins with "controlnet", on its device or devices; hashable.

    Returns:
        Its definition, parameters and config.

    Raises:
        CheckpointError: it can't be found or read.
    """
    path = find_part(part, "controlnet")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stamps = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    found = Part(path.resolve(), part.variant)
    return _load(found, stamps, like, jax.numpy.dtype(dtype).name, target, place)


@lru_cache(maxsize=KEPT)
def _load(
    part: Part, _stamps: tuple[Any, ...], like: UNetConfig, dtype: str, target: Target, place: Place
) -> tuple[Any, Params, ControlNetConfig]:
    where, tensors, config_file = read_part(part, "controlnet")
    tensors = {name.removeprefix(ORIGINAL): tensor for name, tensor in tensors.items()}
    tensors = without_passengers(tensors, "controlnet")
    if any(name.startswith("input_hint_block.") for name in tensors):
        tensors = _from_original(tensors, where)
    try:
        config = ControlNetConfig.from_dict(read_json(config_file)) if config_file else _inferred(tensors, like, where)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    definition, shapes = define(ControlNet, config, dtype=dtype, param_dtype=dtype, target=target)
    params = fill(shapes, tensors, component=where, place=lambda path, array: place(("controlnet", *path), array))
    return definition, params, config


def _from_original(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Give tensors of the original layout (`ControlNet` of Zhang's own code) their published names."""
    own = ("input_hint_block.", "zero_convs.", "middle_block_out.")
    copied = {name: tensor for name, tensor in tensors.items() if not name.startswith(own)}
    first, *between, last = counted(tensors, "input_hint_block.")
    modules = {f"input_hint_block.{first}": f"{HINT}.conv_in", f"input_hint_block.{last}": f"{HINT}.conv_out"}
    modules |= {f"input_hint_block.{layer}": f"{HINT}.blocks.{i}" for i, layer in enumerate(between)}
    modules |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in counted(tensors, "zero_convs.")}
    modules["middle_block_out.0"] = "controlnet_mid_block"
    rest = {name: tensor for name, tensor in tensors.items() if name not in copied}
    return unet_tensors(copied, where=where) | renamed(rest, modules, where=where)


def _inferred(tensors: Mapping[str, Tensor], like: UNetConfig, where: str) -> ControlNetConfig:
    """The sizes of a ControlNet: from its tensors what they show, else those of the UNet that it steers."""
    blocks = counted(tensors, f"{HINT}.blocks.")
    layers = [f"{HINT}.conv_in", *(f"{HINT}.blocks.{i}" for i in blocks[1::2])]
    depths = [
        len(counted(tensors, f"down_blocks.{i}.attentions.0.transformer_blocks.")) for i in range(len(like.heads))
    ]
    depths[-1] = len(counted(tensors, "mid_block.attentions.0.transformer_blocks."))
    return ControlNetConfig(
        unet=replace(
            like,
            in_channels=shape_of(tensors, "conv_in.weight", where=where)[1],
            transformer_layers=tuple(
                depth or ours for depth, ours in zip(depths, like.transformer_layers, strict=True)
            ),
            time_cond_proj_dim=None,
        ),
        hint_channels=tuple(shape_of(tensors, f"{layer}.weight", where=where)[0] for layer in layers),
        bgr=False,
    )
