"""Checks on single values: each says what was given and what is allowed."""

import math

from sdjax.errors import RequestError


def whole(name: str, value: object, least: int, most: int | None) -> int:
    """Accept whole numbers of any kind, no booleans, within bounds."""
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RequestError(f"{name} must be a whole number {allowed}, not {value!r}")
    number: int = value.__index__()
    if number < least or (most is not None and number > most):
        raise RequestError(f"{name} must be a whole number {allowed}, not {number}")
    return number


def finite(name: str, value: object) -> float:
    """Accept finite numbers of any kind, no booleans, no text."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"{name} must be a finite number, not {value!r}")
    return number


def share(name: str, value: object) -> float:
    """Accept numbers from 0 to 1."""
    number = finite(name, value)
    if not 0 <= number <= 1:
        raise RequestError(f"{name} must be a number from 0 to 1, not {value!r}")
    return number


def pair(name: str, value: object) -> tuple[float, float]:
    """Accept two numbers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise RequestError(f"{name} must be a pair of numbers (height, width), not {value!r}")
    return finite(name, value[0]), finite(name, value[1])
