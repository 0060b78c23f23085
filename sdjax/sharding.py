"""More than one device: a mesh, what of which array lies where on it, and how a function of rows runs on it.

A mesh has three axes, any of which may have length 1:

- `data`: rows of the batch. Every device draws its own by the very program that one device alone would run, and none
  waits for another.
- `guidance`: the halves without and with the prompt. Each step's outputs are summed: one all-reduce of the latents.
- `model`: the denoiser's weights, split as in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): the first layer of
  a pair by its outputs and the second by its inputs, so that a pair costs one all-reduce of activations.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from numpy.typing import NDArray

from sdjax import compiling
from sdjax.backend import cores, one_by_one
from sdjax.batch import Batch, batch_axes
from sdjax.errors import RequestError
from sdjax.models import Params

DATA, GUIDANCE, MODEL = AXES = ("data", "guidance", "model")

OUTPUT, INPUT = 0, 1
"""Axes of a weight: (out, in), or (out, in, size, size)."""
SPLIT = tuple(
    (re.compile(pattern), axis)
    for pattern, axis in (
        (r"\.attn\d\.to_[qkv]\.weight", OUTPUT),
        (r"\.attn\d\.to_out\.0\.weight", INPUT),
        (r"\.ff\.net\.0\.proj\.(weight|bias)", OUTPUT),
        (r"\.ff\.net\.2\.weight", INPUT),
        (r"\.resnets\.\d+\.(conv1|time_emb_proj)\.(weight|bias)", OUTPUT),
        (r"\.resnets\.\d+\.norm2\.(weight|bias)", OUTPUT),
        (r"\.resnets\.\d+\.conv2\.weight", INPUT),
    )
)
"""What is split over `model`, by the path's end, and along which axis. The rest is whole on every device: text encoders
and autoencoder, which run once a picture; convolutions that have no second one to pair with; biases that are added to
a sum; norms of what is whole."""

SHARED = -1
"""Stands where the axis of rows would, for what all rows of a batch have in common."""

Result = TypeVar("Result")


def make_mesh(
    devices: Sequence[jax.Device] | int | None = None, *, data: int | None = None, guidance: int = 1, model: int = 1
) -> Mesh:
    """Arrange devices in a mesh with the axes `data`, `guidance` and `model`.

    Neighbours along `model` talk in every layer, so they are the nearest.

    Args:
        devices: those to use; a number takes the first ones, None all.
        data: how many parts the rows of a batch are split into; None is as many as the devices make.
        guidance: 2 gives the halves without and with the prompt a device each.
        model: how many parts the denoiser's weights are split into. What does not divide stays whole; where heads of
            attention or groups of a norm don't, a device computes parts of one, which takes more talk.

    Raises:
        RequestError: there are not so many devices, or they don't make this shape.
    """
    found = list(jax.devices() if devices is None or isinstance(devices, int) else devices)
    if isinstance(devices, int):
        if not 1 <= devices <= len(found):
            raise RequestError(f"devices must be 1 to {len(found)}, which JAX finds here, not {devices}")
        found = found[:devices]
    if guidance not in (1, 2):
        raise RequestError(f"guidance must be 1 or 2, the halves that there are, not {guidance}")
    if model < 1 or (data is not None and data < 1):
        raise RequestError(f"data and model must be at least 1, not {data} and {model}")
    rows = len(found) // (guidance * model) if data is None else data
    if rows * guidance * model != len(found):
        raise RequestError(
            f"{len(found)} devices can't be arranged as data={'any' if data is None else data} x guidance={guidance} x "
            f"model={model}"
        )
    # With explicit axes, the default, JAX refuses a convolution whose output channels are split.
    return jax.make_mesh((rows, guidance, model), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=found)


def check_mesh(mesh: Mesh) -> Mesh:
    """See whether a mesh is one that `make_mesh` could have made, up to axes left out.

    Raises:
        RequestError: it isn't.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise RequestError(f"a mesh may have the axes {', '.join(AXES)}, and this one has {unknown[0]!r}")
    if DATA not in mesh.axis_names:
        raise RequestError(f"a mesh must have the axis {DATA}, if only of length 1; this one has {mesh.axis_names}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise RequestError("the axes of a mesh must be of AxisType.Auto: sdjax.sharding.make_mesh makes one")
    if _size(mesh, GUIDANCE) > 2:
        raise RequestError(f"guidance has 2 halves, and this mesh splits them into {_size(mesh, GUIDANCE)}")
    return mesh


def param_sharding(path: Sequence[str | int], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where a parameter lies.

    Args:
        path: of the leaf in a pipeline's parameters: ("unet", "down_blocks", 0, ..., "to_q", "weight").
        shape: of the leaf.
        mesh: see `make_mesh`.
    """
    parts = _size(mesh, MODEL)
    if parts > 1 and (path[0] == "unet" or str(path[0]).startswith("controlnet")):
        name = ".".join(map(str, path))
        for pattern, axis in SPLIT:
            if pattern.search(name) and shape[axis] % parts == 0:
                entries: list[str | None] = [None] * len(shape)
                entries[axis] = MODEL
                return NamedSharding(mesh, _split(*entries))
    return NamedSharding(mesh, _split())


@cache
def placer(mesh: Mesh | None) -> Callable[[Sequence[str | int], NDArray[Any]], Array]:
    """Make the function that puts a parameter, by its path, where it belongs: without a mesh on the default device.

    It is the same function for equal meshes, so what it placed can be remembered by it.
    """

    def place(path: Sequence[str | int], array: NDArray[Any]) -> Array:
        placed: Array = jax.device_put(array, None if mesh is None else param_sharding(path, array.shape, mesh))
        return placed

    return place


def mesh_of(params: Mapping[str, Any]) -> Mesh | None:
    """The mesh on which parameters lie, None where that is a single device."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def batch_sharding(batch: Batch, mesh: Mesh) -> Batch:
    """Where each array of a batch lies: a tree of `NamedSharding` like the batch.

    Rows are spread over `data`, which must divide their number. The halves of guidance are spread over `guidance`,
    where there are two: without guidance every device along that axis does the same.
    """
    placed: Batch = jax.tree.map(lambda axis, x: NamedSharding(mesh, _spec(axis, x, mesh)), batch_axes(batch), batch)
    return placed


def guidance_axis(params: Params, halves: int) -> str | None:
    """The mesh axis over which `halves` of guidance are spread when the parameters lie on a mesh; None: they aren't."""
    mesh = mesh_of(params)
    return GUIDANCE if mesh is not None and halves == 2 == _size(mesh, GUIDANCE) else None


def by_rows(
    function: Callable[..., Result],
    axes: Callable[..., tuple[Any, ...]],
    *,
    reads: Callable[[Any], Iterable[str]],
    out_axis: int = 0,
    at_once: Callable[..., int] | None = None,
    static_argnames: Sequence[str] = (),
    donated: Sequence[int] = (),
) -> Callable[..., Result]:
    """Compile a function of (definition, params, *arrays) that works on rows of a batch, each by itself.

    With parameters on one device it is `compiling.jit(function)`; on a CPU for each row by itself, so that one program
    serves any number of them, and rows that leave cores idle run beside each other. On a mesh each device along `data`
    runs the function on rows of its own, and a loop in it as often as they need. Rows that are missing to a multiple
    are copies of the last one, and don't come back.

    Args:
        function: returns arrays, or trees of them.
        axes: gives, for the arrays, trees like theirs of which axis counts the rows: 0, 1 where guidance comes first,
            or `SHARED` for what all rows have in common.
        reads: gives, for the definition, the names in `params` that the function reads: a call takes time for every
            parameter that it is handed.
        out_axis: which axis does so in all that is returned.
        at_once: gives, for (definition, *arrays), how many rows may hold memory at one time where each is a call of its
            own; None is any number.
        static_argnames: keyword arguments that are part of the program.
        donated: which of the arrays may be written over, counted from 0.
    """

    def traced(definition: Any, mesh: Mesh | None, params: Params, *arrays: Any, **static: Any) -> Result:
        call = partial(function, definition, **static)
        if mesh is None:
            return call(params, *arrays)
        specs = jax.tree.map(partial(_spec, mesh=mesh), axes(*arrays), arrays)
        longest = max(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)), key=len)
        # How guidance and rows are split, or rows alone: what is returned has the same.
        spread = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(_split(), *specs),
            out_specs=_split(*longest[-1 - out_axis :]),
            # What is left to the compiler is `model`: it follows from where the parameters lie.
            axis_names=frozenset(mesh.axis_names) - {MODEL},
            check_vma=False,
        )
        result: Result = spread(params, *arrays)
        return result

    traced.__name__ = function.__name__  # of the program, in profiles and dumps

    @cache
    def program() -> Callable[..., Result]:
        jitted: Callable[..., Result] = compiling.jit(
            traced,
            static_argnums=(0, 1),
            static_argnames=tuple(static_argnames),
            donate_argnums=tuple(3 + index for index in donated),
        )
        return jitted

    def run(definition: Any, params: Params, *arrays: Any, **static: Any) -> Result:
        read = {name: params[name] for name in reads(definition)}
        mesh, compiled, axis_of = mesh_of(read), program(), axes(*arrays)
        counted = zip(jax.tree.leaves(axis_of), jax.tree.leaves(arrays), strict=True)
        rows = next(np.shape(x)[axis] for axis, x in counted if axis != SHARED)
        if mesh is None:
            call = partial(compiled, definition, None, read, **static)
            if rows == 1 or not one_by_one():
                return call(*arrays)
            most = rows if at_once is None else at_once(definition, *arrays)
            return _each(call, axis_of, arrays, rows, out_axis, at_once=min(rows, most, cores()))
        parts = _size(mesh, DATA)
        padded = -(-rows // parts) * parts
        placed = jax.tree.map(partial(_placed, rows=rows, padded=padded, mesh=mesh), axis_of, arrays)
        drawn: Result = compiled(definition, mesh, read, *placed, **static)
        if padded == rows:
            return drawn
        # Fewer rows than devices can't be spread evenly: what is left of them lies whole on each.
        together = jax.device_put(drawn, NamedSharding(mesh, _split()))
        cut: Result = jax.tree.map(lambda x: lax.slice_in_dim(x, 0, rows, axis=out_axis), together)
        return cut

    return run


def _each(call: Callable[..., Result], axis_of: Any, arrays: Any, rows: int, out_axis: int, *, at_once: int) -> Result:
    """Call a function for every row, from as many threads: what one thread asks for, XLA does in turn."""

    def one(index: int) -> Any:
        def taken(axis: int, x: ArrayLike) -> ArrayLike:
            # JAX's arrays have a `take` of their own, which NumPy would call.
            return x if axis == SHARED else np.take(np.asarray(x), [index], axis)

        return jax.tree.map(np.asarray, call(*jax.tree.map(taken, axis_of, arrays)))

    pool = ThreadPoolExecutor(at_once)
    try:
        results = list(pool.map(one, range(rows)))
    finally:
        pool.shutdown(cancel_futures=True)
    # By NumPy, here and above: nothing is compiled for a number of rows.
    together: Result = jax.tree.map(lambda *parts: jax.device_put(np.concatenate(parts, out_axis)), *results)
    return together


def alike(axis: int, tree: Any) -> Any:
    """The same axis for every array of a tree, for `by_rows`."""
    return jax.tree.map(lambda _: axis, tree)


def _split(*axes: str | None) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def _size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    return int(mesh.shape.get(axis, 1))


def _spec(axis: int, x: ArrayLike, mesh: Mesh) -> PartitionSpec:
    """How an array is split whose rows are counted by `axis`."""
    if axis == SHARED:
        return _split()
    if axis == 0:
        return _split(DATA)
    return _split(GUIDANCE if np.shape(x)[0] == 2 == _size(mesh, GUIDANCE) else None, DATA)


def _placed(axis: int, x: ArrayLike, *, rows: int, padded: int, mesh: Mesh) -> Array:
    """Put an array where it belongs, with copies of its last row up to `padded` rows."""
    if axis != SHARED and padded != rows:
        x = jnp.take(jnp.asarray(x), np.minimum(np.arange(padded), rows - 1), axis=axis)
    placed: Array = jax.device_put(x, NamedSharding(mesh, _spec(axis, x, mesh)))
    return placed
