"""One model of a pipeline by itself: a ControlNet or an autoencoder, wherever it lies."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sdjax.errors import CheckpointError, RequestError
from sdjax.loading.source import locate
from sdjax.loading.weights import Tensor, find_tensors, open_tensors

STEM = "diffusion_pytorch_model"
CONFIG = "config.json"


class Part(NamedTuple):
    """Where one model lies.

    Attributes:
        source: a folder with a config.json, a whole pipeline's folder that has such a one, a .safetensors file, or the
            id of a repository on the hub (`owner/name`).
        variant: of the weight files in a folder or repository, such as "fp16"; None takes those without.
        revision: a branch, tag or commit of a repository.
        local_files_only: ask no network.
    """

    source: str | Path
    variant: str | None = None
    revision: str | None = None
    local_files_only: bool = False


class Found(NamedTuple):
    """A model's tensors by name, and its config.json, which a single file may lack."""

    where: str
    tensors: dict[str, Tensor]
    config: Path | None


def as_part(given: object, name: str) -> Part:
    """Check an argument that names one model.

    Raises:
        RequestError: it is no path, id or `Part`.
    """
    if isinstance(given, Part):
        return given
    if isinstance(given, str | Path) and str(given):
        return Part(given)
    raise RequestError(f"{name} must be a folder, a .safetensors file, a hub id or a Part, not {given!r}")


def find_part(part: Part, name: str) -> Path:
    """Find a model's folder or file, fetching it from the hub where that is needed, once a process.

    Args:
        part: where to look.
        name: of the model's folder within a whole pipeline, "controlnet" or "vae".

    Returns:
        A .safetensors file, or a folder with a config.json.

    Raises:
        CheckpointError: it can't be found.
    """
    here = Path(part.source).expanduser()
    path = _locate(part, name) if here.exists() else _fetched(part, name)
    if not path.is_dir():
        if part.variant is not None:
            raise CheckpointError(f"{path} is one file, and variant={part.variant!r} picks among those of a folder")
        return path
    folder = next((folder for folder in (path, path / name) if (folder / CONFIG).is_file()), None)
    if folder is None:
        raise CheckpointError(f"{path} has no {CONFIG}, nor has a folder {name!r} in it: it is no {name}")
    return folder


def read_part(part: Part, name: str) -> Found:
    """List a model's tensors; weights stay in their files.

    Args:
        part: where it lies.
        name: see `find_part`.

    Raises:
        CheckpointError: it can't be found or read.
    """
    path = find_part(part, name)
    if path.is_dir():
        return Found(str(path), find_tensors(path, STEM, part.variant), path / CONFIG)
    beside = path.parent / CONFIG
    # A file of a folder in diffusers layout that was given by its own path.
    named = path.name.startswith(f"{STEM}.") and beside.is_file()
    return Found(str(path), open_tensors(path), beside if named else None)


def _locate(part: Part, name: str) -> Path:
    source, variant, revision, local_files_only = part
    return locate(source, variant=variant, revision=revision, local_files_only=local_files_only, part=name)


# A repository is asked for once, not at every picture.
_fetched = lru_cache(maxsize=64)(_locate)
