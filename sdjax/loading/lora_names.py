"""How LoRA files spell layers and their parts.

A key is a layer and a part of it. Layers are spelled in one of a few ways, and all of them follow from the model's own
names, so the dictionary of spellings is computed from the parameters of whatever size:

    unet.down_blocks.1.attentions.0.proj_in                diffusers, and peft behind "base_model.model."
    unet.….attn1.processor.to_q                            diffusers before 0.22, where to_out.0 is to_out
    lora_unet_down_blocks_1_attentions_0_proj_in           kohya's sd-scripts, SD 1 and SD 2
    lora_unet_input_blocks_4_1_proj_in                     kohya's sd-scripts, SDXL: the original layout's names
    diffusion_model.input_blocks.4.1.proj_in               the original layout itself
    lora_te_, lora_te1_, lora_te2_text_model_…             kohya's text encoders
    lora_te_wrapped_transformer_text_model_…               sd-scripts' names for the original layout of SD 1
    lora_te_wrapped_model_transformer_resblocks_…          and of SD 2
    lycoris_down_blocks_1_attentions_0_proj_in             LyCORIS's own wrapper around one model
    oft_unet_, oft_te_…                                    sd-scripts' OFT

Parts, too, are spelled in several ways (`PARTS`); in files that were saved while peft held the adapter, the adapter's
name stands inside (`lora_A.style.weight`).
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from sdjax.loading.original_unet import ENDS, RESIDUAL
from sdjax.loading.weights import LeafPath, tensor_name
from sdjax.models import Params

_LYCORIS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
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
    "scalar": "scalar",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    **{name: name for name in _LYCORIS},
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},
    "oft_blocks": "oft_blocks",
    "rescale": "rescale",
    "oft_R.weight": "oft_r",
    "boft_R": "boft_r",
    "boft_s": "boft_s",
    "ia3_l": "ia3_l",
    "on_input": "on_input",
    "diff": "difference",
    "w_norm": "difference",
    "diff_b": "bias_difference",
    "b_norm": "bias_difference",
    "weight": "weight",
    "bias": "bias",
    "token_adapter.trainable_tokens_delta": "token_rows",
}
"""The role of a part by the ending of its key."""
_LONGEST_FIRST = "|".join(re.escape(part) for part in sorted(PARTS, key=len, reverse=True))
_ENDING = re.compile(rf"(?:\.|_(?=lora\.))({_LONGEST_FIRST})$")
_ADAPTER_NAME = re.compile(
    r"\.(?:(lora_[AB]|oft_R)\.[^.]+(?=\.(?:weight|bias)$)"
    r"|(lora_magnitude_vector)\.[^.]+(?=\.weight$)"
    r"|(lora_magnitude_vector)\.(?!weight$)[^.]+$"
    r"|(lora_embedding_[AB]|ia3_l|boft_[Rs]|(?:hada|lokr)_\w+|trainable_tokens_delta)\.[^.]+$)"
)
"""The name that peft gives an adapter while it is loaded, which is in files that were saved without peft's help."""
_MODULES_TO_SAVE = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.(?:weight|bias)$)")

BUNDLE = "bundle_emb."
"""What the keys of learned words begin with that come in one file with an adapter."""
ENCODERS = {
    "text_encoder": ("lora_te1_", "lora_te_", "oft_te1_", "oft_te_"),
    "text_encoder_2": ("lora_te2_", "oft_te2_"),
}
OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
OPEN_CLIP = {
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.": "",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "final_layer_norm": "ln_final",
}

RESIDUAL_NAMES = {name: original for original, name in RESIDUAL.items()}
END_NAMES = {name: original for original, name in ENDS.items()}


class Key(NamedTuple):
    """A key of a file, taken apart: how it spells the layer, and which part it holds (a value of `PARTS`)."""

    layer: str
    part: str


def take_apart(key: str) -> Key | None:
    """Split a key into layer and part; None if it ends in no known part."""
    found = _ENDING.search(_MODULES_TO_SAVE.sub("", _ADAPTER_NAME.sub(_without_name, key)))
    if found is None:
        return None
    return Key(bare_layer(found.string[: found.start()]), PARTS[found[1]])


def _without_name(found: re.Match[str]) -> str:
    return "." + next(group for group in found.groups() if group)


def bare_layer(layer: str) -> str:
    """A layer's spelling without what wrappers add to it."""
    return layer.removeprefix("base_model.model.").replace(".processor.", ".").removesuffix(".base_layer")


def spellings(params: Params, component: str | None = None) -> dict[str, LeafPath]:
    """Every way of naming a layer, and its path in the parameters, without the leaf.

    Args:
        params: of a whole pipeline. Layers of the VAE have no names here: no LoRA reaches them.
        component: the one that names without a prefix belong to. Without it they belong to the UNet, or to a text
            encoder where there is just one.
    """
    layers = {
        tensor_name(path[:-1]): path[:-1]
        for path in flatten_dict(params)
        if path[0] in ("unet", *ENCODERS) and path[-1] == "weight"
    }
    encoders = [name for name in ENCODERS if name in params]
    bare = [component] if component else ["unet", *(encoders if len(encoders) == 1 else [])]
    known: dict[str, LeafPath] = {}
    original = original_names(layer.removeprefix("unet.") for layer in layers if layer.startswith("unet."))
    for layer, path in layers.items():
        owner, _, name = layer.partition(".")
        if owner == "unet":
            spelled = list(_unet_spellings(name))
            prefixes: tuple[str, ...] = ("lora_unet_", "oft_unet_")
            if name in original:
                known["lora_unet_" + original[name].replace(".", "_")] = path
                known["diffusion_model." + original[name]] = path
                known["model.diffusion_model." + original[name]] = path
        else:
            spelled = list(_text_spellings(name))
            prefixes = ENCODERS[owner]
            if owner == "text_encoder":
                known["lora_te_wrapped_transformer_" + name.replace(".", "_")] = path
                known["lora_te_wrapped_model_" + _open_clip_name(name).replace(".", "_")] = path
        if owner in bare:
            known |= dict.fromkeys(spelled, path)
            prefixes += ("lycoris_",)
        known |= {prefix + spelling.replace(".", "_"): path for prefix in prefixes for spelling in spelled}
        known |= {f"{owner}.{spelling}": path for spelling in spelled}
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


def _open_clip_name(name: str) -> str:
    """OpenCLIP's name of a text encoder's layer; its queries, keys and values are one layer, and have none."""
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


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
