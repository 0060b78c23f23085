"""Prompts: read by a grammar, cut into chunks, and turned into what text encoders are given."""

from sdjax.prompts.checks import check_prompts
from sdjax.prompts.grammar import MAX_WEIGHT, Span, parse
from sdjax.prompts.inputs import PLAIN, Reading, TextInputs, reading, text_inputs
from sdjax.prompts.lora_tags import LoraTag, take_tags
from sdjax.prompts.tokens import LONG_PROMPTS, tokenize

__all__ = [
    "LONG_PROMPTS",
    "MAX_WEIGHT",
    "PLAIN",
    "LoraTag",
    "Reading",
    "Span",
    "TextInputs",
    "check_prompts",
    "parse",
    "reading",
    "take_tags",
    "text_inputs",
    "tokenize",
]
