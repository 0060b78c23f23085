"""A local folder in diffusers layout: one subfolder a component, listed by `model_index.json`."""

import json
from pathlib import Path
from typing import Any

from sdjax.errors import CheckpointError
from sdjax.loading.card import read_card
from sdjax.loading.checkpoint import TEXT_ENCODERS, Parts
from sdjax.loading.passengers import without_passengers
from sdjax.loading.tokenizer import load_tokenizer
from sdjax.loading.weights import Tensor, find_tensors
from sdjax.models import FAMILIES

DENOISERS = tuple(dict.fromkeys(family.component for family in FAMILIES.values()))
STEMS = {
    **dict.fromkeys((*DENOISERS, "vae"), "diffusion_pytorch_model"),
    **dict.fromkeys(TEXT_ENCODERS, "model"),
}
"""The name of each component's weight files, without its end."""
TEXT_MODELS = ("CLIPTextModel", "CLIPTextModelWithProjection")
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_folder(folder: Path, *, variant: str | None, prediction_type: str | None) -> Parts:
    """List what a folder holds; weights stay in their files.

    A refiner's folder lists its first text encoder as absent ([null, null]): its one encoder is `text_encoder_2`.

    Args:
        folder: with a `model_index.json`.
        variant: of the weight files, such as "fp16" in `model.fp16.safetensors`; None takes those without.
        prediction_type: what the network predicts, over what the scheduler's config says; None leaves it to that.

    Raises:
        CheckpointError: a file is missing or unreadable, or the folder has no denoiser or autoencoder.
    """
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(_no_index(folder))
    index = read_json(folder / "model_index.json")
    # A component that the pipeline does without is listed as [null, null].
    present = [name for name in STEMS if (index.get(name) or [None])[0] is not None]
    for needed in (DENOISERS, ("vae",)):
        if not set(needed) & set(present):
            raise CheckpointError(
                f"{folder} has no {' or '.join(needed)}: its model_index.json lists "
                f"{', '.join(repr(index.get(name)) for name in needed)} for it (it is a {index.get('_class_name')})"
            )
    configs: dict[str, dict[str, Any]] = {name: read_json(folder / name / "config.json") for name in present}
    for name in TEXT_ENCODERS.keys() & configs.keys():
        configs[name] = _text_config(configs[name], index[name])
    configs["model_index"] = index
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    if prediction_type is not None:
        configs["scheduler"] = _predicting(configs["scheduler"], prediction_type)
    tensors = {name: find_tensors(folder / name, STEMS[name], variant) for name in present}
    for name in present:
        projected = "CLIPTextModelWithProjection" in (configs[name].get("architectures") or ())
        tensors[name] = without_passengers(tensors[name], name, projected=projected)
    tensors["vae"] = today_s_vae_names(tensors["vae"])
    for name in TEXT_ENCODERS.keys() & tensors.keys():
        tensors[name] = _text_names(tensors[name])
    tokenizers = {name: load_tokenizer(folder / TEXT_ENCODERS[name]) for name in TEXT_ENCODERS if name in present}
    return Parts(str(folder), configs, tensors, tokenizers, read_card(folder))


def _text_config(config: dict[str, Any], listed: Any) -> dict[str, Any]:
    """A text encoder's config: of a whole CLIP's the part about text, and the class that the index names decides."""
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    kind = listed[-1] if isinstance(listed, list) else None
    return {**config, "architectures": [kind]} if kind in TEXT_MODELS else config


def _predicting(scheduler: dict[str, Any], prediction_type: str) -> dict[str, Any]:
    """Change what a scheduler's config says about the network; keys that it lists as defaults are not read."""
    defaults = [key for key in scheduler.get("_use_default_values", ()) if key != "prediction_type"]
    listed = {"_use_default_values": defaults} if "_use_default_values" in scheduler else {}
    return {**scheduler, **listed, "prediction_type": prediction_type}


def _no_index(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    hint = f"; for a file in the original layout give its own path, such as {folder / files[0]}" if files else ""
    return f"{folder} is no folder in diffusers layout: it has no model_index.json{hint}"


def today_s_vae_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors, with the attention of before diffusers 0.15 under its names of today."""
    return {_vae_name(name): tensor for name, tensor in tensors.items()}


def _vae_name(name: str) -> str:
    """The name of today for an attention tensor of before diffusers 0.15."""
    *modules, layer, leaf = name.split(".")
    if "attentions" in modules and layer in OLD_ATTENTION_NAMES:
        layer = OLD_ATTENTION_NAMES[layer]
    return ".".join([*modules, layer, leaf])


def _text_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published names: with the prefix that transformers 5 leaves out, and without the buffer that 4.30 had."""
    prefix = "" if any(name.startswith("text_model.") for name in tensors) else "text_model."
    return {
        name if name.startswith("text_projection.") else prefix + name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; a `CheckpointError` says what is wrong with it."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing, so {file.parent.name!r} is no part of a diffusers folder") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{file} holds a JSON {type(contents).__name__}, not an object")
    return contents
