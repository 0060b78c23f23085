"""Checkpoints: found, read into a definition and immutable parameters, and written back."""

from pathlib import Path

from jax.typing import DTypeLike

from sdjax.loading.checkpoint import Checkpoint, assemble
from sdjax.loading.controlnet import load_controlnet
from sdjax.loading.folder import read_folder
from sdjax.loading.lora import Adapter, apply_lora
from sdjax.loading.lora_cache import checked_lora, lora_merger
from sdjax.loading.lora_file import read_lora
from sdjax.loading.saving import save_folder
from sdjax.loading.source import locate
from sdjax.loading.textual_inversion import Embedding, load_embedding
from sdjax.loading.tokenizer import ClipTokenizer

__all__ = [
    "Adapter",
    "Checkpoint",
    "ClipTokenizer",
    "Embedding",
    "apply_lora",
    "checked_lora",
    "load",
    "load_controlnet",
    "load_embedding",
    "lora_merger",
    "read_lora",
    "save_folder",
]


def load(
    source: str | Path,
    *,
    dtype: DTypeLike,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Load a folder in diffusers layout, a file in the original layout, or a repository on the hub.

    Args:
        source: a folder's or .safetensors file's path, or `owner/name`.
        dtype: of parameters and arithmetic.
        variant: of the weight files, such as "fp16".
        revision: a branch, tag or commit of a repository.
        local_files_only: ask no network.

    Raises:
        CheckpointError: with what is missing or does not fit.
    """
    path = locate(source, variant=variant, revision=revision, local_files_only=local_files_only)
    return assemble(read_folder(path, variant=variant), dtype=dtype)
