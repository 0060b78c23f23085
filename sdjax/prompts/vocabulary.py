"""The words of prompts that a model was not trained on, where its card lists those that it was."""

import difflib
import re
from collections.abc import Iterator, Sequence

WORDS_SHOWN, UNKNOWN_SHOWN, LETTERS_SHOWN = 24, 8, 30
"""The most of a vocabulary, and of the unknown words and their letters, that a warning shows."""
LEAST_ALIKE = 4
"""Letters from which on a word may be another one with a slip of the keyboard."""

_WORD = re.compile(r"[^\W\d_]+(?:['\N{RIGHT SINGLE QUOTATION MARK}-][^\W\d_]+)*")
_APOSTROPHE = re.compile(r"['\N{RIGHT SINGLE QUOTATION MARK}]")


def unknown_words(texts: Sequence[str], vocabulary: Sequence[str]) -> list[str]:
    """List the words that a vocabulary lacks, each once, in their order.

    Capitals do not matter. Numbers and punctuation are no words. A word with hyphens is known as a whole or by its
    parts, one with an apostrophe as a whole or by what stands before it ("star's").

    Args:
        texts: any.
        vocabulary: of a card; an empty one states nothing, so nothing is unknown.
    """
    if not vocabulary:
        return []
    known = {word.casefold() for word in vocabulary}
    words = (part for text in texts for word in _WORD.findall(text.casefold()) for part in _parts(word, known))
    return list(dict.fromkeys(word for word in words if word not in known))


def unknown_words_message(words: Sequence[str], vocabulary: Sequence[str]) -> str:
    """One line that names unknown words, a known one that is spelled alike for each, and what is known."""
    near = {word.casefold(): word for word in vocabulary}
    shown = [_with_near(word, near) for word in words[:UNKNOWN_SHOWN]]
    more = len(words) - len(shown)
    rest = len(vocabulary) - WORDS_SHOWN
    return (
        f"this model does not know: {', '.join(shown)}{f' and {more} more' if more else ''}; it knows: "
        f"{', '.join(vocabulary[:WORDS_SHOWN])}{f' and {rest} more' if rest > 0 else ''}"
    )


def _parts(word: str, known: set[str]) -> Iterator[str]:
    """The word itself where it is known, else what a reader would look up."""
    if word in known:
        yield word
        return
    for part in word.split("-"):
        yield part if part in known else _APOSTROPHE.split(part)[0]


def _with_near(word: str, near: dict[str, str]) -> str:
    shown = word if len(word) <= LETTERS_SHOWN else word[:LETTERS_SHOWN] + "..."
    if len(word) < LEAST_ALIKE:
        return shown
    alike = difflib.get_close_matches(word[:LETTERS_SHOWN], near, n=1, cutoff=0.8)
    return f"{shown} ({near[alike[0]]}?)" if alike else shown
