"""`<lora:name:0.8>` in a prompt: an adapter and its weight, taken out before anything is encoded.

AUTOMATIC1111's notation, which most tools read: `<lora:name>` has weight 1. A weight for the text encoder and another
for the UNet (`<lora:name:0.5:0.8>`) are supported only where they are equal. `<lyco:...>` is the same.
"""

import math
import re
from typing import NamedTuple

from sdjax.errors import Warn

_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)


class LoraTag(NamedTuple):
    """One tag: as it was written, the adapter's name, and its weight."""

    text: str
    name: str
    weight: float


def take_tags(prompt: str, *, warn: Warn) -> tuple[str, tuple[LoraTag, ...]]:
    """Take the tags out of a prompt.

    Args:
        prompt: any text.
        warn: called with each tag that can't be honoured; it is taken out, too.

    Returns:
        The prompt without them, and those that can be honoured, in order.
    """
    tags = []
    for match in _TAG.finditer(prompt):
        tag = _read(match[0], match[1])
        if tag is None:
            warn(f"{_shown(match[0])} is left out: it must be <lora:name> or <lora:name:weight>, with one weight")
        else:
            tags.append(tag)
    return _TAG.sub("", prompt), tuple(tags)


def _read(text: str, body: str) -> LoraTag | None:
    name, *weights = (part.strip() for part in body.split(":"))
    try:
        numbers = {float(weight) for weight in weights} or {1.0}
    except ValueError:
        return None
    (weight,) = numbers if len(numbers) == 1 else (math.nan,)
    return LoraTag(text, name, weight) if name and math.isfinite(weight) else None


def _shown(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:56]} ..."
