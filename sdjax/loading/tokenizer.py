"""CLIP's byte-pair tokenizer, from a checkpoint's files or, for checkpoints that have none, from the package's."""

import gzip
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sdjax.errors import CheckpointError

START, END = "<|startoftext|>", "<|endoftext|>"
ROLES = {"bos": START, "eos": END, "pad": END, "unk": END}
"""The special tokens, and what they are where a config leaves them out."""
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
    continued: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Learned words of several vectors: the ids that the first one stands for (`<x>`, `<x>_1`, ... in diffusers)."""

    def units(self, prompt: str) -> list[tuple[int, ...]]:
        """The ids of a prompt's text alone, however many; those of one learned word together."""
        ids: list[int] = self.text.encode(prompt, add_special_tokens=False).ids
        return [self.continued.get(token, (token,)) for token in ids]

    def words(self, prompt: str) -> list[int]:
        """The ids of `units`, flat."""
        return [token for unit in self.units(prompt) for token in unit]

    def decode(self, ids: Sequence[int]) -> str:
        """Text again, roughly: capitals and runs of blanks are lost."""
        spelled: str = self.text.decode(list(ids), skip_special_tokens=False)
        return spelled.replace("</w>", " ").strip()


def load_tokenizer(folder: Path) -> ClipTokenizer:
    """Read `tokenizer.json`, or `vocab.json` and `merges.txt`, and the settings and added words beside them.

    As in transformers: a config with an `added_tokens_decoder` has all that was added to the vocabulary. Without one,
    `special_tokens_map.json` goes before the config, and added words are those of `added_tokens.json` and of
    `tokenizer.json`.

    Raises:
        CheckpointError: a file is missing or is not a CLIP tokenizer's, or an added word has another id than it gets.
    """
    try:
        return _read(folder)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"{folder} holds no CLIP tokenizer: {type(error).__name__}: {error}") from error


def _read(folder: Path) -> ClipTokenizer:
    settings, whole = _json(folder / "tokenizer_config.json"), _json(folder / "tokenizer.json")
    if "added_tokens_decoder" in settings:
        added = {int(index): token for index, token in settings["added_tokens_decoder"].items()}
    else:
        settings |= _json(folder / "special_tokens_map.json")
        special = {_content(settings[f"{role}_token"]) for role in ROLES if settings.get(f"{role}_token")}
        special |= {_content(token) for token in settings.get("extra_special_tokens") or ()}
        added = {
            index: {"content": word, "normalized": word not in special, "special": word in special}
            for word, index in _json(folder / "added_tokens.json").items()
        }
        added |= {token["id"]: token for token in whole.get("added_tokens", [])}
    if model := whole.get("model"):
        vocab, merges = model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [pair for line in lines if len(pair := line.split(" ")) == 2 and not line.startswith("#version")]
    else:
        raise CheckpointError(f"{folder} has neither vocab.json with merges.txt nor tokenizer.json")
    return clip_tokenizer(vocab, [(a, b) for a, b in merges], settings, added, where=str(folder))


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
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
    added: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
    *,
    where: str,
) -> ClipTokenizer:
    """Build a tokenizer from its tables and the contents of `tokenizer_config.json`.

    Args:
        vocab: ids of tokens.
        merges: of the byte pairs.
        settings: see `load_tokenizer`.
        added: words beside the vocabulary by their id, as `tokenizer.json` describes them.
        where: how errors begin.

    Raises:
        CheckpointError: a special token is unknown, or an added word's id is another than it gets.
    """
    text = byte_pair_tokenizer(vocab, merges)
    names = {role: _content(settings.get(f"{role}_token") or default) for role, default in ROLES.items()}
    listed = {index: _token(token, names.values()) for index, token in sorted(added.items())}
    text.add_tokens(list(listed.values()))
    for index, token in listed.items():
        if (given := text.token_to_id(token.content)) != index:
            raise CheckpointError(
                f"{where}: the added word {token.content!r} has id {index}, and the words before it leave it {given}"
            )
    if unknown := [name for name in names.values() if text.token_to_id(name) is None]:
        raise CheckpointError(f"{where}: the special token {unknown[0]!r} is not in the vocabulary")
    known = {token.content for token in listed.values()}
    more = [*dict.fromkeys(names.values()), *map(_content, _more_special(settings))]
    text.add_tokens([AddedToken(name, special=True) for name in more if name not in known])
    ids = {role: text.token_to_id(name) or 0 for role, name in names.items()}
    return ClipTokenizer(
        text=text,
        start=ids["bos"],
        end=ids["eos"],
        pad=ids["pad"],
        length=int(min(settings.get("model_max_length", 77), 2**31)),
        continued=_continued({token.content: index for index, token in text.get_added_tokens_decoder().items()}),
    )


def _continued(added: Mapping[str, int]) -> Mapping[int, tuple[int, ...]]:
    """The learned words of several vectors, by the id of the first."""
    words = {}
    for word, first in added.items():
        numbered = takewhile(added.__contains__, (f"{word}_{i}" for i in count(1)))
        if more := [added[name] for name in numbered]:
            words[first] = (first, *more)
    return words


def _more_special(settings: Mapping[str, Any]) -> list[Any]:
    """The special tokens without a role: a list, or by names of their own."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return list(more.values()) if isinstance(more, dict) else list(more)


def _token(token: Mapping[str, Any], names: Collection[str]) -> AddedToken:
    """A token as the files describe it; those of a role are special."""
    special = bool(token.get("special", False))
    return AddedToken(
        str(token["content"]),
        single_word=bool(token.get("single_word", False)),
        lstrip=bool(token.get("lstrip", False)),
        rstrip=bool(token.get("rstrip", False)),
        normalized=bool(token.get("normalized", not special)),
        special=special or token["content"] in names,
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
