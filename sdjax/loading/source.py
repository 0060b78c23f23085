"""Where a model lies: a folder, one file, or a repository on the hub (fetched into its cache)."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from sdjax.errors import CheckpointError
from sdjax.loading.card import CARD
from sdjax.loading.folder import STEMS, read_folder
from sdjax.loading.weights import PICKLES, PICKLES_REFUSED, choose_weights, variant_of

INDEX = "model_index.json"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
HUB_HINT = "without a network, download it elsewhere and give the folder's path, or set HF_HOME to a filled cache"
LOGIN_HINT = "log in with `hf auth login`, or set HF_TOKEN"


def locate(
    source: str | Path, *, variant: str | None, revision: str | None, local_files_only: bool, part: str | None = None
) -> Path:
    """Find a model's folder or file, fetching it from the hub where the source is a repository's id.

    Args:
        source: an existing folder, an existing .safetensors file, or `owner/name`.
        variant: of the weight files to fetch.
        revision: a branch, tag or commit of the repository.
        local_files_only: take what the hub's cache has, and ask no network.
        part: the one model that is wanted, "controlnet" or "vae"; None is a whole pipeline.

    Raises:
        CheckpointError: there is no such folder, file or repository, or the hub can't be reached.
    """
    path = Path(source).expanduser()
    if path.suffix in PICKLES and not path.is_dir():
        raise CheckpointError(f"{source}: {PICKLES_REFUSED}")
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{path} lies here, and revision={revision!r} names one of a repository on the hub")
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or path.suffix == ".safetensors":
        raise CheckpointError(f"there is no folder or file {name!r}")
    return _fetch(name, part, variant=variant, revision=revision, local_files_only=local_files_only)


def cached(source: str | Path, *, variant: str | None = None, revision: str | None = None) -> bool:
    """Whether a model can be loaded without a network. Asks none, and reads no more than its weights' headers.

    Args:
        source: as for `locate`.
        variant: as for `locate`.
        revision: as for `locate`.
    """
    try:
        path = locate(source, variant=variant, revision=revision, local_files_only=True)
        if path.is_dir():
            read_folder(path, variant=variant, prediction_type=None)
    except CheckpointError:
        return False
    return True


def needed_files(repository: str, files: Sequence[str], variant: str | None) -> list[str]:
    """Choose what to fetch of a repository: configs, card, tokenizers, and one set of weights for each component.

    Args:
        repository: its id, for errors.
        files: all that it holds, by path.
        variant: of the weight files.

    Raises:
        CheckpointError: it is no repository in diffusers layout, or lacks weights of that variant.
    """
    if INDEX not in files:
        raise CheckpointError(f"{repository} is not in diffusers layout: it has no {INDEX}{_single(files)}")
    settings = [INDEX, CARD, "scheduler/scheduler_config.json", *(f"{component}/config.json" for component in STEMS)]
    settings += [f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in TOKENIZER_FILES]
    wanted = [name for name in settings if name in files]
    for component, stem in STEMS.items():
        names = [name.removeprefix(f"{component}/") for name in files if name.startswith(f"{component}/")]
        if not names:
            continue
        wanted += [
            f"{component}/{name}" for name in _weight_files(names, stem, variant, where=f"{repository}/{component}")
        ]
    return wanted


def needed_files_of_part(repository: str, part: str, files: Sequence[str], variant: str | None) -> list[str]:
    """Choose what to fetch for one model: its config, and one set of weights.

    Args:
        repository: its id, for errors.
        part: "controlnet" or "vae": a whole pipeline has it in a folder of that name.
        files: all that it holds, by path.
        variant: of the weight files.

    Raises:
        CheckpointError: the repository has no such model, or lacks weights of that variant.
    """
    folder = next((folder for folder in ("", f"{part}/") if f"{folder}config.json" in files), None)
    if folder is None:
        raise CheckpointError(f"{repository} has no config.json, nor has a folder {part!r} in it{_single(files)}")
    names = [name.removeprefix(folder) for name in files if name.startswith(folder)]
    where = f"{repository}/{folder}".rstrip("/")
    chosen = _weight_files(names, STEMS["vae"], variant, where=where)
    return [folder + name for name in ("config.json", *chosen)]


def _weight_files(names: Sequence[str], stem: str, variant: str | None, *, where: str) -> list[str]:
    """One set of weights: a file, or an index and its shards."""
    chosen = choose_weights(names, stem, variant, where=where)
    shards = [name for name in names if variant_of(name, stem) == (variant or "") and "-of-" in name]
    return [chosen, *(shards if chosen.endswith(".json") else ())]


def _single(files: Sequence[str]) -> str:
    """A hint at files in a repository that may be what is wanted."""
    single = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    return f"; it has {', '.join(single)}: download the one you want and give its path" if single else ""


def _fetch(
    repository: str, part: str | None, *, variant: str | None, revision: str | None, local_files_only: bool
) -> Path:
    # Slow to import, and needed by those alone who fetch.
    from huggingface_hub import HfApi, snapshot_download

    # HTTPError is the transport's own, whichever library that is: it changed between hub 1 and 2.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def from_cache() -> Path:
        index = [INDEX] if part is None else ["config.json", f"{part}/config.json"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=index, local_files_only=True))

    at = f"{repository} at revision {revision!r}" if revision else repository
    try:
        if local_files_only:
            return from_cache()
        try:
            siblings = HfApi().model_info(repository, revision=revision).siblings or []
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            folder = from_cache()
            warnings.warn(f"the hub was not reached, so {at} is what its cache has", stacklevel=2)
            return folder
        files = [sibling.rfilename for sibling in siblings]
        if part is None:
            wanted = needed_files(repository, files, variant)
        else:
            wanted = needed_files_of_part(repository, part, files, variant)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        reached = "no network was to be asked" if local_files_only else "the hub was not reached"
        raise CheckpointError(f"{at} is not in the local cache, and {reached}; {HUB_HINT}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{repository!r} is neither a path nor the id of a repository: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its conditions on its page at the hub, then {LOGIN_HINT}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r}: give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no repository {repository}, or does not show it to you: check its spelling; "
            f"if it is private, {LOGIN_HINT}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = f"; {LOGIN_HINT}" if status in (401, 403) else "; what was fetched is kept, so a second call goes on"
        raise CheckpointError(f"the hub answered {status} for {at}{hint}") from error
    except (OSError, HTTPError) as error:
        raise CheckpointError(f"{at} could not be fetched: {error}; {HUB_HINT}") from error
