"""Learned words (textual inversion, Gal et al. 2022) from safetensors files: vectors in place of a word's embedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from sdjax.errors import CheckpointError
from sdjax.loading.weights import open_tensors

FOLDER_FILE = "learned_embeds.safetensors"
"""What diffusers calls the file in a folder of its own."""
XL_KEYS = ("clip_l", "clip_g")
"""What a file for SDXL calls its tensors, in the order of the text encoders."""
NAMELESS = "emb_params"
"""What AUTOMATIC1111's files call their tensor; diffusers' call it by the word that stands for it."""


@dataclass(frozen=True)
class Embedding:
    """A word and what it means.

    Attributes:
        name: stands for it in a prompt.
        vectors: for each text encoder (n, width) float32; the word takes n places.
    """

    name: str
    vectors: tuple[NDArray[np.float32], ...]


def load_embedding(source: str | Path, name: str | None = None, *, widths: Sequence[int]) -> Embedding:
    """Read a learned word.

    Args:
        source: a .safetensors file, or a folder with a `learned_embeds.safetensors`. SD 1 and 2: one tensor, (n, width)
            or (width,), under any name. SDXL: `clip_l` and `clip_g`.
        name: stands for it in a prompt; None takes the tensor's name, or where that says nothing the file's.
        widths: of the checkpoint's text encoders, in order.

    Raises:
        CheckpointError: the file can't be read, or is not for this checkpoint; the message has both sizes.
    """
    file = Path(source)
    if file.is_dir():
        file = file / FOLDER_FILE
    if not file.exists():
        raise CheckpointError(f"{file} is missing: an embedding is a .safetensors file, or a folder with {FOLDER_FILE}")
    keys = sorted(open_tensors(file))
    if set(keys) == set(XL_KEYS):
        order: Sequence[str] = XL_KEYS
    elif len(keys) == 1 and keys[0] not in XL_KEYS:
        order = keys
    else:
        raise CheckpointError(
            f"{file} holds {', '.join(map(repr, keys)) or 'nothing'}: an embedding is one tensor, or for SDXL clip_l "
            "and clip_g"
        )
    if len(order) != len(widths):
        raise CheckpointError(
            f"{file} has {len(order)} tensor{'s' * (len(order) > 1)} ({', '.join(order)}) and the model has "
            f"{len(widths)} text encoder{'s' * (len(widths) > 1)}: it was learned for another kind of model"
        )
    if name is None:
        name = file.stem if order is XL_KEYS or order == [NAMELESS] else order[0]
    if not name.strip():
        raise CheckpointError(f"{file}: an embedding's name must not be blank, and it is {name!r}")
    with safe_open(file, "np") as opened:
        vectors = [np.atleast_2d(opened.get_tensor(key)).astype(np.float32) for key in order]
    for key, rows, width in zip(order, vectors, widths, strict=True):
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
            raise CheckpointError(
                f"{file}: {key!r} has shape {rows.shape}, and the model's text encoder needs (n, {width}): width "
                f"{rows.shape[-1]} is of another kind of model, if not {width}"
            )
        if not np.isfinite(rows).all():
            raise CheckpointError(f"{file}: {key!r} holds NaN or infinity")
    if len({len(rows) for rows in vectors}) > 1:
        counts = " and ".join(str(len(rows)) for rows in vectors)
        raise CheckpointError(f"{file} has {counts} vectors for the text encoders, and they must be as many")
    return Embedding(name.strip(), tuple(vectors))
