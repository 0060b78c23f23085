"""Tensors of safetensors files to parameters: which tensor fills which leaf, and in which orientation."""

import json
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
from sdjax.models import Params

LeafPath: TypeAlias = tuple[str | int, ...]
Place: TypeAlias = Callable[[LeafPath, NDArray[Any]], Any]
"""Puts a host array, already in its final dtype and orientation, where the leaf at a path belongs."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PICKLES_REFUSED = (
    "reading a pickle runs whatever code it holds, so .bin, .ckpt and .pt files are not loaded; "
    "convert them to .safetensors, or take a revision that has them"
)

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
MAPPED_AT_ONCE = 256 * 2**20
"""Bytes of a file that are in memory beside the parameters; a mapping of the whole file would double the peak."""


class Tensor(NamedTuple):
    """A tensor that still lies in its file; `view` makes it from the stored one, where they differ, without copying."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    view: Callable[[NDArray[Any]], NDArray[Any]] | None = None

    @property
    def bytes(self) -> int:
        """Size in the file; every dtype's name ends in its bits."""
        bits = "".join(filter(str.isdigit, self.dtype.partition("_")[0])) or "8"
        return int(np.prod(self.shape, dtype=np.int64)) * int(bits) // 8


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
    names = sorted(open_tensors(file))
    try:
        with safe_open(file, "np") as opened:
            return {name: opened.get_tensor(name) for name in names}
    # What an unknown dtype raises differs between releases of safetensors.
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


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


def find_tensors(folder: Path, stem: str, variant: str | None) -> dict[str, Tensor]:
    """List a component's tensors, of one file or of several that an index names.

    An index wins over a single file beside it, since it is what says that the component was sharded; a variant is never
    taken unasked, nor another in its place.

    Raises:
        CheckpointError: nothing fits, a shard is missing, or there are only pickles.
    """
    suffix = f".{variant}" if variant else ""
    indexes = [f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"]
    for index in (folder / name for name in indexes):
        if index.is_file():
            return _sharded(index)
    single = folder / f"{stem}{suffix}.safetensors"
    if single.is_file():
        return open_tensors(single)
    present = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if not any(name.endswith(".safetensors") for name in present) and any(Path(n).suffix in PICKLES for n in present):
        raise CheckpointError(f"{folder} has only {', '.join(present)}: {PICKLES_REFUSED}")
    raise CheckpointError(f"{single} is missing; {folder} has {', '.join(present) or 'nothing'}")


def _sharded(index: Path) -> dict[str, Tensor]:
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
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
    """The published name of the leaf at `path`: `("conv_in", "kernel")` is `conv_in.weight`."""
    *modules, leaf = path
    return ".".join([*map(str, modules), LEAF_NAMES[str(leaf)]])


def from_torch(path: LeafPath, tensor: NDArray[Any]) -> NDArray[Any]:
    """Turn a tensor as PyTorch stores it into the leaf's orientation, without copying."""
    if path[-1] != "kernel":
        return tensor
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def to_torch(path: LeafPath, leaf: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `from_torch`."""
    if path[-1] != "kernel":
        return leaf
    return leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)


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
        shape = to_torch(path, np.broadcast_to(np.float32(0), leaves[path].shape)).shape
        if _trimmed(tensors[name].shape) != _trimmed(shape):
            raise CheckpointError(f"{where}: {name} has shape {tensors[name].shape}, and its config asks for {shape}")
    filled = {}
    for name, array in _read({name: tensors[name] for name in wanted}):
        path = wanted[name]
        shape = to_torch(path, np.broadcast_to(np.float32(0), leaves[path].shape)).shape
        leaf = from_torch(path, array.reshape(shape))
        filled[path] = place(path, leaf.astype(leaves[path].dtype))
    return FrozenDict(unflatten_dict(filled))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A pointwise convolution's kernel and a matrix hold the same numbers; checkpoints have either for the other."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _read(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Read tensors file by file, mapping a bounded part of a file at a time."""
    by_file: dict[Path, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append((name, tensor))
    for file, members in by_file.items():
        for group in _groups(members):
            with safe_open(file, "np") as opened:
                for name, tensor in group:
                    stored = opened.get_tensor(tensor.name)
                    yield name, stored if tensor.view is None else tensor.view(stored)


def _groups(members: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    group: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in members:
        group.append((name, tensor))
        size += tensor.bytes
        if size >= MAPPED_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _some(names: Iterable[str]) -> str:
    shown = list(islice(names := list(names), 3))
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(repr(name) for name in shown) + more
