"""Reading a LoRA: from a file or folder to an `Adapter` that fits a model, or an error that says why not."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from numpy.typing import NDArray

from sdjax.errors import CheckpointError
from sdjax.loading.lora import Adapter, Change
from sdjax.loading.lora_names import BUNDLE, ENCODERS, bare_layer, spellings, take_apart
from sdjax.loading.lora_parts import Layer, Parts, layer_changes
from sdjax.loading.lora_settings import PeftSettings, file_settings, folder_settings
from sdjax.loading.textual_inversion import NAMELESS, NOT_VECTORS, Embedding, embedding_of
from sdjax.loading.weights import (
    PICKLES,
    PICKLES_REFUSED,
    LeafPath,
    check_finite,
    open_tensors,
    read_tensors,
    tensor_name,
)
from sdjax.models import Params

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
WHOLE_NUMBERS = ("alpha", "on_input")
"""Roles that may be whole numbers: diffusers' own converter writes alphas so."""
JOINED = "attn_in_proj"
"""In the name of OpenCLIP's joined projections."""
NAMED_AT_MOST = 8


class _File(NamedTuple):
    """A file of tensors, the component that unprefixed names mean, and peft's settings by component ("" is all)."""

    path: Path
    component: str | None
    settings: Mapping[str, PeftSettings]

    def settings_of(self, component: str) -> PeftSettings | None:
        """Those of one component."""
        return self.settings.get(component, self.settings.get(""))


def read_lora(source: str | Path, params: Params) -> Adapter:
    """Read a LoRA for a model.

    Args:
        source: a .safetensors file with the keys of diffusers, peft, kohya's sd-scripts (SD or SDXL, `alpha` present or
            not) or LyCORIS (LoCon, LoHa, LoKr, full differences, norms, OFT, BOFT, (IA)^3, GLoRA), DoRA or not; or a
            folder that holds one: diffusers' `pytorch_lora_weights.safetensors`, or peft's `adapter_config.json` and
            `adapter_model.safetensors`, there or in subfolders named `unet`, `text_encoder`, `text_encoder_2`.
            Learned words beside them (`bundle_emb`) are not read here: see `bundled_embeddings`.
        params: of the whole pipeline that it is for. PiSSA and OLoRA read the weights that they changed.

    Returns:
        The adapter. Where the file has layers that the model lacks, they are in `unused`, and one warning names them.

    Raises:
        CheckpointError: it can't be read; no layer is the model's; a layer has another shape there (both are named);
            or it holds a part that is not understood, which is never skipped.
    """
    source = Path(source).expanduser()
    layers: dict[LeafPath, Change] = {}
    unused: list[str] = []
    digest = hashlib.blake2b(digest_size=16)
    leaves = flatten_dict(params)
    for file in _files(source):
        known = spellings(params, file.component)
        tensors = {name: tensor for name, tensor in read_tensors(file.path).items() if not name.startswith(BUNDLE)}
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
            digest.update(np.ascontiguousarray(tensor).tobytes())
        said = {name: settings.values for name, settings in file.settings.items()}
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())
        found, unknown = _grouped(tensors, known, file)
        unused += unknown
        for path, parts in found.items():
            layer = _layer(path, leaves, file)
            for leaf, change in layer_changes(layer, parts).items():
                if (*path, leaf) in layers:
                    raise CheckpointError(f"{source} changes {tensor_name((*path, leaf))} in two files")
                layers[*path, leaf] = change
    if not layers:
        held = f"it holds {_listed(unused)}" if unused else "it is empty"
        raise CheckpointError(f"{source} changes no layer of this model: {held}")
    if unused:
        warnings.warn(f"{source}: this model has no layer for {_listed(unused)}", stacklevel=2)
    return Adapter(str(source), FrozenDict(layers), tuple(unused), digest.hexdigest())


def bundled_embeddings(source: Path, widths: Mapping[str, int]) -> tuple[Embedding, ...]:
    """Read the learned words that come in one file with an adapter (`bundle_emb.WORD.KEY`).

    Args:
        source: as for `read_lora`.
        widths: of the checkpoint's text encoders, by name.

    Raises:
        CheckpointError: a file can't be read, or a word was learned for another kind of model.
    """
    words: dict[str, dict[str, NDArray[Any]]] = {}
    for file in _files(source):
        if any(name.startswith(BUNDLE) for name in open_tensors(file.path)):
            for name, tensor in read_tensors(file.path).items():
                if name.startswith(BUNDLE):
                    word, key = _word_and_key(name.removeprefix(BUNDLE))
                    words.setdefault(word, {})[key] = tensor
    return tuple(
        replace(embedding_of(tensors, word, named_by=source, widths=widths), bundled=True)
        for word, tensors in words.items()
    )


def _word_and_key(name: str) -> tuple[str, str]:
    """Split at the last dot before a name that means no word, for a word may have dots in it."""
    known = sorted((*NAMELESS, *NOT_VECTORS), key=len, reverse=True)
    word = next((name.removesuffix(f".{key}") for key in known if key and name.endswith(f".{key}")), None)
    if word is None:
        word, _, key = name.partition(".")
        return word, key
    return word, name.removeprefix(f"{word}.")


def _files(source: Path) -> list[_File]:
    """The files of tensors that a file or folder stands for."""
    if source.suffix in PICKLES:
        raise CheckpointError(f"{source}: {PICKLES_REFUSED}")
    if source.is_file():
        return [_File(source, None, file_settings(source))]
    if not source.is_dir():
        raise CheckpointError(f"there is no LoRA file or folder {str(source)!r}")
    folders: dict[str | None, Path] = {None: source}
    folders |= {name: source / name for name in ("unet", *ENCODERS)}
    peft = {name: folder for name, folder in folders.items() if (folder / PEFT_CONFIG).is_file()}
    if peft:
        named = source.name if source.name in ("unet", *ENCODERS) else None
        return [
            _File(folder / PEFT_WEIGHTS, name or named, {"": folder_settings(folder / PEFT_CONFIG)})
            for name, folder in peft.items()
        ]
    present = sorted(file.name for file in source.iterdir())
    files = [name for name in present if name.endswith(".safetensors")]
    chosen = [DIFFUSERS_WEIGHTS] if DIFFUSERS_WEIGHTS in files else files
    if len(chosen) == 1:
        return [_File(source / chosen[0], None, file_settings(source / chosen[0]))]
    if not files and any(Path(name).suffix in PICKLES for name in present):
        raise CheckpointError(f"{source} has only {', '.join(present)}: {PICKLES_REFUSED}")
    raise CheckpointError(
        f"{source} is no LoRA: it should hold {DIFFUSERS_WEIGHTS}, {PEFT_CONFIG} with {PEFT_WEIGHTS}, or one "
        f".safetensors file, and has {', '.join(present) or 'nothing'}"
    )


def _grouped(
    tensors: Mapping[str, NDArray[Any]], known: Mapping[str, LeafPath], file: _File
) -> tuple[dict[LeafPath, Parts], list[str]]:
    """The parts of each of the model's layers, and the keys that belong to none or are not the adapter's targets."""
    found: dict[LeafPath, Parts] = {}
    unused = []
    for name, tensor in tensors.items():
        key = take_apart(name)
        path = None if key is None else known.get(key.layer)
        if key is None or path is None:
            if layer := _layer_within(name, known):
                raise CheckpointError(f"{file.path}: {name} is a part of {layer} of a kind that is not supported")
            if JOINED in name:
                raise CheckpointError(
                    f"{file.path}: {name} is for queries, keys and values that are joined into one, and this model has "
                    "them apart; convert the file to the names of diffusers"
                )
            unused.append(name)
            continue
        settings = file.settings_of(str(path[0]))
        whole = key.part in ("weight", "bias", "token_rows")
        if settings and not whole and not settings.targets(tensor_name(path[1:])):
            unused.append(name)
            continue
        parts = found.setdefault(path, {})
        if key.part in parts:
            raise CheckpointError(f"{file.path} has {name}, and the same part of that layer under another name")
        if key.part in WHOLE_NUMBERS and np.issubdtype(tensor.dtype, np.integer):
            tensor = tensor.astype(np.float64)
        check_finite(tensor, f"{file.path}: {name}")
        parts[key.part] = tensor.astype(np.float32) if tensor.itemsize == 1 else tensor
    return found, unused


def _layer(path: LeafPath, leaves: Mapping[LeafPath, Any], file: _File) -> Layer:
    shapes = {leaf: leaves[*path, leaf].shape for leaf in ("weight", "bias") if (*path, leaf) in leaves}
    weight = partial(np.asarray, leaves[*path, "weight"], np.float32)
    return Layer(path, shapes, weight, str(file.path), file.settings_of(str(path[0])))


def _layer_within(name: str, known: Mapping[str, LeafPath]) -> str | None:
    """The layer that a key of an unknown ending starts with."""
    ends = [found.start() for found in re.finditer(r"\.", name)]
    return next((layer for end in reversed(ends) if (layer := bare_layer(name[:end])) in known), None)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:NAMED_AT_MOST]))
    return shown + (f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else "")
