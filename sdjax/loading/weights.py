"""Tensors of safetensors files to parameters: which tensor fills which leaf."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sdjax.errors import CheckpointError
from sdjax.loading.mapped import DTYPES, SMALL_DTYPES, MappedFile, in_order, laid_out
from sdjax.models import Params

LeafPath: TypeAlias = tuple[str | int, ...]
Place: TypeAlias = Callable[[LeafPath, NDArray[Any]], Any]
"""Puts a host array, already in its final dtype, where the leaf at a path belongs."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PICKLES_REFUSED = (
    "reading a pickle runs whatever code it holds, so .bin, .ckpt and .pt files are not loaded; "
    "convert them to .safetensors, or take a revision that has them"
)

FLOATS = tuple(DTYPES)


class Tensor(NamedTuple):
    """A tensor that still lies in its file; `view` makes it from the stored one, where they differ, without copying."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    view: Callable[[NDArray[Any]], NDArray[Any]] | None = None


def open_tensors(file: Path) -> dict[str, Tensor]:
    """List what a file holds, by name, without reading it.

    Raises:
        CheckpointError: it is not a readable safetensors file.
    """
    if file.suffix in PICKLES:
        raise CheckpointError(f"{file}: {PICKLES_REFUSED}")
    try:
        with safe_open(file, "np") as opened:
            slices = ((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118 (not a mapping)
            return {name: Tensor(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


def read_tensors(file: Path) -> dict[str, NDArray[Any]]:
    """Read all that a small file holds, by name, in the names' order.

    Raises:
        CheckpointError: it is not a readable safetensors file, or has a dtype that NumPy lacks.
    """
    listed = open_tensors(file)
    small = MappedFile(file) if any(tensor.dtype in SMALL_DTYPES for tensor in listed.values()) else None
    try:
        with safe_open(file, "np") as opened:
            return {
                name: small.read(name) if small and listed[name].dtype in SMALL_DTYPES else opened.get_tensor(name)
                for name in sorted(listed)
            }
    # What an unknown dtype raises differs between releases of safetensors.
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


def read_number(tensor: Tensor) -> float:
    """Read a tensor of one floating-point number.

    Raises:
        CheckpointError: it is something else.
    """
    if tensor.dtype not in FLOATS or any(side != 1 for side in tensor.shape):
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype} of shape {tensor.shape}, which should be a number"
        )
    return float(MappedFile(tensor.file).read(tensor.name).astype(np.float32).reshape(()))


def check_finite(tensor: NDArray[Any], name: str) -> None:
    """Refuse what is no finite float32.

    Raises:
        CheckpointError: the tensor is of whole numbers, or holds NaN, infinity or what is too large for float32.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, not a floating-point one")
    with np.errstate(over="ignore"):
        finite = np.isfinite(tensor.astype(np.float32)).all()
    if not finite:
        raise CheckpointError(f"{name} holds NaN or infinity")


def open_metadata(file: Path) -> Mapping[str, str]:
    """What a safetensors file says about itself beside its tensors."""
    with safe_open(file, "np") as opened:
        return dict(opened.metadata() or {})


def find_tensors(folder: Path, stem: str, variant: str | None) -> dict[str, Tensor]:
    """List a component's tensors, of one file or of several that an index names.

    An index wins over a single file beside it, since it is what says that the component was sharded; a variant is never
    taken unasked, nor another in its place.

    Raises:
        CheckpointError: nothing fits, a shard is missing, or there are only pickles.
    """
    present = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    chosen = folder / choose_weights(present, stem, variant, where=str(folder))
    return open_tensors(chosen) if chosen.suffix == ".safetensors" else _sharded(chosen)


def choose_weights(names: Iterable[str], stem: str, variant: str | None, *, where: str) -> str:
    """Choose the file that a component's weights begin with, by the rule of `find_tensors`.

    Args:
        names: of the files of the component's folder.
        stem: "model" or "diffusion_pytorch_model".
        variant: asked for.
        where: the folder, for errors.

    Returns:
        The name of an index of shards, or of a single file.

    Raises:
        CheckpointError: nothing fits, or there are only pickles.
    """
    present = sorted(names)
    suffix = f".{variant}" if variant else ""
    single = f"{stem}{suffix}.safetensors"
    indexes = [f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"]
    for candidate in (*indexes, single):
        if candidate in present:
            return candidate
    pickles = [name for name in present if Path(name).suffix in PICKLES]
    if pickles and not any(name.endswith(".safetensors") for name in present):
        raise CheckpointError(f"{where} has weights in {', '.join(pickles)} only: {PICKLES_REFUSED}")
    others = sorted({name for file in present if (name := variant_of(file, stem)) not in (None, variant or "")})
    hint = "".join(f"; for those ask for {variant_argument(name)}" for name in others)
    raise CheckpointError(f"{where} lacks {single}; it has {', '.join(present) or 'nothing'}{hint}")


def variant_of(file: str, stem: str) -> str | None:
    """The variant that a weight file's name tells: "fp16" for `model.fp16.safetensors`, "" for none, None for others.

    Shards have their number before or after it: `model.fp16-00001-of-00002.safetensors` is today's form.
    """
    match = re.fullmatch(rf"{re.escape(stem)}({_SHARD})?(?:\.(\w+))?({_SHARD})?\.safetensors", file)
    return None if match is None else match[2] or ""


def variant_argument(name: str) -> str:
    """How a caller asks for a variant: `variant="fp16"`, or `variant=None` for those without a name."""
    return f'variant="{name}"' if name else "variant=None"


_SHARD = r"-\d{5}-of-\d{5}"


def _sharded(index: Path) -> dict[str, Tensor]:
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is not an index of shards: it has no readable weight_map") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, and {index.name} names it")
        tensors |= {key: tensor for key, tensor in open_tensors(shard).items() if weight_map.get(key) == name}
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(f"{index.parent}: the shards lack {_some(absent)}, and {index.name} names it")
    return tensors


def tensor_name(path: LeafPath) -> str:
    """The published name of the leaf at `path`: `("conv_in", "weight")` is `conv_in.weight`."""
    return ".".join(map(str, path))


def fill(shapes: Params, tensors: Mapping[str, Tensor], *, component: str, place: Place) -> Params:
    """Read every leaf of a model from its tensor.

    Args:
        shapes: the tree of `jax.ShapeDtypeStruct` that the definition needs.
        tensors: by published name.
        component: the name that errors give the model.
        place: where each leaf goes.

    Returns:
        The same tree, immutable, with what `place` made of each leaf.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape; it is named.
    """
    leaves = flatten_dict(shapes)
    wanted = {tensor_name(path): path for path in leaves}
    where = component if not tensors else f"{component} ({next(iter(tensors.values())).file.name})"
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(f"{where} lacks {_some(missing)}, which its config asks for")
    if unknown := [name for name in tensors if name not in wanted]:
        raise CheckpointError(f"{where} holds {_some(unknown)}, which its config has no place for")
    for name, path in wanted.items():
        shape = leaves[path].shape
        if _trimmed(tensors[name].shape) != _trimmed(shape):
            raise CheckpointError(f"{where}: {name} has shape {tensors[name].shape}, and its config asks for {shape}")
        if tensors[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} is stored as {tensors[name].dtype}, and only {', '.join(FLOATS)} are read: "
                "quantized numbers mean nothing without their scales"
            )

    def read(task: tuple[MappedFile, str]) -> tuple[LeafPath, NDArray[Any]]:
        file, name = task
        path, tensor = wanted[name], tensors[name]
        leaf = leaves[path]
        if tensor.view is None and DTYPES[tensor.dtype] == leaf.dtype.name:
            return path, file.read(tensor.name).reshape(leaf.shape)
        stored = file.view(tensor.name)
        array = stored if tensor.view is None else tensor.view(stored)
        cast = _cast(array.reshape(leaf.shape), leaf.dtype, f"{where}: {name}")
        file.let_go(tensor.name)
        return path, cast

    in_turn = _by_place({name: tensors[name] for name in wanted})
    filled = {path: place(path, array) for path, array in in_order(read, in_turn)}
    return FrozenDict(unflatten_dict(filled))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A pointwise convolution's kernel and a matrix hold the same numbers; checkpoints have either for the other."""
    return shape[:2] if set(shape[2:]) == {1} else shape


def _cast(leaf: NDArray[Any], dtype: Any, what: str) -> NDArray[Any]:
    """Convert into memory of its own; infinities that the file holds stay, and new ones are refused."""
    cast = laid_out(leaf, dtype)
    if cast.dtype != leaf.dtype and np.isinf(cast).any() and (np.isinf(cast) & ~np.isinf(leaf)).any():
        raise CheckpointError(
            f"{what} holds numbers that are too large for {dtype}; bfloat16 and float32 reach further"
        )
    return cast


def _by_place(tensors: Mapping[str, Tensor]) -> Iterator[tuple[MappedFile, str]]:
    """The tensors file by file, in the order in which they lie there; the system is told of each."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(name)
    for path, names in by_file.items():
        file = MappedFile(path)
        for name in sorted(names, key=lambda name: file.place(tensors[name].name)):
            file.expect(tensors[name].name)
            yield file, name


def _some(names: Iterable[str]) -> str:
    shown = list(islice(names := list(names), 3))
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(repr(name) for name in shown) + more
