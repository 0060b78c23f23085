"""The text encoders of an original-layout file: names, and sizes from tensors.

Two kinds: CLIP ViT-L as transformers spells it (`….transformer.text_model.*`), and OpenCLIP as its own code does
(`….model.*`), which stores queries, keys and values as one matrix and the projection as a bare matrix for `x @ W`.

| of the config | from |
| --- | --- |
| vocab_size, hidden_size, max_position_embeddings | the two embeddings |
| intermediate_size, num_hidden_layers | the layers |
| projection_dim | the projection |
| num_attention_heads | can't be seen: heads of 64 channels, as in all of them |
| hidden_act | can't be seen: quick_gelu in CLIP ViT-L, gelu in OpenCLIP |
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from numpy.typing import NDArray

from sdjax.errors import CheckpointError
from sdjax.loading.passengers import without_passengers
from sdjax.loading.renaming import counted, renamed, shape_of
from sdjax.loading.weights import Tensor

HEAD_CHANNELS = 64
LAYERS_OF_SD2 = 24
"""Layers of OpenCLIP ViT-H. SD 2 reads the one before the last, so that the last is never computed."""

_OPEN_CLIP_ENDS = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_tensors(tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Give a CLIP ViT-L's tensors their published names, of which few differ.

    Its projection, which some files carry, is left out: neither SD 1 nor SDXL reads this encoder's pooled vector.

    Args:
        tensors: by their names without `….transformer.`.
        where: how errors begin.

    Raises:
        CheckpointError: a tensor is unknown; it is named.
    """
    modules = {name: f"text_model.{name}" for name in ("embeddings", "encoder", "final_layer_norm")}
    modules |= {new: new for new in modules.values()}
    kept = without_passengers(tensors, "text_encoder")
    kept = {
        name: tensor for name, tensor in kept.items() if name.rpartition(".")[2] not in ("position_ids", "logit_scale")
    }
    return renamed(kept, modules, where=where)


def open_clip_tensors(tensors: Mapping[str, Tensor], *, whole: bool, where: str) -> dict[str, Tensor]:
    """Give an OpenCLIP text encoder's tensors their published names.

    Args:
        tensors: by their names without `….model.`.
        whole: with all layers and the projection (SDXL), or up to the layer that SD 2 reads. That is all but the last
            of an encoder as OpenCLIP publishes it, told by its projection or by its 24 layers; files that were
            converted from a diffusers folder have neither, and lack the last layer already.
        where: how errors begin.

    Raises:
        CheckpointError: a tensor is unknown; it is named.
    """
    layers = counted(tensors, "transformer.resblocks.")
    projections = {"text_projection", "text_projection.weight"} & tensors.keys()
    unused = {"attn_mask"}
    tensors = without_passengers(tensors, "text_encoder", projected=True)
    if not whole:
        unused |= projections
        if projections or len(layers) == LAYERS_OF_SD2:
            *layers, last = layers or [0]
            unused |= {name for name in tensors if name.startswith(f"transformer.resblocks.{last}.")}
    modules = dict(_OPEN_CLIP_ENDS)
    for layer in layers:
        for old, new in _OPEN_CLIP_LAYER.items():
            modules[f"transformer.resblocks.{layer}.{old}"] = f"text_model.encoder.layers.{layer}.{new}"
    spelled: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in unused:
            spelled |= _as_modules(name, tensor)
    return renamed(spelled, modules, where=where)


def text_config(
    tensors: Mapping[str, Tensor], *, hidden_act: str, start: int, end: int, pad: int, where: str
) -> dict[str, Any]:
    """Infer a text encoder's config.json, see the table above.

    Args:
        tensors: by published name.
        hidden_act: the activation of its kind.
        start: the id that begins a prompt, `end` and `pad` those that end and fill it.
        end: see `start`.
        pad: see `start`.
        where: how errors begin.

    Raises:
        CheckpointError: a tensor that sizes are read from is missing.
    """
    embeddings = "text_model.embeddings"
    vocabulary, width = shape_of(tensors, f"{embeddings}.token_embedding.weight", where=where)
    if width % HEAD_CHANNELS:
        raise CheckpointError(
            f"{where}: {width} channels are no whole number of heads of {HEAD_CHANNELS}, and a file in the original "
            "layout does not say how many there are; load the model from a folder in diffusers layout"
        )
    projection = tensors.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", where=where)[0],
        "num_hidden_layers": len(counted(tensors, "text_model.encoder.layers.")),
        "num_attention_heads": width // HEAD_CHANNELS,
        "max_position_embeddings": shape_of(tensors, f"{embeddings}.position_embedding.weight", where=where)[0],
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": pad,
        "projection_dim": width if projection is None else projection.shape[0],
    }


def _as_modules(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Spell a bare array as the weight of a module, and take the joined projections apart."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("in_proj_weight", "in_proj_bias"):
        rows, *rest = tensor.shape
        third = rows // 3
        return {
            f"{module}.{part}_proj.{leaf.removeprefix('in_proj_')}": tensor._replace(
                shape=(third, *rest), view=partial(_rows, start=i * third, stop=(i + 1) * third)
            )
            for i, part in enumerate("qkv")
        }
    if name == "positional_embedding":
        return {f"{name}.weight": tensor}
    if name == "text_projection":
        return {f"{name}.weight": tensor._replace(shape=tensor.shape[::-1], view=_transposed)}
    return {name: tensor}


def _rows(array: NDArray[Any], *, start: int, stop: int) -> NDArray[Any]:
    return array[start:stop]


def _transposed(array: NDArray[Any]) -> NDArray[Any]:
    return array.T
