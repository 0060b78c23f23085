"""The parameters that a picture was made with, inside its PNG, in the convention that other tools read.

The text chunk `parameters` holds the prompt, a line `Negative prompt: ...` where there is one, and a last line
`Steps: 20, Sampler: ddim, CFG scale: 3.0, Seed: 1, Size: 64x64, Model: tiny`. The last line is where a reader starts,
so a prompt may hold anything, lines that look like the others included.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sdjax.errors import SdjaxError

CHUNK = "parameters"
NEGATIVE = "Negative prompt: "
LABELS: Mapping[str, str] = MappingProxyType(
    {
        "Steps": "steps",
        "Sampler": "sampler",
        "Schedule type": "schedule",
        "CFG scale": "guidance_scale",
        "Seed": "seed",
        "Size": "size",
        "Denoising strength": "strength",
        "Loras": "loras",
        "Clip skip": "clip_skip",
        "Long prompts": "long_prompts",
        "Embeddings": "embeddings",
        "Model": "model",
    }
)
_ENTRY = re.compile(r'\s*([\w ]+): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


class MetadataError(SdjaxError, ValueError):
    """A file that is no PNG, or holds no parameters."""


def to_text(prompt: str, negative_prompt: str | None, settings: Mapping[str, Any]) -> str:
    """Write parameters as one text.

    Args:
        prompt: as it was given.
        negative_prompt: likewise; None writes no line.
        settings: by the values of `LABELS`; what is None is left out.
    """
    written = _as_others_count(settings)
    entries = [(label, written.get(name)) for label, name in LABELS.items()]
    line = ", ".join(f"{label}: {_quoted(value)}" for label, value in entries if value is not None)
    # A negative prompt of several lines, or a prompt with a line like a negative prompt's, would not read back.
    parts = (
        [_escaped(prompt)] + ([NEGATIVE + _escaped(negative_prompt)] if negative_prompt is not None else []) + [line]
    )
    return "\n".join(parts)


def from_text(text: str) -> dict[str, Any]:
    """Read what `to_text` wrote, or what another tool did.

    Returns:
        `prompt`, `negative_prompt` (None where there is none) and the settings that are there; numbers as numbers.
    """
    *body, last = text.split("\n")
    if not last.startswith("Steps: "):
        body, last = [*body, last], ""
    found = next((i for i, line in enumerate(body) if line.startswith(NEGATIVE)), None)
    prompt, negative = (body, None) if found is None else (body[:found], "\n".join(body[found:])[len(NEGATIVE) :])
    settings = {LABELS.get(label, label): _value(value) for label, value in _ENTRY.findall(last)}
    if isinstance(skip := settings.get("clip_skip"), int):
        settings["clip_skip"] = skip - 1 if skip > 1 else None
    return {
        "prompt": _unescaped("\n".join(prompt)),
        "negative_prompt": None if negative is None else _unescaped(negative),
        **settings,
    }


def _as_others_count(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as tools with this convention have them: a `clip_skip` of ours is one more there, 1 being none."""
    skip = settings.get("clip_skip")
    return {
        **settings,
        "clip_skip": None if skip is None else skip + 1,
        "long_prompts": None if settings.get("long_prompts") == "truncate" else settings.get("long_prompts"),
        "embeddings": ", ".join(settings.get("embeddings") or []) or None,
    }


def chunks(text: str) -> PngImagePlugin.PngInfo:
    """The text as a PNG's chunk: Latin-1 where it fits, else UTF-8."""
    info = PngImagePlugin.PngInfo()
    try:
        text.encode("latin-1")
        info.add_text(CHUNK, text)
    except UnicodeEncodeError:
        info.add_itxt(CHUNK, text)
    return info


def read(file: Path) -> dict[str, Any]:
    """The parameters inside a PNG.

    Raises:
        MetadataError: it is no readable PNG, or has no parameters.
    """
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            picture.load()
            text = picture.info.get(CHUNK)
    except FileNotFoundError as error:
        raise MetadataError(f"there is no file {str(file)!r}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MetadataError(f"{str(file)!r} is not a readable PNG file") from error
    if not isinstance(text, str):
        raise MetadataError(f"{str(file)!r} holds no generation parameters")
    return from_text(str(text))


def _escaped(text: str) -> str:
    """Mark the lines of a prompt that would be taken for something else, and those that already carry the mark."""
    return "\n".join(f"\\{line}" if line.startswith(("\\", NEGATIVE, "Steps: ")) else line for line in text.split("\n"))


def _unescaped(text: str) -> str:
    return "\n".join(line.removeprefix("\\") for line in text.split("\n"))


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n') else text


def _value(text: str) -> Any:
    if text.startswith('"'):
        return json.loads(text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
