"""Parameters with LoRAs in them, by path and weight, merged once for as long as the files stay the same."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sdjax.errors import CheckpointError, RequestError
from sdjax.loading.lora import Adapter, apply_lora, checked_weight, refuse_int8
from sdjax.loading.lora_file import bundled_embeddings, read_lora
from sdjax.loading.textual_inversion import Embedding
from sdjax.models import Params

Loras: TypeAlias = Sequence[tuple[str | Path, float]]
"""Files or folders, each with its weight."""
Stamp: TypeAlias = tuple[tuple[str, int, int, int, int], ...]

ADAPTERS_KEPT, MERGES_KEPT, EMBEDDINGS_KEPT = 8, 2, 64


class Merged(NamedTuple):
    """Parameters with LoRAs in them. `key` is equal for LoRAs of equal contents and weights, in the same order."""

    params: Params
    key: tuple[tuple[str, float], ...]


def lora_merger(params: Params) -> Callable[[Loras], Merged]:
    """Make the function that gives a model's parameters with some LoRAs in them.

    It keeps the last few adapters, and the last two merges (which share all untouched arrays with `params`). Both are
    remembered by each file's path, inode, size and times, so a file that is replaced in place is read again. Threads
    may share it.

    Args:
        params: of the whole pipeline; they are never written to.

    Returns:
        merged(loras) -> Merged. Without loras, or where all weights are 0, it has the very same `params`. It raises
        RequestError for what is not a list of (path, finite weight), and CheckpointError as `read_lora` does.
    """

    @lru_cache(ADAPTERS_KEPT)
    def adapter(path: Path, _: Stamp) -> Adapter:
        return read_lora(path, params)

    @lru_cache(MERGES_KEPT)
    def merge(adapters: tuple[tuple[Adapter, float], ...]) -> Params:
        return apply_lora(params, adapters)

    def merged(loras: Loras) -> Merged:
        stamped = [(path, _stamp(path), weight) for path, weight in checked_loras(loras)]
        if not stamped:
            return Merged(params, ())
        refuse_int8(params)
        adapters = tuple((adapter(path, stamp), weight) for path, stamp, weight in stamped)
        return Merged(merge(adapters), tuple((adapter.digest, weight) for adapter, weight in adapters if weight))

    return merged


def embeddings_of(loras: Loras, widths: Mapping[str, int]) -> tuple[Embedding, ...]:
    """Read the learned words that come with adapters, each once; those of weight 0 are not there at all.

    Args:
        loras: files or folders that were checked, with their weights.
        widths: of the checkpoint's text encoders, by name.

    Raises:
        CheckpointError: a file can't be read, or a word was learned for another kind of model.
    """
    paths = dict.fromkeys(Path(path) for path, weight in loras if weight)
    return tuple(word for path in paths for word in _bundled(path, _stamp(path), tuple(widths.items())))


@lru_cache(EMBEDDINGS_KEPT)
def _bundled(path: Path, _: Stamp, widths: tuple[tuple[str, int], ...]) -> tuple[Embedding, ...]:
    return bundled_embeddings(path, dict(widths))


def checked_loras(loras: object) -> tuple[tuple[Path, float], ...]:
    """Check the form of `loras`, without looking at a file.

    Raises:
        RequestError: it is not a sequence of (path, finite number).
    """
    if isinstance(loras, str | bytes) or not isinstance(loras, Sequence):
        raise RequestError(f"loras must be a list of (file or folder, weight), not {loras!r}")
    return tuple(_checked_entry(entry, f"loras[{i}]") for i, entry in enumerate(loras))


def _checked_entry(entry: object, name: str) -> tuple[Path, float]:
    match entry:
        case (str() | Path() as path, weight):
            return Path(path).expanduser(), checked_weight(weight, f"{name} ({path})")
    raise RequestError(f"{name} must be (file or folder, weight), not {entry!r}")


def _stamp(path: Path) -> Stamp:
    """What changes when a file, or any file in a folder, does."""
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(str(file), file.stat()) for file in files]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"there is no LoRA file or folder {str(path)!r}: {why}") from error
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)
