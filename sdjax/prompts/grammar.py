r"""The grammar of prompts: which brackets are weights, which are text, and where a chunk begins.

    prompt = { text | BREAK | round | square }
    round  = "(" prompt ")"                weighs its contents 1.1 times as much
           | "(" prompt ":" number ")"     number times; -10 to 10, in digits with at most one point and no exponent
    square = "[" prompt "]"                1 / 1.1 times

Nested weights multiply, from the outside in; a product beyond -10 or 10 counts as that. Everything else is text, to the
letter, and no prompt is an error:

- A bracket without a partner is text. A closing bracket takes the nearest open one of its kind, and those left open
  between the two are text: `((a`, `a))`, `)(`, `(a:1.5`, and the square one in `(a [b)`.
- A pair around nothing but blanks is text: `()`, `(:1.2)`.
- A round pair whose own text (not that of pairs inside it) holds a colon is a weight only if a number as above follows
  the last one: `(a:)`, `(a:b)`, `(a:nan)`, `(a:1e9)` and `(at 10:30)` are text.
- A square pair whose own text holds a colon or a bar is text: other tools switch words between steps with these
  (`[cat:dog:0.5]`, `[cat|dog]`), which is not supported here.
- A pair without a number that touches the letter, digit or underscore before it is text: `name_(series)`, `f(x)`,
  `a[0]`. With a number it is a weight there too.
- A backslash makes the bracket after it text: `\(a\)`. Of several backslashes before a bracket every two stand for one,
  so `\\(a)` is a backslash and a weight. Backslashes elsewhere are themselves.

So a prompt without brackets is exactly its own text. With a blank before it, a bracket of natural text is a weight
(`name (series)`), as in the tools that this notation comes from (AUTOMATIC1111's and ComfyUI): escape it.

Before any of this `<lora:name:0.8>` is taken out (`sdjax.prompts.lora_tags`). Syntax of other tools is text: `AND`,
`[cat:dog:0.5]`, `[cat|dog]`, `{cat|dog}`, `{cat}`, `embedding:name`, `cat++`, `(cat)-`, `(cat)1.2`, `1.5::cat::`,
`__name__`, `<random:...>`, `--ar`. A request's warnings name the first of each kind (`sdjax.prompts.foreign`).

BREAK, in capitals and by itself (neither a letter, digit, underscore nor hyphen beside it), begins a chunk, inside
brackets too; with nothing before or after it, it does nothing. The word itself is written in small letters: a text
encoder reads no capitals anyway.
"""

import re
from typing import NamedTuple

STRONGER = 1.1
"""What a pair of round brackets multiplies by, and a pair of square ones divides by."""
MAX_WEIGHT = 10.0

_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*")
_BREAK = re.compile(r"(?<![\w-])BREAK(?![\w-])")
_MARK = re.compile(r"(?<!\\)(\\*)([()\[\]])|[:|]")
_PARTNER = {")": "(", "]": "["}


class Span(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float


class _Open(NamedTuple):
    """A bracket that waits for its partner: which, where, and the places of colons and bars directly inside it."""

    bracket: str
    start: int
    marks: list[int]


class _Pair(NamedTuple):
    """Brackets that are a weight: `factor` holds from after `start` to before `stop`, and the text goes on at `end`."""

    start: int
    stop: int
    end: int
    factor: float


def parse(prompt: str) -> tuple[tuple[Span, ...], ...]:
    """Read a prompt by the grammar above.

    Returns:
        What begins a chunk each, at least one: spans of text in order, neighbours of different weight.
    """
    sections: list[list[Span]] = [[]]
    for span in _merged(_spans(prompt, *_scan(prompt))):
        first, *others = _BREAK.split(span.text)
        sections[-1].append(Span(first, span.weight))
        sections.extend([Span(text, span.weight)] for text in others)
    said = [section for section in sections if any(span.text.strip() for span in section)]
    return tuple(tuple(span for span in section if span.text) for section in said) or ((),)


def _scan(prompt: str) -> tuple[list[_Pair], list[tuple[int, int]]]:
    """Find the pairs that are weights, and the backslashes (from, to) that fall away."""
    pairs, escapes = [], []
    waiting: list[_Open] = []
    open_now = {"(": 0, "[": 0}
    for found in _MARK.finditer(prompt):
        slashes, bracket = found[1], found[2]
        if bracket is None:
            if waiting:
                waiting[-1].marks.append(found.start())
            continue
        if slashes:
            escapes.append((found.start(), found.start() + (len(slashes) + 1) // 2))
        place = found.start(2)
        if len(slashes) % 2:
            continue
        if bracket in open_now:
            waiting.append(_Open(bracket, place, []))
            open_now[bracket] += 1
        elif open_now[wanted := _PARTNER[bracket]]:
            marks: list[int] = []
            while True:
                opened = waiting.pop()
                open_now[opened.bracket] -= 1
                marks = opened.marks + marks
                if opened.bracket == wanted:
                    break
            if pair := _weight(prompt, opened._replace(marks=marks), place):
                pairs.append(pair)
    return pairs, escapes


def _weight(prompt: str, opened: _Open, close: int) -> _Pair | None:
    """What a pair of brackets means; None where it is text."""
    stop, factor = close, STRONGER if opened.bracket == "(" else 1 / STRONGER
    colons = [place for place in opened.marks if prompt[place] == ":"]
    if opened.bracket == "[" and opened.marks:
        return None
    if colons:
        number = _NUMBER.fullmatch(prompt, colons[-1] + 1, close)
        if number is None or abs(float(number[1])) > MAX_WEIGHT:
            return None
        stop, factor = colons[-1], float(number[1])
    elif re.match(r"\w", prompt[max(opened.start - 1, 0) : opened.start]):
        return None
    if not prompt[opened.start + 1 : stop].strip():
        return None
    return _Pair(opened.start, stop, close + 1, factor)


def _spans(prompt: str, pairs: list[_Pair], escapes: list[tuple[int, int]]) -> list[Span]:
    """Cut a prompt where its weight changes and where something falls away."""
    factors = {pair.start: pair.factor for pair in pairs}
    ends = {pair.stop: pair.end for pair in pairs}
    cuts = [*escapes, *((start, start + 1) for start in factors), *ends.items()]
    spans, weights, at = [], [1.0], 0
    for start, stop in sorted(cuts):
        spans.append(Span(prompt[at:start], weights[-1]))
        at = stop
        if start in factors:
            weights.append(min(max(weights[-1] * factors[start], -MAX_WEIGHT), MAX_WEIGHT))
        elif start in ends:
            weights.pop()
    return [*spans, Span(prompt[at:], weights[-1])]


def _merged(spans: list[Span]) -> list[Span]:
    """Join neighbours of equal weight, so that `re(d:1)` is one word."""
    merged: list[Span] = []
    for span in spans:
        if not span.text:
            continue
        if merged and merged[-1].weight == span.weight:
            merged[-1] = Span(merged[-1].text + span.text, span.weight)
        else:
            merged.append(span)
    return merged
