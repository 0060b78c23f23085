"""How a batch of prompts is to be read, and everything that `encode_prompt` is then given."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdjax.errors import RequestError, Warn, warn_caller
from sdjax.generation import Tokens
from sdjax.loading import Checkpoint, Embedding, embeddings_of, load_embedding
from sdjax.models import CLIPTextConfig
from sdjax.prompts.tokens import LONG_PROMPTS, Triggers, tokenize, with_chunks

ROWS_AT_ONCE = 16
"""Learned vectors are handed over in multiples of so many rows, for their number is a shape."""


class Reading(NamedTuple):
    """How prompts are read; `reading` checks one.

    Attributes:
        clip_skip: layers of the text encoder that prompts do without, as diffusers counts; None and 0 are none.
        embeddings: learned words, no two of one name.
        long_prompts: of `LONG_PROMPTS`.
    """

    clip_skip: int | None = None
    embeddings: tuple[Embedding, ...] = ()
    long_prompts: str = "truncate"


PLAIN = Reading()
"""As diffusers reads prompts where nothing else is asked for."""


class TextInputs(NamedTuple):
    """Arguments of `encode_prompt`, with an entry for each text encoder.

    tokens: ids and weights, (prompts, chunks, length), with the same number of chunks.
    vectors: (rows, width) float32, the learned words; None without any.
    """

    tokens: tuple[Tokens, ...]
    vectors: tuple[NDArray[np.float32], ...] | None


def reading(
    checkpoint: Checkpoint,
    *,
    clip_skip: object,
    embeddings: object,
    long_prompts: object,
    loras: Sequence[tuple[Path, float]] = (),
) -> Reading:
    """Check the arguments of a `Pipeline` call that say how prompts are read, and read the embeddings' files.

    Learned words that come with adapters are known too, but for those whose name an embedding of its own has.

    Raises:
        RequestError: an argument can't be honoured; the message says what was given and what is allowed.
        CheckpointError: an embedding can't be read, or was learned for another kind of model.
    """
    configs = encoder_configs(checkpoint)
    if clip_skip is not None:
        most = min(config.num_hidden_layers for config in configs.values()) - 1
        if isinstance(clip_skip, bool) or not hasattr(clip_skip, "__index__"):
            raise RequestError(f"clip_skip must be None or a whole number from 1 to {most}, not {clip_skip!r}")
        clip_skip = int(clip_skip.__index__())
        if not 1 <= clip_skip <= most:
            raise RequestError(f"clip_skip must be None or a whole number from 1 to {most}, not {clip_skip}")
    if long_prompts not in LONG_PROMPTS:
        raise RequestError(f"long_prompts must be one of {', '.join(LONG_PROMPTS)}, not {long_prompts!r}")
    if isinstance(embeddings, str) or not isinstance(embeddings, Sequence):
        raise RequestError(f"embeddings must be a list of files or (file, name) pairs, not {embeddings!r}")
    widths = {name: config.hidden_size for name, config in configs.items()}
    learned = tuple(
        load_embedding(*_file_and_name(f"embeddings[{i}]", entry), widths=widths) for i, entry in enumerate(embeddings)
    )
    names = [embedding.name.lower() for embedding in learned]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise RequestError(f"two embeddings are named {twice[0]!r} (capitals do not matter): give one another name")
    bundled: dict[str, Embedding] = {}
    for word in embeddings_of(loras, widths):
        if word.name.lower() in bundled:
            raise RequestError(f"two adapters bring a learned word {word.name!r} (capitals do not matter)")
        if word.name.lower() not in names:
            bundled[word.name.lower()] = word
    learned += tuple(bundled.values())
    room = min(tokenizer.length for tokenizer in checkpoint.tokenizers) - 2
    for embedding in learned:
        if (count := len(embedding.vectors[0])) > room:
            raise RequestError(f"embedding {embedding.name!r} has {count} vectors, and a prompt has room for {room}")
    return Reading(clip_skip, learned, str(long_prompts))


def text_inputs(
    checkpoint: Checkpoint, prompts: Sequence[str], how: Reading = PLAIN, *, warn: Warn = warn_caller
) -> TextInputs:
    """Tokenize prompts, negative ones among them, for every text encoder of a checkpoint.

    Nothing of the checkpoint changes: learned words are ids beyond its vocabulary, and rows beside its embeddings.

    Args:
        checkpoint: whose tokenizers and text encoders.
        prompts: any text; all get as many chunks as the longest.
        how: they are read; its `clip_skip` does not matter here.
        warn: called with what is cut.
    """
    encoders = [
        (tokenizer, _triggers(how.embeddings, config.vocab_size))
        for tokenizer, config in zip(checkpoint.tokenizers, encoder_configs(checkpoint).values(), strict=True)
    ]
    tokens = [
        tokenize(words, prompts, long_prompts=how.long_prompts, triggers=learned, warn=warn)
        for words, learned in encoders
    ]
    most = max(made.ids.shape[1] for made in tokens)
    tokens = [with_chunks(words, made, most) for (words, _), made in zip(encoders, tokens, strict=True)]
    vectors = tuple(_rows([embedding.vectors[i] for embedding in how.embeddings]) for i in range(len(encoders)))
    return TextInputs(tuple(tokens), vectors if how.embeddings else None)


def encoder_configs(checkpoint: Checkpoint) -> dict[str, CLIPTextConfig]:
    """The sizes of a checkpoint's text encoders, by name."""
    return {name: CLIPTextConfig.from_dict(checkpoint.configs[name]) for name, _ in checkpoint.definition.text_encoders}


def _file_and_name(name: str, given: object) -> tuple[str | Path, str | None]:
    if isinstance(given, str | Path):
        return given, None
    if isinstance(given, Sequence) and len(given) == 2:
        file, word = given
        if isinstance(file, str | Path) and isinstance(word, str):
            return file, word
    raise RequestError(f"{name} must be a file or a (file, name) pair, not {given!r}")


def _triggers(embeddings: Sequence[Embedding], first: int) -> Triggers:
    """The ids of every learned word, one after the other from `first` on."""
    triggers = {}
    for embedding in embeddings:
        triggers[embedding.name] = range(first, first := first + len(embedding.vectors[0]))
    return triggers


def _rows(vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    rows = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
    return np.pad(rows, ((0, -len(rows) % ROWS_AT_ONCE), (0, 0)))
