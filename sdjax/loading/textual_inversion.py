"""Learned words (textual inversion, Gal et al. 2022) from safetensors files: vectors in place of a word's embedding.

The tensors' names are the encoders' (`clip_l`, `clip_g`), or say nothing (`emb_params`, `*`), or, in diffusers' files,
are the word that stands for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdjax.errors import CheckpointError
from sdjax.loading.weights import check_finite, read_tensors

FOLDER_FILE = "learned_embeds.safetensors"
"""What diffusers calls the file in a folder of its own."""
XL_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"text_encoder": ("clip_l", "text_encoders_0"), "text_encoder_2": ("clip_g", "text_encoders_1")}
)
"""What files for SDXL call the tensor of each text encoder."""
NAMELESS = (
    *(key for keys in XL_KEYS.values() for key in keys),
    *("clip_h", "emb_params", "embedding", "emb", "string_to_param", "string_to_param.*", "*", "weight", ""),
)
"""Names of tensors that are not the word: the word is then the file's name."""
NOT_VECTORS = ("string_to_token.*", "string_to_token", "step")
"""What AUTOMATIC1111's files hold beside the vectors."""


@dataclass(frozen=True)
class Embedding:
    """A word and what it means.

    Attributes:
        name: stands for it in a prompt.
        vectors: for each text encoder (n, width) float32; the word takes n places.
        bundled: whether it came with an adapter, so that it need not be in a prompt.
    """

    name: str
    vectors: tuple[NDArray[np.float32], ...]
    bundled: bool = False


def load_embedding(source: str | Path, name: str | None = None, *, widths: Mapping[str, int]) -> Embedding:
    """Read a learned word.

    Args:
        source: a .safetensors file, or a folder with a `learned_embeds.safetensors`. SD 1 and 2: one tensor, (n, width)
            or (width,), under any name. SDXL: `clip_l` and `clip_g`, or `text_encoders_0` and `text_encoders_1`.
        name: stands for it in a prompt; None takes the tensor's name, or, where that is one of `NAMELESS`, that of the
            file (of the folder, where that was given) without its ending.
        widths: of the checkpoint's text encoders, by name. SDXL's refiner has the second alone, and takes its tensor.

    Raises:
        CheckpointError: the file can't be read, or is not for this checkpoint; the message has both sizes.
    """
    given = Path(source).expanduser()
    file = given / FOLDER_FILE if given.is_dir() else given
    if not file.exists():
        raise CheckpointError(f"{file} is missing: an embedding is a .safetensors file, or a folder with {FOLDER_FILE}")
    return embedding_of(read_tensors(file), name, named_by=given.resolve() if given.is_dir() else file, widths=widths)


def embedding_of(
    tensors: Mapping[str, NDArray[Any]], name: str | None, *, named_by: Path, widths: Mapping[str, int]
) -> Embedding:
    """Make a learned word of its tensors.

    Args:
        tensors: by their names in the file.
        name: see `load_embedding`.
        named_by: the file or folder, whose name is the word where nothing else is, and for messages.
        widths: see `load_embedding`.

    Raises:
        CheckpointError: see `load_embedding`.
    """
    where = str(named_by)
    keys = sorted(key for key in tensors if key not in NOT_VECTORS)
    by_encoder = {encoder: [key for key in keys if key in spelled] for encoder, spelled in XL_KEYS.items()}
    of_xl = len(keys) == 2 and all(len(found) == 1 for found in by_encoder.values())
    if not of_xl and len(keys) != 1:
        raise CheckpointError(
            f"{where} holds {', '.join(map(repr, keys)) or 'nothing'}: an embedding is one tensor, or for SDXL "
            "clip_l and clip_g"
        )
    refines = not of_xl and list(widths) == ["text_encoder_2"] and keys[0] in XL_KEYS["text_encoder_2"]
    if not refines and of_xl != ("text_encoder_2" in widths):
        kind = "SDXL" if of_xl else "SD 1 or 2, or for one of SDXL's text encoders alone"
        raise CheckpointError(
            f"{where} was learned for {kind} (it holds {', '.join(keys)}), and the model has {' and '.join(widths)}"
        )
    order = [by_encoder[encoder][0] for encoder in widths] if of_xl else keys
    if name is None:
        stem = named_by.name if named_by.is_dir() else named_by.stem
        name = stem if of_xl or order[0] in NAMELESS else order[0]
    if not name.strip():
        raise CheckpointError(f"{where}: an embedding's name must not be blank, and it is {name!r}")
    for key in order:
        check_finite(tensors[key], f"{where}: {key!r}")
    vectors = [np.atleast_2d(tensors[key]).astype(np.float32) for key in order]
    for key, rows, width in zip(order, vectors, widths.values(), strict=True):
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
            raise CheckpointError(
                f"{where}: {key!r} has shape {rows.shape}, and the model's text encoder has width {width}: it takes "
                f"(n, {width})"
            )
    if len({len(rows) for rows in vectors}) > 1:
        counts = " and ".join(str(len(rows)) for rows in vectors)
        raise CheckpointError(f"{where} has {counts} vectors for the text encoders, and they must be as many")
    return Embedding(name.strip(), tuple(vectors))
