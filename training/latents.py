"""Stage 3: the training scenes as latents, made once, so that the diffusion model never waits for the autoencoder.

    python -m training.latents --autoencoder runs/autoencoder --folder runs/latents

Scene i is drawn from its number, so only its latents are stored; chunks that are already there are left as they are.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.models import bind
from training import autoencoder
from training.drawings import Scene, draw, sample_training_scene

CHUNK = 8192
ENCODED_AT_ONCE = 128
OBJECT_WEIGHT, EDGE_WEIGHT = 2.0, 4.0


class Latents(NamedTuple):
    """Latents of scenes: (scenes, 16, 16, 4) float16, unit variance; and how much each counts: (scenes, 16, 16)."""

    latents: np.ndarray
    weights: np.ndarray


def scene(i: int) -> Scene:
    """Training scene number i."""
    return sample_training_scene(np.random.default_rng([3, i]))


def weights(pictures: np.ndarray) -> np.ndarray:
    """How much each latent counts in the loss: a background's says little, an edge's tells a star from a circle.

    Args:
        pictures: (count, 64, 64, 3) uint8 drawings, whose corner is background.

    Returns:
        (count, 16, 16) float16 of mean one over each picture.
    """
    count = len(pictures)
    shape = (np.abs(pictures.astype(int) - pictures[:, :1, :1].astype(int)).sum(-1) > 40).reshape(count, 16, 4, 16, 4)
    covered = shape.mean((2, 4))
    weight = 1 + OBJECT_WEIGHT * covered + EDGE_WEIGHT * ((covered > 0) & (covered < 1))
    return (weight / weight.mean((1, 2), keepdims=True)).astype(np.float16)


def load(folder: Path, chunks: int) -> Latents:
    """The first chunks, joined."""
    parts = [np.load(folder / f"{chunk:03}.npz") for chunk in range(chunks)]
    return Latents(*(np.concatenate([part[name] for part in parts]) for name in Latents._fields))


def main() -> None:
    """Encode from the command line."""
    parser = argparse.ArgumentParser(description="Encode the training scenes.")
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/autoencoder"))
    parser.add_argument("--folder", type=Path, default=Path("runs/latents"))
    parser.add_argument("--chunks", type=int, default=4)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    params = autoencoder.load(args.autoencoder)
    encode = jax.jit(lambda pictures: bind(autoencoder.DEFINITION, params).encode(pictures / 127.5 - 1).mean)
    scale_file = args.folder / "scale.npy"
    for chunk in range(args.chunks):
        path = args.folder / f"{chunk:03}.npz"
        if path.exists():
            continue
        pictures = np.stack([draw(scene(i)) for i in range(chunk * CHUNK, (chunk + 1) * CHUNK)])
        means = np.concatenate(
            [encode(jnp.asarray(part, jnp.float32)) for part in np.split(pictures, CHUNK // ENCODED_AT_ONCE)]
        )
        if not scale_file.exists():
            np.save(scale_file, np.float32(1 / means.std()))
        np.savez(path, latents=(means * np.load(scale_file)).astype(np.float16), weights=weights(pictures))


if __name__ == "__main__":
    main()
