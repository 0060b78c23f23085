"""What the texts of options mean."""

import re

from sdjax.errors import RequestError


def size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of `512` or `512x768`.

    Raises:
        RequestError: it is something else.
    """
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise RequestError(f"--size must be like 512 or 512x768 (width x height), not {text!r}")
    width = int(match[1])
    return width, int(match[2] or width)


def with_number(given: str, default: float) -> tuple[str, float]:
    """Take `FILE:0.8` apart; a file's name may hold colons."""
    name, colon, tail = given.rpartition(":")
    if colon:
        try:
            return name, float(tail)
        except ValueError:
            pass
    return given, default
