"""Learned words (textual inversion, Gal et al. 2022) from safetensors files: vectors in place of a word's embedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from sdjax.errors import CheckpointError
from sdjax.loading.weights import check_finite, open_tensors, read_tensors

FOLDER_FILE = "learned_embeds.safetensors"
"""What diffusers calls the file in a folder of its own."""
XL_KEYS: Mapping[str, str] = MappingProxyType({"text_encoder": "clip_l", "text_encoder_2": "clip_g"})
"""What a file for SDXL calls the tensor of each text encoder."""
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


def load_embedding(source: str | Path, name: str | None = None, *, widths: Mapping[str, int]) -> Embedding:
    """Read a learned word.

    Args:
        source: a .safetensors file, or a folder with a `learned_embeds.safetensors`. SD 1 and 2: one tensor, (n, width)
            or (width,), under any name. SDXL: `clip_l` and `clip_g`.
        name: stands for it in a prompt; None takes the tensor's name, or where that says nothing the file's.
        widths: of the checkpoint's text encoders, by name. SDXL's refiner has the second alone, and takes its tensor.

    Raises:
        CheckpointError: the file can't be read, or is not for this checkpoint; the message has both sizes.
    """
    file = Path(source)
    if file.is_dir():
        file = file / FOLDER_FILE
    if not file.exists():
        raise CheckpointError(f"{file} is missing: an embedding is a .safetensors file, or a folder with {FOLDER_FILE}")
    keys = sorted(open_tensors(file))
    of_xl = set(keys) == set(XL_KEYS.values())
    if not of_xl and len(keys) != 1:
        raise CheckpointError(
            f"{file} holds {', '.join(map(repr, keys)) or 'nothing'}: an embedding is one tensor, or for SDXL "
            f"{' and '.join(XL_KEYS.values())}"
        )
    if of_xl != ("text_encoder_2" in widths):
        kind = "SDXL" if of_xl else "SD 1 or 2"
        raise CheckpointError(
            f"{file} was learned for {kind} (it holds {', '.join(keys)}), and the model has {' and '.join(widths)}"
        )
    order = [XL_KEYS[encoder] for encoder in widths] if of_xl else keys
    if name is None:
        name = file.stem if of_xl or order == [NAMELESS] else order[0]
    if not name.strip():
        raise CheckpointError(f"{file}: an embedding's name must not be blank, and it is {name!r}")
    tensors = read_tensors(file)
    for key in order:
        check_finite(tensors[key], f"{file}: {key!r}")
    vectors = [np.atleast_2d(tensors[key]).astype(np.float32) for key in order]
    for key, rows, width in zip(order, vectors, widths.values(), strict=True):
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
            raise CheckpointError(
                f"{file}: {key!r} has shape {rows.shape}, and the model's text encoder has width {width}: it takes "
                f"(n, {width})"
            )
    if len({len(rows) for rows in vectors}) > 1:
        counts = " and ".join(str(len(rows)) for rows in vectors)
        raise CheckpointError(f"{file} has {counts} vectors for the text encoders, and they must be as many")
    return Embedding(name.strip(), tuple(vectors))
