"""A training loop that a kill cannot hurt: it resumes from its last checkpoint and then does what it would have done.

Everything random in a step is drawn from the step's number, so nothing but the state has to be remembered.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

State = TypeVar("State")
Batch = TypeVar("Batch")

LOG_EVERY = 20


def train(
    folder: Path,
    state: State,
    step: Callable[[State, Batch], tuple[State, Mapping[str, jax.Array]]],
    batch: Callable[[int], Batch],
    *,
    steps: int,
    save_every: int,
) -> State:
    """Take `steps` steps in all, counting those of earlier runs in the same folder.

    Args:
        folder: holds `checkpoint.npz` (the state), and `log.jsonl` (a line with mean metrics every 20 steps).
        state: what a first run starts from: a pytree of arrays. A later run takes it for the shapes alone.
        step: (state, batch) -> (state, metrics), each metric a scalar; the state's buffers may be donated.
        batch: the batch of step number i, a function of i alone.
        steps: where to stop.
        save_every: steps between two checkpoints.

    Returns:
        The last state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.npz"
    first, state = restore(checkpoint, state) if checkpoint.exists() else (0, state)
    since: list[Mapping[str, jax.Array]] = []
    started = time.monotonic()
    for i in range(first, steps):
        state, metrics = step(state, batch(i))
        since.append(metrics)
        if (i + 1) % LOG_EVERY == 0 or i + 1 == steps:
            means = {name: float(jnp.mean(jnp.stack([m[name] for m in since]))) for name in metrics}
            if not np.isfinite(list(means.values())).all():
                raise FloatingPointError(f"step {i + 1} of {folder.name}: {means}")
            seconds = (time.monotonic() - started) / len(since)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": i + 1, **means, "seconds_per_step": round(seconds, 4)}) + "\n")
            since, started = [], time.monotonic()
        if (i + 1) % save_every == 0 or i + 1 == steps:
            save(checkpoint, i + 1, state)
    return state


def save(path: Path, step: int, state: object) -> None:
    """Write a checkpoint so that a reader finds the old one or the new one, never half of it."""
    leaves = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(state)}
    part = path.with_suffix(".part.npz")
    np.savez(part, **{"step": np.asarray(step), **leaves})
    part.replace(path)


def restore(path: Path, like: State) -> tuple[int, State]:
    """Read a checkpoint, or the part of it that `like` has, into the structure of `like`.

    Raises:
        ValueError: a leaf is missing or has another shape, which means that the run's settings have changed.
    """
    with np.load(path, allow_pickle=False) as stored:

        def leaf(key: tuple[object, ...], shape_of: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(key)
            if name not in stored or stored[name].shape != shape_of.shape:
                found = stored[name].shape if name in stored else "nothing"
                raise ValueError(f"{path}: {name} should be {shape_of.shape}, but the file has {found}")
            return jnp.asarray(stored[name])

        return int(stored["step"]), jax.tree_util.tree_map_with_path(leaf, like)
