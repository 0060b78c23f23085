"""The adapters of a job: those of its `loras`, and those that its prompt names as `<lora:name:0.8>`."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdjax.errors import RequestError, Warn
from sdjax.limits import JOB_LORAS
from sdjax.loading import find_adapter
from sdjax.prompts import take_tags
from sdjax.serve.problems import invalid
from sdjax.serve.schemas import Lora


def listed(loras: list[Lora] | None, folder: Path | None) -> list[dict[str, Any]]:
    """The adapters of `loras`, with the name that each was asked for by, its whole path, and its strength.

    Raises:
        ProblemError: one does not lie inside the adapter folder, or there is no such folder.
    """
    return [_entry(lora, folder, f"loras.{index}.path") for index, lora in enumerate(loras or ())]


def _entry(lora: Lora, folder: Path | None, field: str) -> dict[str, Any]:
    if folder is None:
        raise invalid(field, "loras: this server has no adapter folder")
    try:
        path = find_adapter(folder, lora.path)
    except RequestError as error:
        raise invalid(field, f"{field}: {error}") from None
    return {"name": lora.path, "path": str(path), "strength": lora.strength}


def tagged(prompt: str, folder: Path | None, *, room: int, warn: Warn) -> tuple[str, list[dict[str, Any]]]:
    """Take `<lora:...>` out of a prompt.

    Args:
        prompt: of a job.
        folder: of all adapters, which those of a prompt lie in by the same rules as those of `loras`.
        room: how many adapters the job may still have.
        warn: called with each that is left out.

    Returns:
        The rest of the prompt, and the adapters as in `listed`.

    Raises:
        ProblemError: there are more than `room`.
    """
    text, tags = take_tags(prompt, warn=warn)
    found: list[dict[str, Any]] = []
    for tag in tags:
        if folder is None:
            warn(f"{tag.text} is left out: this server has no adapter folder")
            continue
        try:
            lora = Lora(path=tag.name, strength=tag.weight)
            path = find_adapter(folder, lora.path)
        except ValidationError as error:
            warn(f"{tag.text} is left out: {error.errors()[0]['msg']}")
        except RequestError as error:
            warn(f"{tag.text} is left out: {error}")
        else:
            found.append({"name": lora.path, "path": str(path), "strength": lora.strength})
    if len(found) > room:
        raise invalid("prompt", f"prompt: with those of its <lora:...> the job has more than {JOB_LORAS} adapters")
    return text, found
