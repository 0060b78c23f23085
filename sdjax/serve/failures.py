"""What a client is told when a job fails: a code, and a sentence that says nothing of the server's insides."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.errors import CheckpointError, NotFiniteError, RequestError
from sdjax.serve.storage import PictureLostError, StorageError


class Failure(NamedTuple):
    """The end of a job that failed.

    code: "not_finite", "invalid_request", "invalid_lora", "out_of_memory", "input_lost", "storage" or "internal".
    """

    code: str
    message: str


def failure(error: BaseException, request: Mapping[str, Any]) -> Failure:
    """Describe why a job failed. Only errors that were written for users keep their words, without the paths in them.

    Args:
        error: what was raised.
        request: of the job.
    """
    if isinstance(error, NotFiniteError):
        return Failure("not_finite", without_paths(str(error), request))
    if isinstance(error, RequestError):
        return Failure("invalid_request", without_paths(str(error), request))
    if isinstance(error, CheckpointError) and request.get("loras"):
        return Failure("invalid_lora", without_paths(str(error), request))
    if isinstance(error, PictureLostError):
        return Failure("input_lost", "a picture of this request is not on the server's disk any more")
    if isinstance(error, StorageError):
        return Failure("storage", str(error))
    if is_out_of_memory(error):
        return Failure("out_of_memory", "the device has too little memory for a picture of this size")
    return Failure("internal", "the server failed to draw this; its log says why")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device had too little memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def without_paths(message: str, request: Mapping[str, Any]) -> str:
    """A message with each adapter called by the name that the client knows it by, instead of its place on our disk."""
    loras = sorted(request.get("loras") or (), key=lambda lora: len(str(lora["path"])), reverse=True)
    for lora in loras:
        path, name = str(lora["path"]), str(lora.get("name", "adapter"))
        message = message.replace(repr(path)[1:-1], name).replace(path, name)
    return message
