"""ControlNets, from folders in diffusers layout."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from sdjax.errors import CheckpointError
from sdjax.loading.folder import read_json
from sdjax.loading.passengers import without_passengers
from sdjax.loading.weights import Place, fill, find_tensors
from sdjax.models import ControlNet, ControlNetConfig, Params, define

STEM = "diffusion_pytorch_model"
KEPT = 4
"""ControlNets that stay in memory after their call, the latest ones."""


def load_controlnet(folder: Path, *, dtype: DTypeLike, place: Place) -> tuple[Any, Params, ControlNetConfig]:
    """Load a ControlNet; the same folder, unchanged, is not read again for an equal `place`.

    Args:
        folder: in diffusers layout.
        dtype: of parameters and arithmetic.
        place: puts a leaf, whose path begins with "controlnet", on its device or devices; hashable.

    Returns:
        Its definition, parameters and config.

    Raises:
        CheckpointError: it can't be found or read.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r} with a ControlNet")
    stamps = tuple(sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir()))
    return _load(folder.resolve(), stamps, jax.numpy.dtype(dtype).name, place)


@lru_cache(maxsize=KEPT)
def _load(folder: Path, _stamps: tuple[Any, ...], dtype: str, place: Place) -> tuple[Any, Params, ControlNetConfig]:
    try:
        config = ControlNetConfig.from_dict(read_json(folder / "config.json"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    definition, shapes = define(ControlNet, config, dtype=dtype, param_dtype=dtype)
    params = fill(
        shapes,
        without_passengers(find_tensors(folder, STEM, None), "controlnet"),
        component=str(folder),
        place=lambda path, array: place(("controlnet", *path), array),
    )
    return definition, params, config
