"""Stage 2: the text encoder, trained until a linear probe can read a caption's scene at the end token.

    python -m training.text --folder runs/text

A CLIP encoder learns its language from millions of pictures before a diffusion model is trained on it. Ours learns from
the scenes behind the captions: a linear probe on the pooled vector, thrown away after, must name every attribute.
What a caption leaves unsaid cannot be known; the cross-entropy then settles at the attribute's frequencies.
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

from sdjax.models import CLIPText, CLIPTextConfig, Params, bind, define, initialise
from training import tokenizer
from training.captions import caption
from training.drawings import COLORS, KINDS, OPPOSITE, PLACES, SIZES, Scene, Shape, sample_training_scene
from training.loop import restore, train

TOKENIZER = tokenizer.load()
CONFIG = CLIPTextConfig(
    vocab_size=TOKENIZER.get_vocab_size(),
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=tokenizer.MAX_LENGTH,
    hidden_act="quick_gelu",
    eos_token_id=TOKENIZER.get_vocab_size() - 1,
)
DEFINITION, SHAPES = define(CLIPText, CONFIG, dtype="float32", param_dtype="float32")
BATCH = 64

SHAPE_ATTRIBUTES = (len(COLORS), len(KINDS), len(SIZES))
GROUPS = ((2, True), (2, False), (3, False))
"""Groups of equal shapes: their number, and whether they stand side by side."""
LAYOUTS = 2 + len(PLACES) + len(GROUPS)
CLASSES = (len(COLORS), LAYOUTS, *SHAPE_ATTRIBUTES, *SHAPE_ATTRIBUTES)
"""Options of each attribute: background, layout (above, left of, a lone shape's place, a group), then two shapes."""
UNKNOWN = -1


class State(NamedTuple):
    """Arrays that training changes; `probe` maps the pooled vector to all attributes' logits."""

    params: Params
    probe: Array
    optimizer: optax.OptState


def token_ids(captions: list[str]) -> np.ndarray:
    """Start, words, end, and the end token again up to the encoder's length: (captions, 32) int32."""
    start, end = CONFIG.eos_token_id - 1, CONFIG.eos_token_id
    ids = np.full((len(captions), tokenizer.MAX_LENGTH), end, np.int32)
    for row, encoding in zip(ids, TOKENIZER.encode_batch(captions), strict=True):
        words = encoding.ids[: tokenizer.MAX_LENGTH - 2]
        row[: 1 + len(words)] = [start, *words]
    return ids


def attributes(scene: Scene) -> list[int]:
    """The scene's answers to the probe, its shapes in order from the top or left."""
    shapes, relation = scene.shapes, scene.relation
    if scene.is_group:
        group = GROUPS.index((len(shapes), relation in ("left of", "right of")))
        return _answers(scene, 2 + len(PLACES) + group, shapes[:1])
    if relation in ("below", "right of"):
        shapes, relation = shapes[::-1], OPPOSITE[relation]
    layout = ("above", "left of").index(relation) if relation else 2 + PLACES.index(scene.place)
    return _answers(scene, layout, shapes)


def _answers(scene: Scene, layout: int, shapes: tuple[Shape, ...]) -> list[int]:
    answers = [COLORS.index(scene.background), layout]
    for shape in shapes:
        answers += [COLORS.index(shape.color), KINDS.index(shape.kind), SIZES.index(shape.size)]
    return answers + [UNKNOWN] * (len(CLASSES) - len(answers))


def batch(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions and answers of step i: token ids (64, 32) and attributes (64, 8)."""
    rng = np.random.default_rng([2, i])
    scenes = [sample_training_scene(rng) for _ in range(BATCH)]
    return token_ids([caption(scene, rng) for scene in scenes]), np.array([attributes(scene) for scene in scenes])


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW under a cosine that ends at zero."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-2))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(steps: int, state: State, batch: tuple[Array, Array]) -> tuple[State, dict[str, Array]]:
    """One step on token ids and answers: the mean cross-entropy over what is known."""
    ids, answers = batch

    def loss(trained: tuple[Params, Array]) -> tuple[Array, dict[str, Array]]:
        params, probe = trained
        pooled = bind(DEFINITION, params)(ids).pooled
        logits = jnp.split(pooled @ probe, np.cumsum(CLASSES)[:-1].tolist(), axis=-1)
        entropies, right = [], []
        for i, options in enumerate(logits):
            known = answers[:, i] != UNKNOWN
            entropy = optax.softmax_cross_entropy_with_integer_labels(options, jnp.maximum(answers[:, i], 0))
            entropies.append(jnp.where(known, entropy, 0.0).sum() / known.sum())
            right.append(jnp.where(known, options.argmax(-1) == answers[:, i], 0.0).sum() / known.sum())
        names = ("background", "layout", "color_1", "kind_1", "size_1", "color_2", "kind_2", "size_2")
        total = sum(entropies)
        return total, {"loss": total, **dict(zip(names, right, strict=True))}

    grads, metrics = jax.grad(loss, has_aux=True)((state.params, state.probe))
    updates, opt_state = optimizer(steps).update(grads, state.optimizer, (state.params, state.probe))
    params, probe = optax.apply_updates((state.params, state.probe), updates)
    return State(params, probe, opt_state), metrics


def initial_state(steps: int) -> State:
    """Fresh parameters, and a probe of zeros."""
    params = initialise(CLIPText, CONFIG, dtype="float32", seed=1)
    probe = jnp.zeros((CONFIG.hidden_size, sum(CLASSES)))
    return State(params, probe, optimizer(steps).init((params, probe)))


def load(folder: Path) -> Params:
    """The parameters of a run's last checkpoint."""
    _, state = restore(folder / "checkpoint.npz", State(SHAPES, jnp.zeros((CONFIG.hidden_size, sum(CLASSES))), ()))
    return state.params


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model's text encoder.")
    parser.add_argument("--folder", type=Path, default=Path("runs/text"))
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    train(args.folder, initial_state(args.steps), partial(step, args.steps), batch, steps=args.steps, save_every=500)


if __name__ == "__main__":
    main()
