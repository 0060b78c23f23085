"""CLIP's byte-pair tokenizer, from a checkpoint's files or, for checkpoints that have none, from the package's."""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sdjax.errors import CheckpointError

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).with_name("clip_merges.txt.gz")

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_normalizer() -> normalizers.Normalizer:
    """Composed, lower-case text with single blanks (transformers' `CLIPConverter`)."""
    return normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])


def clip_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Words, single digits and runs of punctuation, spelled in stand-ins for their bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def byte_pair_tokenizer(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Build the tokenizer of text (no start, end or padding)."""
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip_normalizer(), clip_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass(frozen=True)
class ClipTokenizer:
    """Text to token ids, with the ids that a text encoder starts, ends and pads with.

    As in transformers, a special token's own text inside a prompt is that token: for SD 2 and SDXL's second encoder
    the padding token is "!", id 0, so a "!" that a prompt holds becomes id 0 (open_clip would say 256).
    """

    text: Tokenizer
    start: int
    end: int
    pad: int
    length: int

    def words(self, prompt: str) -> list[int]:
        """The ids of a prompt's text alone, however many."""
        ids: list[int] = self.text.encode(prompt, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text again, roughly: capitals and runs of blanks are lost."""
        spelled: str = self.text.decode(list(ids), skip_special_tokens=False)
        return spelled.replace("</w>", " ").strip()


def load_tokenizer(folder: Path) -> ClipTokenizer:
    """Read `vocab.json` and `merges.txt`, or `tokenizer.json`, and the settings beside them.

    Raises:
        CheckpointError: a file is missing or is not a CLIP tokenizer's.
    """
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [pair for line in lines if len(pair := line.split(" ")) == 2 and not line.startswith("#version")]
    elif model := _json(folder / "tokenizer.json").get("model"):
        vocab, merges = model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    else:
        raise CheckpointError(f"{folder} has neither vocab.json with merges.txt nor tokenizer.json")
    return clip_tokenizer(vocab, [(a, b) for a, b in merges], settings, where=str(folder))


def published_tokenizer(pad: str) -> ClipTokenizer:
    """The tokenizer of every published Stable Diffusion: 49,408 tokens, 77 a prompt.

    The vocabulary follows from the merges: each byte, each byte at a word's end, each merge in its order, then start
    and end (OpenAI's `simple_tokenizer.py`).

    Args:
        pad: the token that fills up a prompt: `END` for CLIP ViT-L (SD 1, SDXL's first encoder), "!" (id 0) for
            OpenCLIP (SD 2, SDXL's second encoder).
    """
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    letters = _byte_letters()
    ends = [letter + "</w>" for letter in letters]
    tokens = [*letters, *ends, *(left + right for left, right in merges), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return clip_tokenizer(vocab, merges, {"pad_token": pad, "model_max_length": 77}, where=MERGES.name)


def _byte_letters() -> list[str]:
    """A visible letter for each byte: its own where it has one, else the next of those from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in visible] + [chr(0x100 + i) for i in range(0x100 - len(visible))]


def clip_tokenizer(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], settings: Mapping[str, Any], *, where: str
) -> ClipTokenizer:
    """Build a tokenizer from its tables and the contents of `tokenizer_config.json`."""
    names = {
        role: _content(settings.get(f"{role}_token", default))
        for role, default in (("bos", START), ("eos", END), ("pad", END), ("unk", END))
    }
    if unknown := [name for name in names.values() if name not in vocab]:
        raise CheckpointError(f"{where}: the special token {unknown[0]!r} is not in the vocabulary")
    text = byte_pair_tokenizer(vocab, merges)
    text.add_special_tokens([AddedToken(name, special=True) for name in dict.fromkeys(names.values())])
    return ClipTokenizer(
        text=text,
        start=vocab[names["bos"]],
        end=vocab[names["eos"]],
        pad=vocab[names["pad"]],
        length=int(min(settings.get("model_max_length", 77), 2**31)),
    )


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return contents if isinstance(contents, dict) else {}
