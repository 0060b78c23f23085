"""Prompts to token ids."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdjax.loading import ClipTokenizer


def tokenize(tokenizer: ClipTokenizer, prompts: Sequence[str]) -> NDArray[np.int32]:
    """Encode prompts as diffusers does: start, words, end, then padding up to the encoder's length.

    What does not fit is cut, with a warning that shows it; the end token stays, in the last place.

    Returns:
        (prompts, length) int32.
    """
    room = tokenizer.length - 2
    ids = np.full((len(prompts), tokenizer.length), tokenizer.pad, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        words = tokenizer.words(prompt)
        if len(words) > room:
            warnings.warn(
                f"the prompt has {len(words)} tokens and the text encoder reads {room}, so this was cut off: "
                f"{tokenizer.decode(words[room:])!r}",
                stacklevel=3,
            )
        row[: min(len(words), room) + 2] = [tokenizer.start, *words[:room], tokenizer.end]
    return ids
