"""Writing a checkpoint as a folder in diffusers layout, which diffusers itself loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from sdjax.errors import CheckpointError
from sdjax.loading.card import write_card
from sdjax.loading.checkpoint import TEXT_ENCODERS, Checkpoint
from sdjax.loading.folder import STEMS
from sdjax.loading.tokenizer import ClipTokenizer
from sdjax.loading.weights import tensor_name
from sdjax.models import Params, is_quantised

INDEX = "model_index.json"


def save_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write every part of a checkpoint, and its card; parameters keep their dtype.

    Text encoders are written with the prefix that published checkpoints have (`text_model.`).

    All is written beside the folder first and moved into it at the end, so that a full disk or an interruption leaves
    what was there. Of an existing folder each component's subfolder is replaced as a whole (another model's shards must
    not stay beside the new weights), and whatever else it holds is left alone.

    Raises:
        CheckpointError: `folder` is a file, or the weights are stored as int8.
    """
    if is_quantised(checkpoint.params):
        raise CheckpointError("weights that are stored as int8 have no place in this layout: save the model without")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and a checkpoint is saved as a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        written, replaced = Path(scratch) / "new", Path(scratch) / "old"
        _write(checkpoint, written)
        write_card(checkpoint.card, written)
        replaced.mkdir()
        # The index last: it is what says that the folder is a checkpoint.
        for part in sorted(written.iterdir(), key=lambda part: part.name == INDEX):
            target = folder / part.name
            if target.exists():
                target.rename(replaced / part.name)
            part.rename(target)


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    for name in checkpoint.params:
        component = folder / name
        component.mkdir(parents=True)
        tensors = tensors_of(checkpoint.params[name])
        _write_json(component / "config.json", _with_dtype(checkpoint.configs[name], tensors))
        save_file(tensors, component / f"{STEMS[name]}.safetensors", {"format": "pt"})
    encoders = [name for name, _ in checkpoint.definition.text_encoders]
    for name, tokenizer in zip(encoders, checkpoint.tokenizers, strict=True):
        save_tokenizer(tokenizer, folder / TEXT_ENCODERS[name])
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.configs["scheduler"])
    _write_json(folder / INDEX, checkpoint.configs["model_index"])


def _with_dtype(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Let a text encoder's config name the dtype that is saved: transformers loads in the one that it finds there."""
    dtype = next(iter(tensors.values())).dtype.name
    return {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in config.items()}


def tensors_of(params: Params) -> dict[str, np.ndarray[Any, Any]]:
    """A component's leaves under their published names."""
    return {tensor_name(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}


def save_tokenizer(tokenizer: ClipTokenizer, folder: Path) -> None:
    """Write the files of a `CLIPTokenizer`: vocabulary, merges, special tokens and added words."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = json.loads(tokenizer.text.to_str())
    model, added = whole["model"], {str(token.pop("id")): token for token in whole["added_tokens"]}
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "".join(" ".join(merge) + "\n" for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    special = {
        f"{role}_token": tokenizer.text.id_to_token(index)
        for role, index in (("bos", tokenizer.start), ("eos", tokenizer.end), ("pad", tokenizer.pad))
    } | {"unk_token": model["unk_token"]}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length, **special}
    if any(token["content"] not in model["vocab"] for token in added.values()):
        settings["added_tokens_decoder"] = added
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(file: Path, contents: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(contents), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
