"""Reading a checkpoint's config.json: what changes the result is either understood or refused by name."""

from collections.abc import Collection, Mapping
from typing import Any

ABSENT: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})
"""Values under which an unknown switch is taken to be off."""


def check_keys(
    config: Mapping[str, Any],
    *,
    model: str,
    read: Collection[str],
    fixed: Mapping[str, Collection[Any]],
    ignored: Collection[str],
) -> None:
    """Refuse a config that asks for something this implementation would silently not do.

    Args:
        config: the parsed config.json.
        model: the name that errors give the model.
        read: keys that the caller reads.
        fixed: keys that must hold one of the given values where they are present.
        ignored: keys that cannot change a result of inference.

    Raises:
        ValueError: a fixed key has another value, or an unknown key is switched on.
    """
    for key, value in config.items():
        if key.startswith("_") or key in read or key in ignored:
            continue
        if key in fixed:
            if value not in fixed[key]:
                allowed = " or ".join(repr(option) for option in fixed[key])
                raise ValueError(f"{model} config: {key} is {value!r}, and only {allowed} is supported")
        elif value not in ABSENT:
            raise ValueError(f"{model} config: {key} = {value!r} is not supported (remove the key if it has no effect)")


def per_block(value: Any, blocks: int, *, key: str, model: str) -> tuple[Any, ...]:
    """Spread a scalar over `blocks` blocks, or check that a list has one entry for each.

    Raises:
        ValueError: the list has another length.
    """
    if not isinstance(value, list | tuple):
        return (value,) * blocks
    if len(value) != blocks:
        raise ValueError(f"{model} config: {key} has {len(value)} entries {list(value)!r} for {blocks} blocks")
    return tuple(value)
