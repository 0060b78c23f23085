"""Stage 1: the variational autoencoder, trained to redraw the drawings from latents of a quarter of their size.

    python -m training.autoencoder --folder runs/autoencoder

Resumes where it was stopped.
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

CONFIG = VAEConfig(
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=4,
    scaling_factor=1.0,
    force_upcast=False,
    sample_size=64,
)
DEFINITION, SHAPES = define(VAE, CONFIG, dtype="float32", param_dtype="float32")
BATCH = 8
KL_WEIGHT = 1e-4


class State(NamedTuple):
    """What training changes."""

    params: Params
    optimizer: optax.OptState
    step: Array


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """Drawings of training scenes: (count, 64, 64, 3) float32 in -1..1."""
    return np.stack([draw(sample_training_scene(rng)) for _ in range(count)]).astype(np.float32) / 127.5 - 1


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW under a cosine that ends at zero."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(steps: int, state: State, batch: Array) -> tuple[State, dict[str, Array]]:
    """One step on pictures (batch, 64, 64, 3) in -1..1: absolute and squared error, and a little divergence."""

    def loss(params: Params) -> tuple[Array, dict[str, Array]]:
        vae = bind(DEFINITION, params)
        mean, log_variance = vae.encode(batch)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state.step), mean.shape)
        error = vae.decode(mean + jnp.exp(0.5 * log_variance) * noise) - batch
        absolute, squared = jnp.abs(error).mean(), jnp.square(error).mean()
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        total = absolute + 0.5 * squared + KL_WEIGHT * divergence
        return total, {"l1": absolute, "mse": squared, "kl": divergence}

    grads, metrics = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer(steps).update(grads, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics


def initial_state(steps: int) -> State:
    """What a first run starts from."""
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
    parser.add_argument("--steps", type=int, default=2600)
    args = parser.parse_args()
    train(
        args.folder,
        initial_state(args.steps),
        partial(step, args.steps),
        lambda i: pictures(np.random.default_rng([1, i]), BATCH),
        steps=args.steps,
        save_every=200,
    )


if __name__ == "__main__":
    main()
