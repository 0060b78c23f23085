"""Stage 4: the UNet, trained to find the velocity of noisy latents under a caption.

    python -m training.diffusion --folder runs/diffusion --steps 40000

The schedule of noise is the one that the bundled model is sampled with (`SCHEDULER`), zero signal at its far end
included, so that the colour of the background is the prompt's to choose. The text encoder is not trained further.

Every latent counts alike. A weight that depends on the picture (more for shapes or edges, say) would make the network
learn E[w v] / E[w] instead of E[v]: while the noise still hides where a shape is, every place it could be would look
like a shape, and the samples have eggs, two holes and two stars. Weights may depend on the noise level or the step.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from sdjax.models import Params, UNet, UNetConfig, bind, define, initialise
from sdjax.schedulers import SchedulerConfig, alphas_cumprod
from training import autoencoder, latents, text
from training.captions import caption
from training.loop import restore, train
from training.norms import with_native_norms
from training.products import with_half_products

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [96, 128, 128],
    "cross_attention_dim": text.CONFIG.hidden_size,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": autoencoder.CONFIG.latent_channels,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": autoencoder.CONFIG.latent_channels,
    "sample_size": autoencoder.SIZE // autoencoder.CONFIG.factor,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}
CONFIG = UNetConfig.from_dict(UNET)
DEFINITION, SHAPES = define(UNet, CONFIG, dtype="float32", param_dtype="float32")
BATCH = 64
PEAK_RATE = 1e-3
WARM_UP = 300
DECAY_SHARE = 0.4
AVERAGE = 0.999
UNCONDITIONAL_SHARE = 0.1


class State(NamedTuple):
    """Arrays that training changes; `average`, the exponential mean of the parameters, is shipped."""

    params: Params
    average: Params
    optimizer: optax.OptState
    step: Array


class Batch(NamedTuple):
    """Latents (batch, 16, 16, 8), token ids (batch, 32), timesteps (batch,)."""

    latents: np.ndarray
    token_ids: np.ndarray
    timesteps: np.ndarray


def batch(data: np.ndarray, i: int) -> Batch:
    """The batch of step i: every epoch has its own order, captions and timesteps."""
    per_epoch = len(data) // BATCH
    epoch, position = divmod(i, per_epoch)
    order = np.random.default_rng([4, epoch]).permutation(len(data))
    chosen = order[position * BATCH : (position + 1) * BATCH]
    rng = np.random.default_rng([5, i])
    captions = ["" if rng.random() < UNCONDITIONAL_SHARE else caption(latents.scene(j), rng) for j in chosen]
    return Batch(data[chosen], text.token_ids(captions), sample_timesteps(rng, BATCH))


def sample_timesteps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Where on the schedule to train: (count,) int32.

    Half are uniform. Half come from a logistic normal distribution around 0.65 of the schedule, where it is decided
    what stands where.
    """
    middle = 1 / (1 + np.exp(-rng.normal(0.6, 1.1, count)))
    place = np.where(rng.random(count) < 0.5, rng.random(count), middle)
    return np.minimum((place * 1000).astype(np.int32), 999)


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW: a warm-up, a long constant rate, and a last part down to zero."""
    decay = max(int(steps * DECAY_SHARE), 1)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, PEAK_RATE, WARM_UP),
            optax.constant_schedule(PEAK_RATE),
            optax.linear_schedule(PEAK_RATE, 0.0, decay),
        ],
        [WARM_UP, max(steps - decay, WARM_UP + 1)],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-3))


def velocity_loss(params: Params, batch: Batch, context: Array, key: Array) -> Array:
    """The mean squared error of the velocity (Salimans and Ho 2022, arXiv 2202.00512).

    The UNet sees x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps and the text's `context`; the target is
    v = sqrt(a_t) eps - sqrt(1 - a_t) x0. The noise eps comes from the key.
    """
    x0 = batch.latents.astype(jnp.float32)
    noise = jax.random.normal(key, x0.shape)
    a = jnp.asarray(alphas_cumprod(SchedulerConfig.from_dict(SCHEDULER)), jnp.float32)
    a_t = a[batch.timesteps][:, None, None, None]
    signal, deviation = jnp.sqrt(a_t), jnp.sqrt(1 - a_t)
    output = with_native_norms(bind(DEFINITION, params))(signal * x0 + deviation * noise, batch.timesteps, context)
    return jnp.square(output - (signal * noise - deviation * x0)).mean()


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(steps: int, state: State, batch: Batch, text_params: Params) -> tuple[State, dict[str, Array]]:
    """One step on a batch."""
    key = jax.random.fold_in(jax.random.key(6), state.step)
    encoder = bind(text.DEFINITION, text_params)
    context = encoder.final_norm(encoder(batch.token_ids).hidden_states[-1])
    value, grads = jax.value_and_grad(with_half_products(velocity_loss))(state.params, batch, context, key)
    updates, opt_state = optimizer(steps).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = jnp.minimum(AVERAGE, (1 + state.step) / (10 + state.step))
    average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.average, params)
    return State(params, average, opt_state, state.step + 1), {"loss": value}


def initial_state(steps: int) -> State:
    """Fresh parameters, but every residual branch, and the output, begins at zero."""
    flat = flatten_dict(initialise(UNet, CONFIG, dtype="float32", seed=2))
    branches = ("conv2", "proj_out", "conv_out")
    flat = {path: jnp.zeros_like(leaf) if path[-2] in branches else leaf for path, leaf in flat.items()}
    params = FrozenDict(unflatten_dict(flat))
    average = jax.tree.map(jnp.copy, params)
    return State(params, average, optimizer(steps).init(params), jnp.zeros((), jnp.int32))


def load(folder: Path) -> Params:
    """The averaged parameters of a run's last checkpoint."""
    _, state = restore(folder / "checkpoint.npz", State(SHAPES, SHAPES, (), jnp.zeros((), jnp.int32)))
    return state.average


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model's UNet.")
    parser.add_argument("--folder", type=Path, default=Path("runs/diffusion"))
    parser.add_argument("--text", type=Path, default=Path("runs/text"))
    parser.add_argument("--latents", type=Path, default=Path("runs/latents"))
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40_000)
    args = parser.parse_args()
    text_params = text.load(args.text)
    data = latents.load(args.latents, args.chunks)
    train(
        args.folder,
        initial_state(args.steps),
        lambda state, batch: step(args.steps, state, batch, text_params),
        partial(batch, data),
        steps=args.steps,
        save_every=250,
    )


if __name__ == "__main__":
    main()
