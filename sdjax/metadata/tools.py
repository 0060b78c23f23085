"""What each tool writes, brought to the fields that they share."""

import ast
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from sdjax.metadata.comfyui import from_graph
from sdjax.metadata.fields import NUMBERS, fields, json_object, layers_left_out, size
from sdjax.metadata.infotext import from_infotext, has_parameters

Texts: TypeAlias = Mapping[str, str]
"""A file's texts by the names that they have there."""
_COMMENTS = ("UserComment", "comment", "ImageDescription")
"""Where formats without named chunks keep a text."""


def from_text(text: str) -> dict[str, Any]:
    """Read the parameters that a tool wrote as one text: sdjax, or another with a reader here.

    Returns:
        `prompt`, `negative_prompt` (None where there is none) and the settings that are there, by the names of a
        `Pipeline` call. A text of another kind is a prompt.
    """
    return from_texts({"parameters": text}) or from_infotext(text)


def from_texts(texts: Texts) -> dict[str, Any] | None:
    """Read the parameters among the texts of a file; None where no tool's are found."""
    return next((found for reader in READERS if (found := reader(texts)) and _is_told(found)), None)


def _is_told(found: Mapping[str, Any]) -> bool:
    """Whether there is more than an empty shell."""
    return bool(found["prompt"] or found.keys() & NUMBERS.keys())


def _invokeai(texts: Texts) -> dict[str, Any] | None:
    if (written := json_object(texts.get("invokeai_metadata", ""))) is None:
        return _invokeai_before_3(texts)
    known = {
        "steps": written.get("steps"),
        "sampler": written.get("scheduler"),
        "guidance_scale": written.get("cfg_scale"),
        "seed": written.get("seed"),
        "size": size(written.get("width"), written.get("height")),
        "strength": written.get("strength"),
        "clip_skip": written.get("clip_skip") or None,
        "loras": _weighted(
            (_name(entry, "model", "lora"), entry.get("weight")) for entry in _dicts(written.get("loras"))
        ),
        "model": _name(written, "model"),
    }
    used = {"positive_prompt", "negative_prompt", "scheduler", "cfg_scale", "width", "height"}
    others = {name: value for name, value in written.items() if name not in used}
    prompts = written.get("positive_prompt"), written.get("negative_prompt")
    return {**fields(*prompts, known, others), "tool": "InvokeAI"}


def _invokeai_before_3(texts: Texts) -> dict[str, Any] | None:
    written = json_object(texts.get("sd-metadata", ""))
    if written is None or not isinstance(image := written.get("image"), dict):
        return None
    prompt = image.get("prompt")
    if parts := _dicts(prompt):
        prompt = parts[0].get("prompt")
    known = {
        "steps": image.get("steps"),
        "sampler": image.get("sampler"),
        "guidance_scale": image.get("cfg_scale"),
        "seed": image.get("seed"),
        "size": size(image.get("width"), image.get("height")),
        "strength": image.get("strength"),
        "model": written.get("model_weights"),
    }
    return {**fields(prompt, None, known, {}), "tool": "InvokeAI"}


def _novelai(texts: Texts) -> dict[str, Any] | None:
    if (written := json_object(texts.get("Comment", ""))) is None:
        # As a WebP file has no chunks, all of them stand in one comment.
        inner = next((value for name in _COMMENTS if (value := json_object(texts.get(name, "")))), {})
        if not isinstance(comment := inner.get("Comment"), str):
            return None
        return _novelai(
            {name: value for name, value in {**inner, "Comment": comment}.items() if isinstance(value, str)}
        )
    if "novelai" not in texts.get("Software", "").lower() and not {"uc", "scale"} <= written.keys():
        return None
    known = {
        "steps": written.get("steps"),
        "sampler": written.get("sampler"),
        "schedule": written.get("noise_schedule"),
        "guidance_scale": written.get("scale"),
        "seed": written.get("seed"),
        "size": size(written.get("width"), written.get("height")),
        "strength": written.get("strength"),
        "model": texts.get("Source"),
    }
    used = {"prompt", "uc", "noise_schedule", "scale", "width", "height"}
    others = {name: value for name, value in written.items() if name not in used}
    prompt = written.get("prompt", texts.get("Description"))
    return {**fields(prompt, written.get("uc"), known, others), "tool": "NovelAI"}


def _swarmui(texts: Texts) -> dict[str, Any] | None:
    written = next(
        (value for text in _plain(texts) if (value := json_object(text)) and "sui_image_params" in value), {}
    )
    if not isinstance(given := written.get("sui_image_params"), dict):
        return None
    names, weights = (value if isinstance(value := given.get(name), list) else [] for name in ("loras", "loraweights"))
    known = {
        "steps": given.get("steps"),
        "sampler": given.get("sampler") or given.get("comfyuisampler"),
        "schedule": given.get("scheduler") or given.get("comfyuischeduler"),
        "guidance_scale": given.get("cfgscale"),
        "seed": given.get("seed"),
        "size": size(given.get("width"), given.get("height")),
        "strength": given.get("initimagecreativity"),
        "clip_skip": layers_left_out(given.get("clipstopatlayer")),
        "loras": _weighted(zip(names, [*weights, *[1] * len(names)], strict=False)),
        "model": given.get("model"),
    }
    used = {"negativeprompt", "comfyuisampler", "comfyuischeduler", "scheduler", "cfgscale", "width", "height"}
    used |= {"initimagecreativity", "clipstopatlayer"}
    others = {name: value for name, value in given.items() if name not in used}
    return {**fields(given.get("prompt"), given.get("negativeprompt"), known, others), "tool": "SwarmUI"}


def _fooocus(texts: Texts) -> dict[str, Any] | None:
    written = next((value for text in _plain(texts) if (value := json_object(text)) and "base_model" in value), None)
    if written is None:
        return None
    loras = value if isinstance(value := written.get("loras"), list) else []
    known = {
        "steps": written.get("steps"),
        "sampler": written.get("sampler"),
        "schedule": written.get("scheduler"),
        "guidance_scale": written.get("guidance_scale"),
        "seed": written.get("seed"),
        "size": _resolution(written.get("resolution")),
        "clip_skip": layers_left_out(written.get("clip_skip")),
        "loras": _weighted((entry[0], entry[1]) for entry in loras if isinstance(entry, list) and len(entry) > 1),
        "model": written["base_model"],
    }
    used = {"scheduler", "resolution", "base_model"}
    others = {name: value for name, value in written.items() if name not in used}
    prompts = written.get("prompt"), written.get("negative_prompt") or None
    return {**fields(*prompts, known, others), "tool": "Fooocus"}


def _comfyui(texts: Texts) -> dict[str, Any] | None:
    graph = json_object(texts.get("prompt", ""))
    found = None if graph is None else from_graph(graph)
    return None if found is None else {**found, "tool": "ComfyUI"}


def _infotext(texts: Texts) -> dict[str, Any] | None:
    for name in ("parameters", *_COMMENTS):
        if has_parameters(text := texts.get(name, "")):
            return from_infotext(text)
    # The chunk's name is the convention's own: a text without parameters in it is a prompt.
    text = texts.get("parameters", "")
    return from_infotext(text) if text and json_object(text) is None else None


READERS: tuple[Callable[[Texts], dict[str, Any] | None], ...] = (
    _invokeai,
    _novelai,
    _swarmui,
    _fooocus,
    _infotext,  # before ComfyUI: nodes that save this convention leave the graph in the file too
    _comfyui,
)


def _plain(texts: Texts) -> list[str]:
    return [texts[name] for name in ("parameters", *_COMMENTS) if name in texts]


def _dicts(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _name(entry: Mapping[str, Any], *keys: str) -> object:
    """The name of a model that stands under one of these keys, as text or as an object with a name."""
    model = next((entry[key] for key in keys if key in entry), None)
    if isinstance(model, dict):
        return model.get("name") or model.get("model_name") or model.get("lora_name") or model.get("key")
    return model


def _weighted(pairs: Any) -> str | None:
    """`name:0.8, other:1` of names and weights."""
    return ", ".join(f"{name}:{weight}" for name, weight in pairs if isinstance(name, str)) or None


def _resolution(value: object) -> str | None:
    """The size in a text like `(1152, 896)`."""
    try:
        sides = ast.literal_eval(value) if isinstance(value, str) and len(value) < 40 else ()
    except (ValueError, SyntaxError):
        return None
    return size(*sides) if isinstance(sides, tuple) and len(sides) == 2 else None
