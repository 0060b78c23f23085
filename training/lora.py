"""A LoRA for the bundled model: the style of `training.outlines`, learned by the adapter alone.

    python -m training.lora --folder runs/lora --file sdjax/bundled/loras/outline.safetensors

Needs nothing but the bundled model and resumes where it was stopped. The loss is the base model's. It is differentiated
through `apply_lora`, so what is trained is what is used.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array
from safetensors.numpy import save_file

import sdjax
from sdjax.loading import Checkpoint
from sdjax.loading.lora import Adapter, Change, LowRank, apply_lora
from sdjax.loading.weights import LeafPath, tensor_name
from sdjax.models import Params, bind
from training import text
from training.captions import caption
from training.diffusion import Batch, sample_timesteps, velocity_loss
from training.drawings import Scene, sample_training_scene
from training.evaluate import native_size
from training.latents import ENCODED_AT_ONCE
from training.loop import train
from training.outlines import draw_outlined
from training.products import with_half_products

RANKS = {"to_q": 4, "to_k": 4, "to_v": 4, "to_out.0": 4, "conv1": 6, "conv2": 6}
"""By how a layer's name ends: the projections of the UNet's attention, and the convolutions of its residual blocks."""
PICTURES = 4096
BATCH = 16
PEAK_RATE = 3e-3
WARM_UP = 50
UNCONDITIONAL_SHARE = 0.1

Factors: TypeAlias = dict[str, dict[str, Array]]
"""By a layer's published name: "up" (out, rank) and "down" (rank, in) or (rank, in, height, width)."""


class State(NamedTuple):
    """Arrays that training changes."""

    factors: Factors
    optimizer: optax.OptState
    step: Array


def targets(params: Params) -> dict[str, LeafPath]:
    """The UNet's layers that are adapted, by published name."""
    names = {tensor_name(path).removesuffix(".weight"): path for path in flatten_dict(params) if path[-1] == "weight"}
    return {name: path for name, path in names.items() if path[0] == "unet" and name.endswith(tuple(RANKS))}


def adapter(factors: Factors, paths: Mapping[str, LeafPath]) -> Adapter:
    """The factors as `apply_lora` takes them, with alpha equal to the rank."""
    changes = {paths[name]: Change(LowRank((parts["up"], parts["down"]))) for name, parts in factors.items()}
    return Adapter("the LoRA in training", changes)


def scene(i: int) -> Scene:
    """Training scene number i, drawn from other numbers than the base model's."""
    return sample_training_scene(np.random.default_rng([7, i]))


def encoded(checkpoint: Checkpoint, size: int) -> np.ndarray:
    """The outlined drawings of a side in pixels, as latents of unit variance: (pictures, height, width, channels)."""
    vae = bind(checkpoint.definition.vae, checkpoint.params["vae"])
    scale = checkpoint.definition.vae_config.scaling_factor
    encode = jax.jit(with_half_products(lambda x: vae.encode(x / 127.5 - 1).mean * scale))
    pictures = np.stack([draw_outlined(scene(i), size) for i in range(PICTURES)])
    parts = np.split(pictures, PICTURES // ENCODED_AT_ONCE)
    return np.concatenate([encode(part.astype(np.float32)) for part in parts])


def batch(data: np.ndarray, i: int) -> Batch:
    """The batch of step i."""
    rng = np.random.default_rng([8, i])
    chosen = rng.integers(PICTURES, size=BATCH)
    captions = ["" if rng.random() < UNCONDITIONAL_SHARE else caption(scene(j), rng) for j in chosen]
    return Batch(data[chosen], text.token_ids(captions), sample_timesteps(rng, BATCH))


def optimizer(steps: int) -> optax.GradientTransformation:
    """Adam under a cosine that ends at zero."""
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, WARM_UP, max(steps, WARM_UP + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))


def initial_state(params: Params, steps: int) -> State:
    """Random "down" and zero "up": the model is the base model."""
    leaves = flatten_dict(params)
    rng = np.random.default_rng(9)
    factors = {}
    for name, path in targets(params).items():
        out, *rest = leaves[path].shape
        rank = next(rank for ending, rank in RANKS.items() if name.endswith(ending))
        down = rng.normal(size=(rank, *rest)) / np.sqrt(np.prod(rest))
        factors[name] = {"up": jnp.zeros((out, rank)), "down": jnp.asarray(down, jnp.float32)}
    return State(factors, optimizer(steps).init(factors), jnp.zeros((), jnp.int32))


def trainer(checkpoint: Checkpoint, steps: int) -> Callable[[State, Batch], tuple[State, dict[str, Array]]]:
    """The step, (state, batch) -> (state, metrics), for a checkpoint that stays as it is."""
    paths = targets(checkpoint.params)
    name, encoder = checkpoint.definition.text_encoders[0]

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch, params: Params) -> tuple[State, dict[str, Array]]:
        words = bind(encoder, params[name])
        context = words.final_norm(words(batch.token_ids).hidden_states[-1])
        key = jax.random.fold_in(jax.random.key(10), state.step)

        def loss(factors: Factors) -> Array:
            adapted = apply_lora(params, [(adapter(factors, paths), 1.0)])
            return velocity_loss(adapted["unet"], batch, context, key)

        value, grads = jax.value_and_grad(with_half_products(loss))(state.factors)
        updates, opt_state = optimizer(steps).update(grads, state.optimizer)
        return State(optax.apply_updates(state.factors, updates), opt_state, state.step + 1), {"loss": value}

    return lambda state, batch: step(state, batch, checkpoint.params)


def write(factors: Factors, file: Path, metadata: Mapping[str, str]) -> None:
    """Write the factors in diffusers' format, in float16."""
    tensors = {}
    for name, parts in factors.items():
        up, down = np.asarray(parts["up"], np.float16), np.asarray(parts["down"], np.float16)
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up.reshape(*up.shape, *[1] * (down.ndim - 2))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {"format": "pt", **metadata})


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train a LoRA for the bundled model.")
    parser.add_argument("--folder", type=Path, default=Path("runs/lora"))
    parser.add_argument("--file", type=Path, default=Path("sdjax/bundled/loras/outline.safetensors"))
    parser.add_argument("--steps", type=int, default=1400)
    args = parser.parse_args()
    pipe = sdjax.Pipeline.from_pretrained(dtype="float32")
    checkpoint = pipe.checkpoint
    state = train(
        args.folder,
        initial_state(checkpoint.params, args.steps),
        trainer(checkpoint, args.steps),
        partial(batch, encoded(checkpoint, native_size(pipe))),
        steps=args.steps,
        save_every=100,
    )
    about = {"ranks": RANKS, "steps": args.steps, "pictures": PICTURES, "batch": BATCH}
    write(
        state.factors,
        args.file,
        {"title": "outline", "base_model": "the bundled model of sdjax", "training": json.dumps(about)},
    )


if __name__ == "__main__":
    main()
