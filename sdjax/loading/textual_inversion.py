"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): learned vectors that stand for a word in a prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.core import FrozenDict
from numpy.typing import NDArray

from sdjax.errors import CheckpointError
from sdjax.loading.weights import check_finite, read_tensors

UNNAMED = "emb_params"
ENCODER_KEYS: tuple[tuple[str, str], ...] = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
"""How files for SDXL spell the first and the second encoder: common trainers' way, and that of diffusers' script."""


class Embedding(NamedTuple):
    """A learned word.

    `name` is the file's own, or the file's name without its ending; `vectors` are by the text encoder's index,
    (n, width) float32, the same n in all: the word takes n positions in a prompt.
    """

    name: str
    vectors: Mapping[int, NDArray[np.float32]]


def read_embedding(file: str | Path, widths: Sequence[int]) -> Embedding:
    """Read a learned word for a model.

    Args:
        file: .safetensors with `emb_params` or one named tensor (SD 1 and SD 2), or `clip_l` and `clip_g` (SDXL).
        widths: of the model's text encoders (`hidden_size`), in order.

    Raises:
        CheckpointError: it can't be read, or is for encoders of other widths or another number; both are named.
    """
    file = Path(file).expanduser()
    tensors = read_tensors(file)
    pairs = [pair for pair in ENCODER_KEYS if tensors.keys() & set(pair)]
    if len(tensors) == 1 and not pairs:
        ((name, tensor),) = tensors.items()
        parts, name = [(name, tensor)], file.stem if name == UNNAMED else name
    elif len(pairs) == 1 and tensors.keys() == set(pairs[0]):
        parts, name = [(key, tensors[key]) for key in pairs[0]], file.stem
    else:
        held = ", ".join(map(repr, tensors)) or "nothing"
        raise CheckpointError(
            f"{file} is no textual inversion: it should hold {UNNAMED} or one named tensor, or clip_l and clip_g, and "
            f"has {held}"
        )
    if not name.strip():
        raise CheckpointError(f"{file} names its word {name!r}, which no prompt can hold")
    if len(parts) != len(widths):
        described = " and ".join(f"{key} of shape {tensor.shape}" for key, tensor in parts)
        raise CheckpointError(
            f"{file} is for {_encoders(len(parts))} ({described}), and this model has {_encoders(len(widths))}, of "
            f"width {' and '.join(map(str, widths))}"
        )
    vectors = {
        i: _vectors(tensor, width, f"{file}: {key}")
        for i, ((key, tensor), width) in enumerate(zip(parts, widths, strict=True))
    }
    counts = [len(rows) for rows in vectors.values()]
    if len(set(counts)) > 1:
        raise CheckpointError(f"{file} has {' and '.join(map(str, counts))} vectors: it needs as many for each encoder")
    return Embedding(name, FrozenDict(vectors))


def _vectors(tensor: NDArray[Any], width: int, where: str) -> NDArray[np.float32]:
    check_finite(tensor, where)
    rows = tensor.reshape(1, -1) if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or not len(rows):
        raise CheckpointError(f"{where} has shape {tensor.shape}, not (vectors, width)")
    if rows.shape[1] != width:
        raise CheckpointError(f"{where} has width {rows.shape[1]}, and this model's text encoder has width {width}")
    return rows.astype(np.float32)


def _encoders(count: int) -> str:
    return "one text encoder" if count == 1 else f"{count} text encoders"
