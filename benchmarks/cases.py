"""What can be timed, and what one worker process is asked to time."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.models import MODELS, Model

WHAT: Mapping[str, str] = {
    "text-encoder": "prompts to hidden states",
    "unet": "one denoising step of `batch` pictures, with guidance where the model wants it",
    "vae-decode": "latents to pixels",
    "picture": "the three together, the model's own number of steps",
    "load": "a checkpoint folder from disk to the device",
    "first-cold": "a new process up to its first picture, nothing compiled before",
    "first-warm": "the same, with the compilation cache that the last one left",
    "throughput": "a server asked for `batch` pictures at once, until the last has arrived",
}
FROM_FOLDER = frozenset({"load", "first-cold", "first-warm", "throughput"})
"""Cases that begin with a checkpoint's files; the others have weights that never were in one."""
ONCE_A_PROCESS = frozenset({"load"})
"""Cases that a process does once: memory that an earlier run left behind would make the next one faster."""
WITH_STEPS = frozenset({"picture", "first-cold", "first-warm", "throughput"})
PROMPT = "a red circle on a blue background"
GUIDANCE_SCALE = 7.5
"""Of models that are guided."""


@dataclass(frozen=True)
class Case:
    """One thing to time. `steps` None is the model's own number; `folder`, which workers are told, is no part of it."""

    what: str
    model: str
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    steps: int | None = None
    folder: str | None = field(default=None, compare=False)

    @property
    def guidance_scale(self) -> float:
        """0 where the UNet is called with the prompt alone."""
        return GUIDANCE_SCALE if self.sizes.guided else 0.0

    @property
    def arithmetic(self) -> str:
        """The dtype that is computed in: weights of int8 are weights alone, and peers have theirs in this."""
        if self.dtype != "int8":
            return self.dtype
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def sizes(self) -> Model:
        """The model's sizes."""
        return MODELS[self.model]

    @property
    def step_count(self) -> int:
        """Steps of a whole picture."""
        return self.steps or self.sizes.steps

    def __str__(self) -> str:
        steps = f"-{self.step_count}steps" if self.what in WITH_STEPS else ""
        return f"{self.what}{steps} {self.model} batch {self.batch} {self.dtype} {self.device}"

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON; the folder is nobody else's."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def nothing() -> None:
    """There is nothing to end."""


class Prepared(NamedTuple):
    """A case that is ready to run.

    Attributes:
        run: does the work once, and returns when it is done.
        matmul: multiplies two matrices of `MATMUL_SIZE`, for the device's attainable peak; None where it says nothing.
        flops: floating-point operations of one run in the plain formulation, where they are known.
        notes: seconds of preparation and the like, by name.
        peak_bytes: of the processes that do the work, where the worker only waits for them.
        close: ends what was started.
    """

    run: Callable[[], object]
    matmul: Callable[[], object] | None = None
    flops: float | None = None
    notes: Mapping[str, float] = MappingProxyType({})
    peak_bytes: Callable[[], int] | None = None
    close: Callable[[], object] = nothing


class Skipped(Exception):  # noqa: N818 (not an error: an absent peer)
    """This side can't do this case here; the message says why, in a word or two."""


MATMUL_SIZE = 3072
