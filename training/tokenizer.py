"""The bundled model's tokenizer: CLIP's byte-pair encoding, with merges learned from the captions alone.

Every byte is a token, so any text can be written; every word of the captions is one token.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, trainers

from sdjax.loading.tokenizer import END, START, byte_pair_tokenizer, clip_normalizer, clip_pre_tokenizer
from training.captions import caption, vocabulary
from training.drawings import sample_training_scene

MAX_LENGTH = 32


def learn() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn a vocabulary and merges in CLIP's layout: bytes, bytes that end a word, merges, start, end."""
    rng = np.random.default_rng(0)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip_normalizer(), clip_pre_tokenizer()
    captions = [caption(sample_training_scene(rng), rng) for _ in range(4000)] + [" ".join(vocabulary())] * 100
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=50, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(clip_pre_tokenizer_alphabet())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(merge) for merge in merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def clip_pre_tokenizer_alphabet() -> list[str]:
    """The 256 printable stand-ins of the bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def write(folder: Path) -> None:
    """Write the files that transformers' `CLIPTokenizer` reads."""
    vocab, merges = learn()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    special = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def load() -> Tokenizer:
    """The tokenizer, as training uses it: start, words, end, and end again up to 32 tokens."""
    return byte_pair_tokenizer(*learn())
