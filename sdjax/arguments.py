"""What the texts of options mean."""

import difflib
import re
from pathlib import Path

from sdjax.errors import RequestError
from sdjax.variants import VARIANTS


def size(text: str) -> tuple[int, int]:
    """Width and height of `512` or `512x768`.

    Raises:
        RequestError: it is something else.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
    if not match:
        raise RequestError(f"--size: must be like 512 or 512x768 (width x height), not {text[:60]!r}")
    return int(match[1]), int(match[2] or match[1])


def size_if_given(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """The same; None twice where there is none."""
    return (None, None) if text is None else size(text)


def with_number(given: str, default: float) -> tuple[str, float]:
    """Take `FILE:0.8` apart; a file's name may hold colons."""
    name, colon, tail = given.rpartition(":")
    if colon:
        try:
            return name, float(tail)
        except ValueError:
            pass
    return given, default


def with_variant(given: str) -> tuple[str, str | None]:
    """Take `MODEL@fp16` apart; a path's name may hold an @."""
    name, at, variant = given.rpartition("@")
    return (name, variant) if at and name and not Path(given).exists() else (given, None)


def check_model(model: str | None) -> None:
    """A word that is neither a known name nor a path is a slip of the keyboard: say what is near it.

    Raises:
        RequestError: it is such a word.
    """
    if model is None or model in VARIANTS or "/" in model or Path(model).exists():
        return
    near = difflib.get_close_matches(model, VARIANTS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(VARIANTS)}, hub ids (owner/name) and paths"
    raise RequestError(f"there is no model {model!r}: {hint}")
