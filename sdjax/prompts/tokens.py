"""Prompts to token ids and weights, in chunks of the text encoder's length.

A chunk is what an encoder reads at once: the start token, up to `length - 2` tokens of text (75 for CLIP's 77), the end
token, and padding. A prompt fills one; BREAK begins another, and so does text that does not fit where that is asked
for. The number of chunks is a shape, so each number of them that occurs compiles once; all prompts that are tokenized
together get as many as the longest, for which the others are padded with chunks without words.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np

from sdjax.errors import RequestError, Warn, warn_caller
from sdjax.generation import Tokens
from sdjax.loading import ClipTokenizer
from sdjax.prompts.grammar import parse

Triggers: TypeAlias = Mapping[str, Sequence[int]]
"""Words that stand for learned embeddings: the token ids of each, which are not in the vocabulary."""

MOST_SHOWN = 60
"""Characters of a cut text that a warning shows."""


class _Unit(NamedTuple):
    """Tokens that a chunk's end does not part: one, or all of a learned embedding."""

    ids: tuple[int, ...]
    weight: float


_Token: TypeAlias = tuple[int, float]
_Chunks: TypeAlias = list[list[_Token]]


def tokenize(
    tokenizer: ClipTokenizer,
    prompts: Sequence[str],
    *,
    long_prompts: str = "truncate",
    triggers: Triggers = MappingProxyType({}),
    warn: Warn = warn_caller,
) -> Tokens:
    """Read prompts by the grammar of `sdjax.prompts.grammar` and encode them for one text encoder.

    A prompt without brackets and BREAK gets the ids that diffusers gives it.

    Args:
        tokenizer: of the encoder.
        prompts: any text.
        long_prompts: what becomes of text that does not fit a chunk: "truncate" cuts it as diffusers does, with a
            warning that shows where; "chunk" goes on in another chunk.
        triggers: words that stand for learned embeddings. Capitals do not matter, as for any word. One that begins or
            ends in a letter, digit or underscore is not found inside a longer word.
        warn: called with what is cut.

    Returns:
        Ids and weights, each (prompts, chunks, length). Start, end and padding weigh 1.

    Raises:
        RequestError: `long_prompts` is something else.
    """
    if long_prompts not in LONG_PROMPTS:
        raise RequestError(f"long_prompts must be {' or '.join(map(repr, LONG_PROMPTS))}, not {long_prompts!r}")
    room = tokenizer.length - 2
    rows, complaints = [], []
    for prompt in prompts:
        sections = [list(_units(tokenizer, section, triggers)) for section in parse(prompt)]
        row: _Chunks = []
        for section in sections:
            made, lost = LONG_PROMPTS[long_prompts](section, room)
            row += made
            if lost:
                count = sum(len(unit.ids) for unit in section)
                complaints.append(
                    f"a prompt has {count} tokens and the text encoder reads {room}, so this was cut off: "
                    f"{_shortened(_spelled(tokenizer, lost, triggers))!r} (long_prompts='chunk', or --chunk, reads it)"
                )
        rows.append(row)
    for complaint in dict.fromkeys(complaints):
        warn(complaint)
    return _laid_out(tokenizer, rows, max(map(len, rows), default=1))


def without_words(text: str, names: Sequence[str]) -> str:
    """Text in which a blank stands for each learned word, found as `tokenize` finds them."""
    return re.sub(_any_of(names), " ", text, flags=re.IGNORECASE) if names else text


def _shortened(text: str) -> str:
    """The beginning of a text, in a length that fits a line."""
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN].rstrip() + " ..."


def with_chunks(tokenizer: ClipTokenizer, tokens: Tokens, chunks: int) -> Tokens:
    """Give prompts chunks without words behind their own, so that they have `chunks`, which is no fewer than now."""
    prompts, present = tokens.ids.shape[:2]
    empty = _laid_out(tokenizer, [[]] * prompts, chunks - present)
    return Tokens(*(np.concatenate(both, axis=1) for both in zip(tokens, empty, strict=True)))


def _units(tokenizer: ClipTokenizer, section: Sequence[tuple[str, float]], triggers: Triggers) -> Iterator[_Unit]:
    ids_of = {name.lower(): tuple(ids) for name, ids in triggers.items()}
    for text, weight in section:
        for piece in re.split(f"({_any_of(triggers)})", text, flags=re.IGNORECASE) if triggers else [text]:
            if piece.lower() in ids_of:
                yield _Unit(ids_of[piece.lower()], weight)
            else:
                yield from (_Unit(ids, weight) for ids in tokenizer.units(piece))


def _any_of(names: Iterable[str]) -> str:
    """A pattern for the first of some names, the longest first: a name may begin like another."""
    return "|".join(_alone(name) for name in sorted(names, key=len, reverse=True))


def _alone(name: str) -> str:
    """A pattern for a name that is no part of a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", name) else ""
    return before + re.escape(name) + after


def _truncated(section: Sequence[_Unit], room: int) -> tuple[_Chunks, list[int]]:
    """One chunk, and the ids that it had no room for."""
    tokens = _tokens(section)
    return [tokens[:room]], [token for token, _ in tokens[room:]]


def _chunked(section: Sequence[_Unit], room: int) -> tuple[_Chunks, list[int]]:
    """As many chunks as it takes; nothing is lost."""
    chunks: list[list[_Unit]] = [[]]
    filled = 0
    for unit in section:
        if filled + len(unit.ids) > room and chunks[-1]:
            chunks.append([])
            filled = 0
        chunks[-1].append(unit)
        filled += len(unit.ids)
    return [_tokens(chunk) for chunk in chunks], []


LONG_PROMPTS: Mapping[str, Callable[[Sequence[_Unit], int], tuple[_Chunks, list[int]]]] = MappingProxyType(
    {"truncate": _truncated, "chunk": _chunked}
)


def _tokens(section: Sequence[_Unit]) -> list[_Token]:
    return [(token, unit.weight) for unit in section for token in unit.ids]


def _laid_out(tokenizer: ClipTokenizer, rows: Sequence[_Chunks], chunks: int) -> Tokens:
    shape = (len(rows), chunks, tokenizer.length)
    ids, weights = np.full(shape, tokenizer.pad, np.int32), np.ones(shape, np.float32)
    ids[..., 0], ids[..., 1] = tokenizer.start, tokenizer.end
    for row, made in enumerate(rows):
        for place, chunk in enumerate(made):
            ids[row, place, 1 : len(chunk) + 2] = [*(token for token, _ in chunk), tokenizer.end]
            weights[row, place, 1 : len(chunk) + 1] = [weight for _, weight in chunk]
    return Tokens(ids, weights)


def _spelled(tokenizer: ClipTokenizer, ids: Sequence[int], triggers: Triggers) -> str:
    """Text again, with the names of learned embeddings."""
    names = {ids[0]: name for name, ids in triggers.items()}
    learned = {token for ids in triggers.values() for token in ids}
    words, run = [], list[int]()
    for token in ids:
        if token in learned:
            words += [tokenizer.decode(run), names.get(token, "")]
            run = []
        else:
            run.append(token)
    return " ".join(word for word in [*words, tokenizer.decode(run)] if word)
