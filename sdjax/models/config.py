"""Reading a checkpoint's config.json: what changes the result is either understood or refused by name."""

from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

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


def check_names(config: Mapping[str, Any], keys: Collection[str], *, model: str) -> None:
    """Refuse what should be a list of names and is something else.

    Raises:
        ValueError: the value of a key is no list of strings; one that is absent or None is passed over.
    """
    for key in keys:
        names = config.get(key)
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{model} config: {key} is {names!r}, which should be a list of names")


def check_types(config: Config, *, model: str) -> Config:
    """Refuse a config whose fields hold something else than they are declared to.

    Args:
        config: a dataclass, made from a config.json.
        model: the name that errors give the model.

    Raises:
        ValueError: a field is of another type, or a number that counts something is below 1; it is named.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is(value, hint):
            raise ValueError(f"{model} config: {name} is {value!r}, which should be {_described(hint)}")
    return config


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_is(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        of = get_args(hint)[0]
        return isinstance(value, tuple) and len(value) > 0 and all(_is(entry, of) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    if get_origin(hint) is UnionType:
        return " or ".join(map(_described, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each entry {_described(get_args(hint)[0])}"
    return {
        int: "a whole number from 0",
        float: "a number",
        bool: "true or false",
        str: "a text",
        NoneType: "absent",
    }.get(hint, str(hint))


def sides(value: Any, *, key: str, model: str) -> tuple[int, int]:
    """(height, width) of a size: one number for both, or a list of two.

    Raises:
        ValueError: it is neither.
    """
    both = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(both) != 2 or not all(type(side) is int and side > 0 for side in both):
        raise ValueError(f"{model} config: {key} is {value!r}, which should be a whole number or two, height and width")
    return both


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
