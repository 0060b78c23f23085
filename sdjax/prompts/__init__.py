"""Prompts: read by a grammar, cut into chunks, and turned into what text encoders are given."""

from sdjax.prompts.grammar import MAX_WEIGHT, Span, parse
from sdjax.prompts.inputs import TextInputs, encoder_configs, text_inputs
from sdjax.prompts.tokens import LONG_PROMPTS, tokenize

__all__ = [
    "LONG_PROMPTS",
    "MAX_WEIGHT",
    "Span",
    "TextInputs",
    "encoder_configs",
    "parse",
    "text_inputs",
    "tokenize",
]
