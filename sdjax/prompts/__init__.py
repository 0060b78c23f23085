"""Prompts: read by a grammar, cut into chunks, and turned into what text encoders are given."""

from sdjax.prompts.grammar import MAX_WEIGHT, Span, parse
from sdjax.prompts.inputs import PLAIN, Reading, TextInputs, reading, text_inputs
from sdjax.prompts.tokens import LONG_PROMPTS, tokenize

__all__ = [
    "LONG_PROMPTS",
    "MAX_WEIGHT",
    "PLAIN",
    "Reading",
    "Span",
    "TextInputs",
    "parse",
    "reading",
    "text_inputs",
    "tokenize",
]
