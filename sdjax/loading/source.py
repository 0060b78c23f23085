"""Where a model lies: a folder, one file, or a repository on the hub (fetched into its cache)."""

from pathlib import Path

from sdjax.errors import CheckpointError
from sdjax.loading.folder import STEMS
from sdjax.loading.weights import PICKLES, PICKLES_REFUSED

HUB_HINT = "without a network, download it elsewhere and give the folder's path, or set HF_HOME to a filled cache"


def locate(source: str | Path, *, variant: str | None, revision: str | None, local_files_only: bool) -> Path:
    """Find a model's folder or file, fetching it from the hub where the source is a repository's id.

    Args:
        source: an existing folder, an existing .safetensors file, or `owner/name`.
        variant: of the weight files to fetch.
        revision: a branch, tag or commit of the repository.
        local_files_only: take what the hub's cache has, and ask no network.

    Raises:
        CheckpointError: there is no such folder, file or repository, or the hub can't be reached.
    """
    path = Path(source).expanduser()
    if path.suffix in PICKLES:
        raise CheckpointError(f"{source}: {PICKLES_REFUSED}")
    if path.exists():
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or path.suffix == ".safetensors":
        raise CheckpointError(f"there is no folder or file {name!r}")
    return _fetch(name, variant=variant, revision=revision, local_files_only=local_files_only)


def _fetch(repository: str, *, variant: str | None, revision: str | None, local_files_only: bool) -> Path:
    # Slow to import, and needed by those alone who fetch.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    suffix = f".{variant}" if variant else ""
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*"]
    for component, stem in STEMS.items():
        wanted += [
            f"{component}/config.json",
            f"{component}/{stem}{suffix}.safetensors",
            f"{component}/{stem}{suffix}-?????-of-?????.safetensors",
            f"{component}/{stem}*.index*.json",
        ]
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=wanted, local_files_only=local_files_only
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is not in the local cache, and the hub was not reached; {HUB_HINT}"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{repository!r} is neither a path nor the id of a repository: {error}") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the hub did not give {repository} (revision {revision or 'main'}): {reason}") from error
    except OSError as error:
        raise CheckpointError(f"{repository} could not be fetched: {error}; {HUB_HINT}") from error
    return Path(folder)
