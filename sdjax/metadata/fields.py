"""The fields that tools share, their values, and JSON from files that anyone may have written."""

import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NUMBERS: Mapping[str, type[int] | type[float]] = MappingProxyType(
    {"steps": int, "seed": int, "clip_skip": int, "guidance_scale": float, "strength": float}
)
"""The fields that are numbers; all others are text."""
TEXTS = ("sampler", "schedule", "size", "loras", "embeddings", "long_prompts", "model")
SHARED = ("prompt", "negative_prompt", *NUMBERS, *TEXTS)
_WHOLE = re.compile(r"[+-]?\d{1,20}(?:\.0+)?", re.ASCII)


def fields(
    prompt: object, negative_prompt: object, known: Mapping[str, object], others: Mapping[str, object]
) -> dict[str, Any]:
    """Put together what a tool wrote.

    Args:
        prompt: as text; None where the tool wrote none.
        negative_prompt: likewise.
        known: by the names of `SHARED`; what is None is left out.
        others: by the tool's own names; a name of `SHARED` among them is left out, and so is what is no single value.
    """
    found: dict[str, Any] = {"prompt": _text(prompt) or "", "negative_prompt": _text(negative_prompt)}
    for name, value in known.items():
        number = NUMBERS.get(name)
        if value is not None and (single := _text(value)) is not None:
            found[name] = single if number is None else _number(single, number)
    for name, value in others.items():
        single = _text(value)
        if name not in SHARED and single is not None:
            found[_printable(name)] = single
    return found


def size(width: object, height: object) -> str | None:
    """`512x768`, where both sides are numbers."""
    sides = [_number(_text(side) or "", int) for side in (width, height)]
    return f"{sides[0]}x{sides[1]}" if all(isinstance(side, int) for side in sides) else None


def layers_left_out(value: object) -> int | None:
    """A `clip_skip` as sdjax counts, from tools that count the last layer too; None where nothing is left out.

    Args:
        value: 1 or -1 for the last layer, 2 or -2 for the one before it.
    """
    number = _number(_text(value) or "", int)
    return abs(number) - 1 if isinstance(number, int) and abs(number) > 1 else None


def json_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object; None where the text is none. NaN and infinities become text, which JSON can hold."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text, parse_constant=str, parse_float=_finite_or_text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _finite_or_text(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _number(text: str, kind: type[int] | type[float]) -> int | float | str:
    """The number that a text is, or the text."""
    if kind is int:
        return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else text
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _text(value: object) -> str | None:
    """A single value as text; None for lists, objects and null."""
    if isinstance(value, bool):
        return str(value).lower()
    return _printable(str(value)) if isinstance(value, str | int | float) else None


def _printable(text: str) -> str:
    """Halves of surrogate pairs, which JSON can spell, have no encoding: they become question marks."""
    return text.encode("utf-8", "replace").decode()
