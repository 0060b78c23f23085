"""Stage 3: the training scenes as latents, made once, so that the diffusion model never waits for the autoencoder.

    python -m training.latents --autoencoder runs/autoencoder --folder runs/latents

Scene i is drawn from its number, so only its latents are stored; chunks that are already there are left as they are.

The diffusion model sees every channel with mean zero and variance one, but a checkpoint's config has a single
`scaling_factor`. The autoencoder's 1x1 convolutions on both sides of the latents can hold any scale and shift of each
channel, so they take it (`standardised`), and the factor is one.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze

from sdjax.models import Params, bind
from training import autoencoder
from training.drawings import Scene, draw, sample_training_scene
from training.products import with_half_products

CHUNK = 4096
ENCODED_AT_ONCE = 64


class Moments(NamedTuple):
    """Mean and standard deviation of each channel over all latents of the first chunk: each (channels,)."""

    mean: np.ndarray
    deviation: np.ndarray


def scene(i: int) -> Scene:
    """Training scene number i."""
    return sample_training_scene(np.random.default_rng([3, i]))


def standardised(params: Params, moments: Moments) -> Params:
    """An autoencoder whose latents are (latent - mean) / deviation, and whose pictures are the same."""
    changed: dict[str, Any] = unfreeze(params)
    mean, deviation = moments
    channels = len(mean)

    inside: Mapping[str, Any] = changed["quant_conv"]
    scale = np.concatenate([1 / deviation, np.ones(channels)]).astype(np.float32)
    # the other half are logarithms of variances: a scale is a shift there
    shift = np.concatenate([-mean / deviation, -2 * np.log(deviation)]).astype(np.float32)
    changed["quant_conv"] = {
        "weight": inside["weight"] * scale[:, None, None, None],
        "bias": inside["bias"] * scale + shift,
    }
    outside: Mapping[str, Any] = changed["post_quant_conv"]
    weight = outside["weight"]
    changed["post_quant_conv"] = {
        "weight": weight * deviation[None, :, None, None].astype(np.float32),
        "bias": outside["bias"] + weight[..., 0, 0] @ mean.astype(np.float32),
    }
    return FrozenDict(jax.tree.map(jnp.asarray, changed))


def load_autoencoder(run: Path, folder: Path) -> Params:
    """The autoencoder of a run with the standardised latents of a folder."""
    with np.load(folder / "moments.npz") as stored:
        return standardised(autoencoder.load(run), Moments(stored["mean"], stored["deviation"]))


def load(folder: Path, chunks: int) -> np.ndarray:
    """The first chunks, joined: (scenes, 16, 16, 8) float16."""
    return np.concatenate([np.load(folder / f"{chunk:03}.npy") for chunk in range(chunks)])


def main() -> None:
    """Encode from the command line."""
    parser = argparse.ArgumentParser(description="Encode the training scenes.")
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/autoencoder"))
    parser.add_argument("--folder", type=Path, default=Path("runs/latents"))
    parser.add_argument("--chunks", type=int, default=12)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    params = autoencoder.load(args.autoencoder)
    encode = jax.jit(
        with_half_products(lambda pictures: bind(autoencoder.DEFINITION, params).encode(pictures / 127.5 - 1).mean)
    )

    def means(chunk: int) -> np.ndarray:
        numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK, ENCODED_AT_ONCE)
        parts = (
            np.stack([draw(scene(i), autoencoder.SIZE) for i in range(first, first + ENCODED_AT_ONCE)])
            for first in numbers
        )
        return np.concatenate([encode(part.astype(np.float32)) for part in parts])

    for chunk in range(args.chunks):
        path = args.folder / f"{chunk:03}.npy"
        if path.exists():
            continue
        latents = means(chunk)
        if chunk == 0:
            np.savez(args.folder / "moments.npz", mean=latents.mean((0, 1, 2)), deviation=latents.std((0, 1, 2)))
        with np.load(args.folder / "moments.npz") as moments:
            latents = (latents - moments["mean"]) / moments["deviation"]
        part = path.with_suffix(".part.npy")
        np.save(part, latents.astype(np.float16))
        part.replace(path)


if __name__ == "__main__":
    main()
