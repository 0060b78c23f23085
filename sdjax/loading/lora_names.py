"""How LoRA files spell layers and their parts.

A key is a layer and a part of it. Layers are spelled in one of a few ways, and all of them follow from the model's own
names, so the dictionary of spellings is computed from the parameters of whatever size:

    unet.down_blocks.1.attentions.0.proj_in                diffusers, and peft behind "base_model.model."
    unet.….attn1.processor.to_q                            diffusers before 0.22, where to_out.0 is to_out
    lora_unet_down_blocks_1_attentions_0_proj_in           kohya's sd-scripts, SD 1 and SD 2
    lora_unet_input_blocks_4_1_proj_in                     kohya's sd-scripts, SDXL: the original layout's names
    diffusion_model.input_blocks.4.1.proj_in               the original layout itself
    lora_te_, lora_te1_, lora_te2_text_model_…             kohya's text encoders
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from sdjax.loading.original_unet import ENDS, RESIDUAL
from sdjax.loading.weights import LeafPath, tensor_name
from sdjax.models import Params

PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_ENDING = re.compile(r"[._](" + "|".join(re.escape(part) for part in sorted(PARTS, key=len, reverse=True)) + r")$")

ENCODERS = {"text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_",)}
OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

RESIDUAL_NAMES = {name: original for original, name in RESIDUAL.items()}
END_NAMES = {name: original for original, name in ENDS.items()}


class Key(NamedTuple):
    """A key of a file, taken apart: how it spells the layer, and which part it holds (a value of `PARTS`)."""

    layer: str
    part: str


def take_apart(key: str) -> Key | None:
    """Split a key into layer and part; None if it ends in no known part."""
    found = _ENDING.search(key)
    if found is None:
        return None
    return Key(bare_layer(key[: found.start()]), PARTS[found[1]])


def bare_layer(layer: str) -> str:
    """A layer's spelling without what wrappers add to it."""
    return layer.removeprefix("base_model.model.").replace(".processor.", ".")


def spellings(params: Params, component: str | None = None) -> dict[str, LeafPath]:
    """Every way of naming a layer, and the leaf that holds its weight.

    Args:
        params: of a whole pipeline. Layers of the VAE have no names here: no LoRA reaches them.
        component: the one that names without a prefix belong to. Without it they belong to the UNet, or to a text
            encoder where there is just one.
    """
    layers = {
        tensor_name(path).removesuffix(".weight"): path
        for path, leaf in flatten_dict(params).items()
        if path[0] in ("unet", *ENCODERS) and len(leaf.shape) > 1
    }
    encoders = [name for name in ENCODERS if name in params]
    bare = [component] if component else ["unet", *(encoders if len(encoders) == 1 else [])]
    known: dict[str, LeafPath] = {}
    original = original_names(layer.removeprefix("unet.") for layer in layers if layer.startswith("unet."))
    for layer, path in layers.items():
        owner, _, name = layer.partition(".")
        if owner == "unet":
            spelled = list(_unet_spellings(name))
            known["lora_unet_" + name.replace(".", "_")] = path
            if name in original:
                known["lora_unet_" + original[name].replace(".", "_")] = path
                known["diffusion_model." + original[name]] = path
                known["model.diffusion_model." + original[name]] = path
        else:
            spelled = list(_text_spellings(name))
            known |= {prefix + name.replace(".", "_"): path for prefix in ENCODERS[owner]}
        known |= {f"{owner}.{spelling}": path for spelling in spelled}
        if owner in bare:
            known |= dict.fromkeys(spelled, path)
    return known


def _unet_spellings(name: str) -> Iterator[str]:
    yield name
    if name.endswith(".to_out.0"):
        yield name.removesuffix(".0")


def _text_spellings(name: str) -> Iterator[str]:
    *modules, last = name.split(".")
    for spelled in (name, ".".join([*modules, OLD_ATTENTION.get(last, last)])):
        yield spelled
        yield spelled.removeprefix("text_model.")  # as transformers 5 has it


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """The original layout's name (CompVis `UNetModel`) of each of a UNet's layers that it has.

    There all layers of one resolution are numbered on: `input_blocks` count the residual blocks and downsamplers of the
    way down, `output_blocks` the residual blocks of the way up, each with its transformer and upsampler inside.
    """
    layers = list(layers)
    renamed = dict(_original_blocks({tuple(layer.split(".")[:4]) for layer in layers}))
    names = {}
    for layer in layers:
        if layer in END_NAMES:
            names[layer] = END_NAMES[layer]
            continue
        parts = layer.split(".")
        depth = 3 if parts[0] == "mid_block" else 4
        block, inside = ".".join(parts[:depth]), ".".join(parts[depth:])
        if block in renamed:
            names[layer] = f"{renamed[block]}.{'op' if 'downsamplers' in block else RESIDUAL_NAMES.get(inside, inside)}"
    return names


def _original_blocks(starts: set[tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Blocks of diffusers' layout ("down_blocks.0.resnets.1") and what the original layout calls them."""

    def count(*path: str) -> int:
        held = {start[len(path)] for start in starts if start[: len(path)] == path and len(start) > len(path)}
        return len(held)

    number = 1
    for level in map(str, range(count("down_blocks"))):
        here = ("down_blocks", level)
        for i in map(str, range(count(*here, "resnets"))):
            yield f"down_blocks.{level}.resnets.{i}", f"input_blocks.{number}.0"
            yield f"down_blocks.{level}.attentions.{i}", f"input_blocks.{number}.1"
            number += 1
        if count(*here, "downsamplers"):
            yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    for block, place in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        yield f"mid_block.{block}", f"middle_block.{place}"
    number = 0
    for level in map(str, range(count("up_blocks"))):
        here = ("up_blocks", level)
        resnets, attends = count(*here, "resnets"), count(*here, "attentions") > 0
        for i in map(str, range(resnets)):
            yield f"up_blocks.{level}.resnets.{i}", f"output_blocks.{number}.0"
            yield f"up_blocks.{level}.attentions.{i}", f"output_blocks.{number}.1"
            if int(i) == resnets - 1:
                yield f"up_blocks.{level}.upsamplers.0", f"output_blocks.{number}.{1 + attends}"
            number += 1
