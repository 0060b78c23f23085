"""Adapters by name, inside one folder: a name from a prompt or a client must not lead out of it."""

from pathlib import Path, PurePosixPath

from sdjax.errors import RequestError

SUFFIX = ".safetensors"


def find_adapter(folder: Path, name: str) -> Path:
    """Find the file or folder of an adapter, which lies inside `folder`, without a link on the way.

    Args:
        folder: of all adapters.
        name: a path relative to it, in which the suffix .safetensors may be left out.

    Returns:
        Its whole path.

    Raises:
        RequestError: there is none, or the name leads elsewhere.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise RequestError(f"must be a name inside the adapter folder, not {name[:60]!r}")
    try:
        root = folder.expanduser().resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise RequestError("the folder of adapters is not there") from error
    for candidate in (root / path, root / f"{path}{SUFFIX}"):
        try:
            found = candidate.resolve(strict=True)
        except (OSError, RuntimeError):
            continue
        if found != candidate:
            raise RequestError(f"must not be a link, and {name[:60]!r} is or goes through one")
        return found
    raise RequestError(f"there is no adapter {name[:60]!r}")
