"""Stage 1: the variational autoencoder, trained to redraw the drawings from latents of an eighth of their side.

    python -m training.autoencoder --folder runs/autoencoder

Trains on crops first and on whole pictures at the end. Resumes where it was stopped.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sdjax.models import VAE, Params, VAEConfig, bind, define, initialise
from training.drawings import draw, sample_training_scene
from training.loop import restore, train
from training.norms import with_native_norms
from training.products import with_half_products

SIZE = 128
"""The side of the bundled model's pictures, in pixels."""
CONFIG = VAEConfig(
    block_out_channels=(24, 48, 64, 96),
    layers_per_block=1,
    norm_num_groups=8,
    latent_channels=8,
    scaling_factor=1.0,
    force_upcast=False,
    mid_block_add_attention=False,
    sample_size=SIZE,
)
DEFINITION, SHAPES = define(VAE, CONFIG, dtype="float32", param_dtype="float32")
CROP, CROPS = 64, 16
WHOLE = 5
WHOLE_SHARE = 0.25
"""The share of the steps, the last ones, that see whole pictures: a norm's statistics are then those of use."""
KL_WEIGHT, EDGE_WEIGHT = 3e-4, 1.0
PEAK_RATE = 2e-3


class State(NamedTuple):
    """Arrays that training changes."""

    params: Params
    optimizer: optax.OptState
    step: Array


def batch(steps: int, i: int) -> np.ndarray:
    """The pictures of step i of so many: (16, 64, 64, 3), at the end (5, 128, 128, 3), float32 in -1..1."""
    rng = np.random.default_rng([1, i])
    if i >= steps * (1 - WHOLE_SHARE):
        pictures = [draw(sample_training_scene(rng), SIZE) for _ in range(WHOLE)]
    else:
        pictures = [_crop(draw(sample_training_scene(rng), SIZE), rng) for _ in range(CROPS)]
    return np.stack(pictures).astype(np.float32) / 127.5 - 1


def _crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The one of two random crops that shows more."""
    corners = rng.integers(SIZE - CROP + 1, size=(2, 2))
    crops = [picture[row : row + CROP, column : column + CROP] for row, column in corners]
    return max(crops, key=lambda crop: float(crop.std((0, 1)).sum()))


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW under a cosine that ends at zero."""
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, 100, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4))


def redraw_loss(params: Params, batch: Array, key: Array) -> tuple[Array, dict[str, Array]]:
    """Errors of pictures redrawn from noisy latents: absolute, squared and of the edges; and a little divergence."""
    vae = with_native_norms(bind(DEFINITION, params))
    mean, log_variance = vae.encode(batch)
    noise = jax.random.normal(key, mean.shape)
    error = vae.decode(mean + jnp.exp(0.5 * log_variance) * noise) - batch
    absolute, squared = jnp.abs(error).mean(), jnp.square(error).mean()
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2))
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
    total = absolute + squared + EDGE_WEIGHT * edges + KL_WEIGHT * divergence
    return total, {"l1": absolute, "mse": squared, "edges": edges, "kl": divergence}


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(steps: int, state: State, batch: Array) -> tuple[State, dict[str, Array]]:
    """One step on pictures (batch, height, width, 3) in -1..1."""
    key = jax.random.fold_in(jax.random.key(0), state.step)
    loss = with_half_products(redraw_loss)
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch, key)
    updates, opt_state = optimizer(steps).update(grads, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics


def initial_state(steps: int) -> State:
    """Fresh parameters."""
    params = initialise(VAE, CONFIG, dtype="float32", seed=0)
    return State(params, optimizer(steps).init(params), jnp.zeros((), jnp.int32))


def load(folder: Path) -> Params:
    """The parameters of a run's last checkpoint."""
    _, state = restore(folder / "checkpoint.npz", State(SHAPES, (), jnp.zeros((), jnp.int32)))
    return state.params


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model's autoencoder.")
    parser.add_argument("--folder", type=Path, default=Path("runs/autoencoder"))
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    train(
        args.folder,
        initial_state(args.steps),
        partial(step, args.steps),
        partial(batch, args.steps),
        steps=args.steps,
        save_every=200,
    )


if __name__ == "__main__":
    main()
