"""A job's pictures as rows of the loop: from its request, through slices with whomever they share a batch, to pixels.

Every picture is prepared alone, by its own seed, so it is the same whichever number of its job it is; and a row is a
value that nobody writes into, so a slice that failed can be tried again from where it began.
"""

import io
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from sdjax.errors import RequestError
from sdjax.generation.batch import Batch, join
from sdjax.limits import LAST_SEED
from sdjax.pipeline import Drawing, Pipeline, Weights
from sdjax.requests import Request
from sdjax.serve.store import Store

_join = jax.jit(join)


class Key(NamedTuple):
    """What rows of one batch have in common.

    weights: the key of what they are drawn with, adapters among it: by their contents, not by their files' names.
    shapes: of all arrays: what programs are compiled for.
    """

    weights: Hashable
    shapes: Any


class Row(NamedTuple):
    """One picture on its way: `batch` has it alone, `at` is the row of the sampler's table that comes next.

    `weights` are what all pictures of its job are drawn with, to the end, whatever becomes of the adapters' files.
    """

    job_id: str
    number: int
    request: Request
    batch: Batch
    at: int
    weights: Weights

    @property
    def steps(self) -> int:
        """How many steps its walk has."""
        request = self.request
        return self._step(request.stop_row) - self._step(request.first_row)

    @property
    def done(self) -> int:
        """How many of them are behind it; a step of two calls counts when it has made both."""
        return self._step(self.at) - self._step(self.request.first_row)

    @property
    def left(self) -> int:
        """How many calls of the network are before it."""
        return self.request.stop_row - self.at

    def calls_to(self, step: int) -> int:
        """How many calls it is to where so many steps are done."""
        ahead = self.request.table.step[self.at : self.request.stop_row]
        return int(np.searchsorted(ahead, self._step(self.request.first_row) + step))

    def _step(self, row: int) -> int:
        steps = self.request.table.step
        return int(steps[row]) if row < len(steps) else int(steps[-1]) + 1


def requests(pipe: Pipeline, store: Store, asked: Mapping[str, Any]) -> list[Request]:
    """What the library is asked for, for each picture of a job.

    Args:
        pipe: draws them.
        store: has the pictures that the job starts from.
        asked: the request of a `Job`.

    Raises:
        RequestError: the model can't do it.
        PictureLostError: a picture that it starts from is gone.
        StorageError: the store fails.
    """
    given: dict[str, Any] = {
        name: asked[name]
        for name in ("steps", "guidance_scale", "sampler", "schedule", "seed", "width", "height")
        if asked.get(name) is not None
    }
    for name, argument in (("input_image", "image"), ("init_image", "image"), ("mask_image", "mask")):
        if asked.get(name) is not None:
            given[argument] = _picture(store, name, asked[name]["blob"])
    if "image" in given:
        given["strength"] = asked.get("strength", 0.8)
    if asked.get("loras"):
        given["loras"] = [(lora["path"], lora["strength"]) for lora in asked["loras"]]
    first = pipe.resolve(asked["prompt"], asked.get("negative_prompt"), **given)
    seeds = [(first.seeds[0] + i) % (LAST_SEED + 1) for i in range(asked.get("num_images") or 1)]
    return [replace(first, seeds=(seed,)) for seed in seeds]


def prepare(pipe: Pipeline, job_id: str, requests: Sequence[Request]) -> list[Row]:
    """Make the arrays of all pictures of a job, whose requests differ in their seeds alone. Adapters are read once."""
    weights = pipe.weights(requests[0])
    return [
        Row(job_id, number, request, pipe.prepare(request, weights).batch, request.first_row, weights)
        for number, request in enumerate(requests)
    ]


def key(row: Row) -> Key:
    """What a row must have in common with those that it shares a batch with."""
    leaves, structure = jax.tree.flatten(row.batch)
    return Key(row.weights.key, (structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)))


def walk(pipe: Pipeline, rows: Sequence[Row], size: int, calls: int) -> tuple[list[Row], list[bool]]:
    """Take rows of one key up to `calls` calls of the network further, in a batch of `size`, and wait for it.

    Returns:
        The rows after it, and whether each is finite. What is beyond `rows` in the batch stands still.
    """
    padded = [*rows, *[rows[0]] * (size - len(rows))]
    batch = _join(tuple(row.batch for row in padded))
    # Where nothing was to be joined the state is still the row's own, and the loop writes over what it is given.
    batch = batch._replace(state=jnp.array(batch.state, copy=True))
    start = np.zeros(size, np.int32)
    stop = np.zeros(size, np.int32)
    for i, row in enumerate(rows):
        start[i], stop[i] = row.at, min(row.at + calls, row.request.stop_row)
    after = pipe.denoise(Drawing(rows[0].weights, batch), start, stop)
    states, finite = _apart(after.batch.state, size)
    moved = [row._replace(batch=row.batch._replace(state=states[i]), at=int(stop[i])) for i, row in enumerate(rows)]
    return moved, [bool(x) for x in np.asarray(finite)[: len(rows)]]


def first_step_not_finite(pipe: Pipeline, row: Row) -> int:
    """Walk again, call by call, from a row that was finite: the step, from 1, in which it no longer is."""
    while row.left:
        step = row.done + 1
        (row,), (is_finite,) = walk(pipe, [row], 1, 1)
        if not is_finite:
            return step
    return row.steps


def latents(row: Row) -> Array:
    """(1, height, width, channels), to be decoded once the walk is done."""
    return row.batch.state[:, 0]


def estimate(row: Row) -> Array:
    """The latents that the walk is heading for, like `latents`."""
    return row.batch.state[:, -1]


@partial(jax.jit, static_argnums=1)
def _apart(state: Array, size: int) -> tuple[list[Array], Array]:
    finite = jnp.isfinite(state).reshape(size, -1).all(axis=1)
    return [state[i : i + 1] for i in range(size)], finite


def _picture(store: Store, name: str, digest: str) -> Image.Image:
    try:
        content = store.blob(digest)
    except KeyError as error:
        raise RequestError(f"{name} can't be read: no job has it") from error
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{name} can't be read: {error}") from error
    return picture
