"""Checkpoints: found, read into a definition and immutable parameters, and written back."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from jax.typing import DTypeLike

from sdjax.errors import CheckpointError, RequestError
from sdjax.loading.adapter_folder import find_adapter
from sdjax.loading.card import Card, read_card
from sdjax.loading.checkpoint import Checkpoint, assemble
from sdjax.loading.controlnet import load_controlnet
from sdjax.loading.folder import read_folder
from sdjax.loading.lora import Adapter, apply_lora, refuse_int8
from sdjax.loading.lora_cache import checked_loras, embeddings_of, lora_merger
from sdjax.loading.lora_file import read_lora
from sdjax.loading.other_vae import with_vae
from sdjax.loading.part import Part, as_part
from sdjax.loading.saving import save_folder
from sdjax.loading.single_file import read_file
from sdjax.loading.source import cached, locate
from sdjax.loading.textual_inversion import Embedding, load_embedding
from sdjax.loading.tokenizer import ClipTokenizer
from sdjax.loading.weights import Place
from sdjax.models import Family
from sdjax.schedulers.config import PredictionType

__all__ = [
    "Adapter",
    "Card",
    "Checkpoint",
    "ClipTokenizer",
    "Embedding",
    "Part",
    "apply_lora",
    "as_part",
    "cached",
    "checked_loras",
    "embeddings_of",
    "find_adapter",
    "load",
    "load_controlnet",
    "load_embedding",
    "locate",
    "lora_merger",
    "read_card",
    "read_lora",
    "refuse_int8",
    "save_folder",
]


def load(
    source: str | Path,
    *,
    dtype: DTypeLike,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    prediction_type: str | None = None,
    vae: Part | None = None,
    placing: Callable[[Family], Place] | None = None,
) -> Checkpoint:
    """Load a folder in diffusers layout, a file in the original layout, or a repository on the hub.

    Args:
        source: a folder's or .safetensors file's path, or `owner/name`.
        dtype: of parameters and arithmetic.
        variant: of the weight files, such as "fp16".
        revision: a branch, tag or commit of a repository.
        local_files_only: ask no network.
        prediction_type: what the network predicts: "epsilon", "v_prediction" or "sample", over all that the checkpoint
            says; None goes by the folder's scheduler config, and in a file by the rules of `single_file`.
        vae: an autoencoder in the place of the checkpoint's own; None takes that.
        placing: makes, for the checkpoint's family, the function that places a parameter by its path in the whole;
            None takes the default device.

    Raises:
        CheckpointError: with what is missing or does not fit.
        RequestError: `prediction_type` is none of those.
    """
    if prediction_type not in (None, *get_args(PredictionType)):
        allowed = ", ".join(map(repr, get_args(PredictionType)))
        raise RequestError(f"prediction_type must be {allowed} or None, not {prediction_type!r}")
    path = locate(source, variant=variant, revision=revision, local_files_only=local_files_only)
    if path.is_dir():
        parts = read_folder(path, variant=variant, prediction_type=prediction_type)
    elif variant is not None:
        raise CheckpointError(f"{path} is one file, and variant={variant!r} picks among those of a folder")
    else:
        parts = read_file(path, prediction_type=prediction_type)
    return assemble(parts if vae is None else with_vae(parts, vae), dtype=dtype, placing=placing)
