"""What of a batch of prompts is cut, taken out, or not known: cheap enough to look for when a request comes in."""

from collections.abc import Sequence

from sdjax.errors import Warn
from sdjax.loading import Checkpoint
from sdjax.prompts.foreign import foreign_syntax
from sdjax.prompts.grammar import parse
from sdjax.prompts.inputs import Reading, text_inputs
from sdjax.prompts.tokens import without_words
from sdjax.prompts.vocabulary import unknown_words, unknown_words_message


def check_prompts(checkpoint: Checkpoint, prompts: Sequence[str], how: Reading, *, warn: Warn) -> None:
    """Warn of all that the model will not see as it was written.

    Args:
        checkpoint: whose tokenizers and card.
        prompts: all that are encoded, negative ones among them, without `<lora:...>`.
        how: they are read.
        warn: called with each.
    """
    prompts = list(dict.fromkeys(prompts))
    text_inputs(checkpoint, prompts, how, warn=warn)
    learned = [embedding.name for embedding in how.embeddings]
    added = [
        token.content for words in checkpoint.tokenizers for token in words.text.get_added_tokens_decoder().values()
    ]
    for line in foreign_syntax(prompts, [*learned, *added]):
        warn(line)
    plain = [
        without_words(span.text, [*learned, *added])
        for prompt in prompts
        for section in parse(prompt)
        for span in section
    ]
    for name in (embedding.name for embedding in how.embeddings if not embedding.bundled):
        if not any(without_words(prompt, [name]) != prompt for prompt in prompts):
            warn(f"the learned word {name!r} is in no prompt, so its embedding has no effect")
    vocabulary = checkpoint.card.vocabulary
    if unknown := unknown_words(plain, vocabulary):
        warn(unknown_words_message(unknown, vocabulary))
