"""Functions of a batch, row by row where the device wants it so, in threads, and over a mesh.

On a CPU each row is computed by itself (see `Target.rows_one_by_one`): within a program one after the other
(`one_at_a_time`), and by `jit_rows` in calls of their own, which run beside each other.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from sdjax.devices import programs
from sdjax.devices.sharding import DATA, MODEL, SHARED, axis_size, mesh_of, place_rows, rows_spec, spec
from sdjax.devices.target import Target, cores

Result = TypeVar("Result")


class HasTarget(Protocol):
    """A static definition, hashable."""

    @property
    def target(self) -> Target:
        """The kind of device that its programs are traced for."""


def one_at_a_time(function: Callable[[Any], Any], rows: Any, target: Target, at_once: int | None = None) -> Any:
    """Apply a function of a batch, inside a program: to one row at a time on a CPU.

    Args:
        function: of a tree of arrays with a leading batch axis, to the like.
        rows: its argument.
        target: the kind of device.
        at_once: rows that a call may take elsewhere, where memory sets a bound; None is all.
    """
    batch = jax.tree.leaves(rows)[0].shape[0]
    if not target.rows_one_by_one and (at_once is None or batch <= at_once):
        return function(rows)

    def one(row: Any) -> Any:
        return jax.tree.map(lambda x: x[0], function(jax.tree.map(lambda x: x[None], row)))

    return lax.map(one, rows, batch_size=None if target.rows_one_by_one else at_once)


def jit_rows(
    function: Callable[..., Result],
    axes: Callable[..., tuple[Any, ...]],
    *,
    reads: Callable[[Any], Iterable[str]],
    out_axis: int = 0,
    at_once: Callable[..., int] | None = None,
    static_argnames: tuple[str, ...] = (),
    donated: tuple[int, ...] = (),
) -> Callable[..., Result]:
    """Compile a function of (definition, params, *arrays) that treats the rows of a batch independently.

    With parameters on one device it is `programs.jit(function)`. On a CPU each row is a call, so that one program
    serves any number of rows, and calls that leave cores idle run beside each other. On a mesh each device along `data`
    runs the function on its own rows, with as many turns of its loops as they need; a batch that does not divide is
    padded with copies of its last row, and the padding is dropped from the result.

    Args:
        function: returns arrays, or trees of them.
        axes: gives, for the arrays, trees like theirs of the axis along which the rows are: 0, 1 where guidance comes
            first, or `SHARED` for what all rows have in common.
        reads: gives, for the definition, the names in `params` that the function reads. A call takes time for every
            parameter that it is given.
        out_axis: the axis along which the rows are in all that is returned.
        at_once: gives, for (definition, *arrays), the rows that may hold memory at one time where each is a call of its
            own; None is any number.
        static_argnames: keyword arguments that are part of the program.
        donated: which of the arrays may be overwritten, counted from 0.
    """

    def traced(definition: Any, mesh: Mesh | None, params: Mapping[str, Any], *arrays: Any, **static: Any) -> Result:
        call = partial(function, definition, **static)
        if mesh is None:
            return call(params, *arrays)
        specs = jax.tree.map(partial(rows_spec, mesh=mesh), axes(*arrays), arrays)
        longest = max(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)), key=len)
        # How guidance and rows are split, or rows alone: the result has the same.
        spread = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(spec(), *specs),
            out_specs=spec(*longest[-1 - out_axis :]),
            # `model` is left to the compiler: it follows from where the parameters lie.
            axis_names=frozenset(mesh.axis_names) - {MODEL},
            check_vma=False,
        )
        result: Result = spread(params, *arrays)
        return result

    traced.__name__ = function.__name__  # the program's name in profiles and dumps

    @cache
    def program(target: Target) -> Callable[..., Result]:
        jitted: Callable[..., Result] = programs.jit(
            traced,
            target=target,
            static_argnums=(0, 1),
            static_argnames=static_argnames,
            donate_argnums=tuple(3 + index for index in donated),
        )
        return jitted

    def run(definition: HasTarget, params: Mapping[str, Any], *arrays: Any, **static: Any) -> Result:
        read = {name: params[name] for name in reads(definition)}
        mesh, compiled, axis_of = mesh_of(read), program(definition.target), axes(*arrays)
        counted = zip(jax.tree.leaves(axis_of), jax.tree.leaves(arrays), strict=True)
        rows = next(np.shape(x)[axis] for axis, x in counted if axis != SHARED)
        if mesh is None:
            call = partial(compiled, definition, None, read, **static)
            if rows == 1 or not definition.target.rows_one_by_one:
                return call(*arrays)
            most = rows if at_once is None else at_once(definition, *arrays)
            return _each(call, axis_of, arrays, rows, out_axis, at_once=min(rows, most, cores()))
        parts = axis_size(mesh, DATA)
        padded = -(-rows // parts) * parts
        placed = jax.tree.map(partial(place_rows, mesh=mesh, rows=rows, padded=padded), axis_of, arrays)
        drawn: Result = compiled(definition, mesh, read, *placed, **static)
        if padded == rows:
            return drawn
        # Fewer rows than devices can't be spread evenly: the rest lies whole on each.
        together = jax.device_put(drawn, NamedSharding(mesh, spec()))
        cut: Result = jax.tree.map(lambda x: lax.slice_in_dim(x, 0, rows, axis=out_axis), together)
        return cut

    return run


def _each(call: Callable[..., Result], axis_of: Any, arrays: Any, rows: int, out_axis: int, *, at_once: int) -> Result:
    """Call a function for every row, in threads: calls from one thread would run one after the other."""

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
    # NumPy here and above: nothing is compiled for a number of rows.
    together: Result = jax.tree.map(lambda *parts: jax.device_put(np.concatenate(parts, out_axis)), *results)
    return together


def alike(axis: int, tree: Any) -> Any:
    """Give every array of a tree the same axis, for `jit_rows`."""
    return jax.tree.map(lambda _: axis, tree)
