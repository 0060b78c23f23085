"""Reading a LoRA: from a file or folder to an `Adapter` that fits a model, or an error that says why not."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sdjax.errors import CheckpointError
from sdjax.loading.lora import (
    Adapter,
    Change,
    Factor,
    Hadamard,
    Kronecker,
    LowRank,
    fits,
    shapes,
)
from sdjax.loading.lora_names import ENCODERS, bare_layer, spellings, take_apart
from sdjax.loading.weights import PICKLES, PICKLES_REFUSED, LeafPath, check_finite, read_tensors, tensor_name
from sdjax.models import Params

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
PEFT_TYPES = ("LORA", "LOHA", "LOKR")
UNSUPPORTED_SETTINGS = ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora")
NAMED_AT_MOST = 8

Parts = dict[str, NDArray[Any]]
"""The parts of one layer, by their role in `lora_names.PARTS`."""


class _File(NamedTuple):
    """A file of tensors, the component that unprefixed names mean, and peft's settings by component ("" is all)."""

    path: Path
    component: str | None
    settings: Mapping[str, Mapping[str, Any]]


def read_lora(source: str | Path, params: Params) -> Adapter:
    """Read a LoRA for a model.

    Args:
        source: a .safetensors file with the keys of diffusers, peft, kohya's sd-scripts (SD or SDXL, `alpha` present or
            not) or LyCORIS (LoCon, LoHa, LoKr), DoRA or not; or a folder that holds one: diffusers'
            `pytorch_lora_weights.safetensors`, or peft's `adapter_config.json` and `adapter_model.safetensors`, there
            or in subfolders named `unet`, `text_encoder`, `text_encoder_2`.
        params: of the whole pipeline that it is for.

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
        tensors = read_tensors(file.path)
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
            digest.update(np.ascontiguousarray(tensor).tobytes())
        digest.update(json.dumps(file.settings, sort_keys=True, default=str).encode())
        found, unknown = _grouped(tensors, known, file.path)
        unused += unknown
        for path, parts in found.items():
            if path in layers:
                raise CheckpointError(f"{source} changes {tensor_name(path)} in two files")
            layers[path] = _change(path, parts, leaves[path].shape, file)
    if not layers:
        held = f"it holds {_listed(unused)}" if unused else "it is empty"
        raise CheckpointError(f"{source} changes no layer of this model: {held}")
    if unused:
        warnings.warn(f"{source}: this model has no layer for {_listed(unused)}", stacklevel=2)
    return Adapter(str(source), FrozenDict(layers), tuple(unused), digest.hexdigest())


def _files(source: Path) -> list[_File]:
    """The files of tensors that a file or folder stands for."""
    if source.suffix in PICKLES:
        raise CheckpointError(f"{source}: {PICKLES_REFUSED}")
    if source.is_file():
        return [_File(source, None, _file_settings(source))]
    if not source.is_dir():
        raise CheckpointError(f"there is no LoRA file or folder {str(source)!r}")
    folders: dict[str | None, Path] = {None: source}
    folders |= {name: source / name for name in ("unet", *ENCODERS)}
    peft = {name: folder for name, folder in folders.items() if (folder / PEFT_CONFIG).is_file()}
    if peft:
        named = source.name if source.name in ("unet", *ENCODERS) else None
        return [
            _File(folder / PEFT_WEIGHTS, name or named, {"": _settings(folder / PEFT_CONFIG)})
            for name, folder in peft.items()
        ]
    present = sorted(file.name for file in source.iterdir())
    files = [name for name in present if name.endswith(".safetensors")]
    chosen = [DIFFUSERS_WEIGHTS] if DIFFUSERS_WEIGHTS in files else files
    if len(chosen) == 1:
        return [_File(source / chosen[0], None, _file_settings(source / chosen[0]))]
    if not files and any(Path(name).suffix in PICKLES for name in present):
        raise CheckpointError(f"{source} has only {', '.join(present)}: {PICKLES_REFUSED}")
    raise CheckpointError(
        f"{source} is no LoRA: it should hold {DIFFUSERS_WEIGHTS}, {PEFT_CONFIG} with {PEFT_WEIGHTS}, or one "
        f".safetensors file, and has {', '.join(present) or 'nothing'}"
    )


def _file_settings(file: Path) -> dict[str, Mapping[str, Any]]:
    """What diffusers writes into the metadata: the settings of peft, each behind its component's name."""
    try:
        with safe_open(file, "np") as opened:
            packed = (opened.metadata() or {}).get(DIFFUSERS_METADATA)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    if packed is None:
        return {}
    flat = _object(packed, f"{file}: {DIFFUSERS_METADATA}")
    components = ("unet", *ENCODERS)
    return {
        component: _checked(
            {
                key.removeprefix(f"{component}."): value
                for key, value in flat.items()
                if key.startswith(f"{component}.")
            },
            file,
        )
        for component in components
        if any(key.startswith(f"{component}.") for key in flat)
    }


def _settings(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not readable: {error}") from error
    return _checked(_object(text, str(file)), file)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{where} holds a JSON {type(contents).__name__}, not an object")
    return contents


def _checked(settings: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """Refuse what would change the result and is not done here."""
    kind = settings.get("peft_type") or "LORA"
    if kind not in PEFT_TYPES:
        raise CheckpointError(f"{where} is a {kind} adapter, and only {', '.join(PEFT_TYPES)} are supported")
    if asked := [name for name in UNSUPPORTED_SETTINGS if settings.get(name)]:
        raise CheckpointError(f"{where} asks for {asked[0]}, which is not supported")
    return settings


def _grouped(
    tensors: Mapping[str, NDArray[Any]], known: Mapping[str, LeafPath], where: Path
) -> tuple[dict[LeafPath, Parts], list[str]]:
    """The parts of each of the model's layers, and the keys that belong to none."""
    found: dict[LeafPath, Parts] = {}
    unknown = []
    for name, tensor in tensors.items():
        key = take_apart(name)
        if key is None or key.layer not in known:
            if layer := _layer_within(name, known):
                raise CheckpointError(f"{where}: {name} is a part of {layer} of a kind that is not supported")
            unknown.append(name)
            continue
        parts = found.setdefault(known[key.layer], {})
        if key.part in parts:
            raise CheckpointError(f"{where} has {name}, and the same part of that layer under another name")
        check_finite(tensor, f"{where}: {name}")
        parts[key.part] = tensor
    return found, unknown


def _layer_within(name: str, known: Mapping[str, LeafPath]) -> str | None:
    """The layer that a key of an unknown ending starts with."""
    ends = [found.start() for found in re.finditer(r"\.", name)]
    return next((layer for end in reversed(ends) if (layer := bare_layer(name[:end])) in known), None)


def _change(path: LeafPath, parts: Parts, shape: tuple[int, ...], file: _File) -> Change:
    """One layer's change, checked against the shape of the leaf that it is for."""
    layer = f"{file.path}: {tensor_name(path).removesuffix('.weight')}"
    parts = dict(parts)
    alpha = parts.pop("alpha", None)
    if alpha is not None and alpha.size != 1:
        raise CheckpointError(f"{layer} has an alpha of shape {alpha.shape}, which should be one number")
    vector = {name: parts.pop(name) for name in ("magnitude", "dora_scale") if name in parts}
    factors, rank = _factors(parts, layer)
    if not fits(factors, shape):
        raise CheckpointError(
            f"{layer} is of another shape: the factors of the LoRA are {shapes(factors)}, and this model's layer is "
            f"{shape}; it was made for another base model"
        )
    if rank is None:
        scale = 1.0
    elif alpha is not None:
        scale = float(alpha.reshape(())) / rank
    else:
        scale = _scale_of(file.settings, path, rank, layer)
    if vector and "embeddings" in path:
        raise CheckpointError(f"{layer} has DoRA magnitudes, which are not supported for an embedding")
    if len(vector) > 1:
        raise CheckpointError(f"{layer} has both {' and '.join(vector)}")
    magnitude = None
    for name, values in vector.items():
        magnitude = _magnitude(values, shape, by_output=name == "magnitude", layer=layer)
    return Change(factors, scale, magnitude)


def _factors(parts: Parts, layer: str) -> tuple[LowRank | Hadamard | Kronecker, int | None]:
    """The factors and their rank, which is None where a scale has no meaning."""
    names = set(parts)
    if names == {"down", "up"}:
        return LowRank((_matrix(parts["up"]), parts["down"])), _rank(parts["down"], layer)
    if names == {"down", "mid", "up"}:
        return LowRank((_matrix(parts["up"]), parts["mid"], _matrix(parts["down"]))), _rank(parts["down"], layer)
    if names == {"embedding_down", "embedding_up"}:
        # peft keeps these transposed: A is (rank, words) and B is (channels, rank).
        return LowRank((parts["embedding_down"].T, parts["embedding_up"].T)), _rank(parts["embedding_down"], layer)
    for kind, cores in ((Hadamard, ("hada_t1", "hada_t2")), (Kronecker, (None, "lokr_t2"))):
        stem = "hada_w" if kind is Hadamard else "lokr_w"
        (first, used), (second, used_too) = (_lycoris(parts, f"{stem}{i}", core) for i, core in enumerate(cores, 1))
        if first and second and names == used | used_too:
            ranked = [parts[f"{stem}{i}_b"] for i in (2, 1) if f"{stem}{i}_b" in parts]
            return kind(first, second), _rank(ranked[0], layer) if ranked else None
    raise CheckpointError(
        f"{layer} has the parts {', '.join(sorted(names)) or 'alpha alone'}, which do not make a LoRA"
    )


def _matrix(part: NDArray[Any]) -> NDArray[Any]:
    """A pointwise convolution's kernel as the matrix that it is."""
    return part[..., 0, 0] if part.ndim == 4 and part.shape[2:] == (1, 1) else part


def _rank(part: NDArray[Any], layer: str) -> int:
    if part.ndim < 2 or 0 in part.shape:
        raise CheckpointError(f"{layer} has a factor of shape {part.shape}, which has no rank")
    return int(part.shape[0])


def _lycoris(parts: Parts, name: str, core: str | None) -> tuple[Factor, set[str]]:
    """A factor in LyCORIS' spelling, and the names that it uses up; an empty one where a part is missing.

    It is `w1`, or `w1_a` times `w1_b`, or, with a core `t1` between, the transpose of `w1_a` times `t1` times `w1_b`.
    """
    pair = {f"{name}_a", f"{name}_b"}
    if name in parts:
        return (parts[name],), {name}
    if not pair <= parts.keys():
        return (), set()
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return ((a.T, parts[core], b), pair | {core}) if core in parts else ((a, b), pair)


def _scale_of(settings: Mapping[str, Mapping[str, Any]], path: LeafPath, rank: int, layer: str) -> float:
    """Alpha / rank from peft's settings, 1 where there are none."""
    component = str(path[0])
    own = settings.get(component, settings.get(""))
    if own is None:
        return 1.0
    name = ".".join(map(str, path[1:-1]))
    alpha = own.get("lora_alpha", own.get("alpha", rank))
    pattern = own.get("alpha_pattern") or {}
    try:
        matching = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
        alpha = float(next(matching, alpha))
        scale = alpha / math.sqrt(rank) if own.get("use_rslora") else alpha / rank
    except (re.error, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{layer}: its settings do not give an alpha: {error}") from error
    if not math.isfinite(scale):
        raise CheckpointError(f"{layer}: alpha is {alpha}")
    return scale


def _magnitude(values: NDArray[Any], shape: tuple[int, ...], *, by_output: bool, layer: str) -> NDArray[Any]:
    """DoRA's magnitudes, shaped to multiply a weight.

    peft's vector has a number for each output, in whatever shape; that of LyCORIS says by its shape whether it is
    (out, 1, ...) or, as in its first releases, (1, in, ...).
    """
    out, width = shape[:2]
    ones = (1,) * (len(shape) - 2)
    if not by_output and values.ndim > 1 and values.shape[0] == 1 and values.size == width and out != 1:
        return values.reshape(1, width, *ones)
    if values.size != out:
        raise CheckpointError(f"{layer} has DoRA magnitudes of shape {values.shape}, and its weight here is {shape}")
    return values.reshape(out, 1, *ones)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:NAMED_AT_MOST]))
    return shown + (f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else "")
