"""Syntax of other tools, which `sdjax.prompts.grammar` reads as plain text: found, so that the caller can be warned."""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

SHOWN = 40
"""Characters of a find that a warning shows."""


class Syntax(NamedTuple):
    """What a piece of text means in other tools, and the pattern that finds it."""

    meaning: str
    pattern: re.Pattern[str]


# Quantifiers are possessive or bounded, so that no prompt takes longer than its length.
_NUMBER = r"(?<![\d.])(?:\d++(?:\.\d++)?|\.\d++)"
SYNTAXES = (
    Syntax("composed prompts (AUTOMATIC1111)", re.compile(r"(?<![\w-])AND(?![\w-])")),
    Syntax("regional prompts (AUTOMATIC1111)", re.compile(r"(?<![\w-])ADD(?:COMM|BASE|ROW|COL)(?![\w-])")),
    Syntax("words that change between steps (AUTOMATIC1111)", re.compile(rf"(?<!\\)\[[^][]*:\s*+{_NUMBER}\s*+\]")),
    Syntax("words that alternate from step to step (AUTOMATIC1111)", re.compile(r"(?<!\\)\[[^][|]*+\|[^][]*+\]")),
    Syntax("a random choice (dynamic prompts, ComfyUI)", re.compile(r"(?<!\\)\{[^{}|]*+\|[^{}]*+\}")),
    Syntax("emphasis (NovelAI)", re.compile(r"(?<!\\)\{[^{}|]++\}")),
    Syntax("a weight (NovelAI, Midjourney)", re.compile(rf"-?{_NUMBER}::|::-?{_NUMBER}(?!\s*+[\]\d.])")),
    Syntax("a wildcard (dynamic prompts)", re.compile(r"(?<!\w)__[^\W_][\w/*-]{0,60}?__(?!\w)")),
    Syntax("a learned word (ComfyUI)", re.compile(r"\bembedding:\S++")),
    Syntax("a weight by + or - (compel, InvokeAI)", re.compile(r"(?<!\w)[^\W\d_]++(?:\+++(?!\w)|--++(?=[\s,.;)]|$))")),
    Syntax(
        "a weight behind brackets (compel, InvokeAI)",
        re.compile(rf"(?:\([^()]{{0,{SHOWN}}}+)?\)(?:[+-]++(?=[\s,.;)]|$)|{_NUMBER})"),
    ),
    Syntax("mixed prompts (compel, InvokeAI)", re.compile(r"\)\.(?:and|blend)\([^()]*\)|\.swap\([^()]*\)")),
    Syntax("an option (Midjourney)", re.compile(r"(?<!\S)--[a-z]++(?!\S)")),
    Syntax("a comment (ComfyUI)", re.compile(r"/\*.{0,500}?\*/", re.DOTALL)),
)
"""In the order in which they are reported. `BREAK`, brackets of both kinds and `<lora:...>` are read here, too."""

_TAG = re.compile(r"<[A-Za-z][\w.-]*+(?:\[[^][<>]*+\])?(?::[^<>]*+)?>")
_NAME = re.compile(r"<[\w.-]+>")
TAG = "a command in angle brackets (AUTOMATIC1111, SwarmUI)"
NAME = "a learned word: its file is not among the embeddings"


def foreign_syntax(prompts: Sequence[str], words: Collection[str] = ()) -> list[str]:
    """Describe the syntax of other tools in prompts: one line for each kind of it, with the first that was found.

    Args:
        prompts: without the `<lora:...>` that are taken out of them.
        words: that are no syntax, whatever they look like: learned words, and tokens of the model's own.
    """
    known = {word.casefold() for word in words}
    found: dict[str, str] = {}
    for prompt in prompts:
        for meaning, match in _matches(prompt):
            if match.casefold() not in known:
                found.setdefault(meaning, match)
    return [f"{_shortened(text)!r} is plain text here; elsewhere it is {meaning}" for meaning, text in found.items()]


def _matches(prompt: str) -> list[tuple[str, str]]:
    tags = [(NAME if _NAME.fullmatch(tag) else TAG, tag) for tag in _TAG.findall(prompt)]
    # In a prompt of capitals alone AND is a word like the others.
    shouted = prompt.upper() == prompt and len(prompt.split()) > 3
    return tags + [
        (syntax.meaning, match[0])
        for syntax in SYNTAXES
        for match in syntax.pattern.finditer(prompt)
        if not (shouted and match[0] == "AND")
    ]


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."
