"""Everything that `encode_prompt` is given for a batch of prompts, from a checkpoint and what the caller asks for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdjax.errors import RequestError
from sdjax.generation import Tokens
from sdjax.loading import Checkpoint, Embedding
from sdjax.models import CLIPTextConfig
from sdjax.prompts.tokens import Triggers, tokenize

ROWS_AT_ONCE = 16
"""Learned vectors are handed over in multiples of so many rows, for their number is a shape."""


class TextInputs(NamedTuple):
    """Arguments of `encode_prompt`, with an entry for each text encoder.

    tokens: ids and weights, (prompts, chunks, length), with the same number of chunks.
    vectors: (rows, width) float32, the learned embeddings; None without any.
    """

    tokens: tuple[Tokens, ...]
    vectors: tuple[NDArray[np.float32], ...] | None


def text_inputs(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    *,
    long_prompts: str = "truncate",
    embeddings: Sequence[Embedding] = (),
) -> TextInputs:
    """Tokenize prompts, negative ones among them, for every text encoder of a checkpoint.

    Nothing of the checkpoint is changed: learned embeddings are ids above the vocabulary, and rows beside it.

    Args:
        checkpoint: whose tokenizers and encoders.
        prompts: any text; all get as many chunks as the longest.
        long_prompts: "truncate" or "chunk", see `tokenize`.
        embeddings: learned words, as `load_embedding` reads them.

    Raises:
        RequestError: `long_prompts` is something else, two embeddings have one name, or one fills more than a chunk.
    """
    names = [embedding.name.lower() for embedding in embeddings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"two embeddings are named {twice[0]!r} (capitals do not matter): give one another name")
    configs = encoder_configs(checkpoint)
    made = []
    for tokenizer, config in zip(checkpoint.tokenizers, configs, strict=True):
        triggers = _triggers(embeddings, config.vocab_size, tokenizer.length - 2)
        made.append((tokenizer, triggers, tokenize(tokenizer, prompts, long_prompts=long_prompts, triggers=triggers)))
    chunks = max(tokens.ids.shape[1] for _, _, tokens in made)
    tokens = tuple(
        tokens
        if tokens.ids.shape[1] == chunks
        else tokenize(tokenizer, prompts, long_prompts=long_prompts, triggers=triggers, chunks=chunks)
        for tokenizer, triggers, tokens in made
    )
    vectors = tuple(_rows([embedding.vectors[i] for embedding in embeddings]) for i in range(len(configs)))
    return TextInputs(tokens, vectors if embeddings else None)


def encoder_configs(checkpoint: Checkpoint) -> tuple[CLIPTextConfig, ...]:
    """The sizes of a checkpoint's text encoders."""
    return tuple(CLIPTextConfig.from_dict(checkpoint.configs[name]) for name, _ in checkpoint.definition.text_encoders)


def _triggers(embeddings: Sequence[Embedding], first: int, room: int) -> Triggers:
    triggers = {}
    for embedding in embeddings:
        count = len(embedding.vectors[0])
        if count > room:
            raise RequestError(f"embedding {embedding.name!r} has {count} vectors, and a chunk has room for {room}")
        triggers[embedding.name] = range(first, first + count)
        first += count
    return triggers


def _rows(vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    rows = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
    return np.pad(rows, ((0, -len(rows) % ROWS_AT_ONCE), (0, 0)))
