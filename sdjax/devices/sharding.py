"""Several devices: build the mesh, and place arrays on it.

A mesh has three axes, any of which may have length 1:

- `data`: rows of the batch. Every device draws its own by the very program that one device alone would run, and none
  waits for another.
- `guidance`: the halves without and with the prompt. Each step's outputs are summed: one all-reduce of the latents.
- `model`: the denoiser's weights, split as in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): the first layer of
  a pair by its outputs and the second by its inputs, so that a pair costs one all-reduce of activations.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from numpy.typing import NDArray

from sdjax.errors import RequestError

DATA, GUIDANCE, MODEL = AXES = ("data", "guidance", "model")

OUTPUT, INPUT = 0, 1
"""Axes of a weight: (out, in), or (out, in, size, size)."""

SHARED = -1
"""Stands where the axis of rows would, for what all rows of a batch have in common."""


class Split(NamedTuple):
    """Parameters that are split over `model`: those whose dotted path `pattern` finds, along `axis`."""

    pattern: re.Pattern[str]
    axis: int


def make_mesh(
    devices: Sequence[jax.Device] | int | None = None, *, data: int | None = None, guidance: int = 1, model: int = 1
) -> Mesh:
    """Arrange devices in a mesh with the axes `data`, `guidance` and `model`.

    Neighbours along `model` exchange activations in every layer, so they are the nearest.

    Args:
        devices: those to use; a number takes the first ones, None all.
        data: how many parts the rows of a batch are split into; None is as many as the devices make.
        guidance: 2 gives the halves without and with the prompt a device each.
        model: how many parts the denoiser's weights are split into. A weight whose axis does not divide stays whole.
            Where heads of attention or groups of a norm do not divide, a device computes parts of one, which costs
            more communication.

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
    """Check that `make_mesh` could have built a mesh, up to axes left out.

    Raises:
        RequestError: it isn't.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise RequestError(f"a mesh may have the axes {', '.join(AXES)}, and this one has {unknown[0]!r}")
    if DATA not in mesh.axis_names:
        raise RequestError(f"a mesh must have the axis {DATA}, if only of length 1; this one has {mesh.axis_names}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise RequestError("the axes of a mesh must be of AxisType.Auto: sdjax.sharding.make_mesh builds one")
    if axis_size(mesh, GUIDANCE) > 2:
        raise RequestError(f"guidance has 2 halves, and this mesh splits them into {axis_size(mesh, GUIDANCE)}")
    return mesh


def param_sharding(
    path: Sequence[str | int], shape: Sequence[int], mesh: Mesh | AbstractMesh, splits: Sequence[Split]
) -> NamedSharding:
    """Place a parameter.

    Args:
        path: of the leaf in a pipeline's parameters: ("unet", "down_blocks", 0, ..., "to_q", "weight").
        shape: of the leaf.
        mesh: see `make_mesh`.
        splits: the parameters that are split; every other one is whole on every device.
    """
    parts = axis_size(mesh, MODEL)
    if parts > 1:
        name = ".".join(map(str, path))
        for pattern, axis in splits:
            if pattern.search(name) and shape[axis] % parts == 0:
                entries: list[str | None] = [None] * len(shape)
                entries[axis] = MODEL
                return NamedSharding(mesh, spec(*entries))
    return NamedSharding(mesh, spec())


@cache
def placer(mesh: Mesh | None, splits: tuple[Split, ...]) -> Callable[[Sequence[str | int], NDArray[Any]], Array]:
    """Make the function that places a parameter by its path: without a mesh on the default device.

    Equal arguments give the same function, so that it can be part of a cache's key.
    """

    def place(path: Sequence[str | int], array: NDArray[Any]) -> Array:
        sharding = None if mesh is None else param_sharding(path, array.shape, mesh, splits)
        placed: Array = jax.device_put(array, sharding)
        return placed

    return place


def mesh_of(params: Mapping[str, Any]) -> Mesh | None:
    """Find the mesh on which parameters lie; None where that is a single device."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def guidance_axis(params: Mapping[str, Any], halves: int) -> str | None:
    """Find the mesh axis over which `halves` of guidance are spread; None where they are together."""
    mesh = mesh_of(params)
    return GUIDANCE if mesh is not None and halves == 2 == axis_size(mesh, GUIDANCE) else None


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Count the devices along an axis: 1 for one that the mesh lacks."""
    return int(mesh.shape.get(axis, 1))


def spec(*axes: str | None) -> PartitionSpec:
    """Split the leading axes of an array over these axes of the mesh; no argument splits nothing."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def rows_spec(axis: int, x: ArrayLike, mesh: Mesh) -> PartitionSpec:
    """Split an array whose rows are along `axis`: 0, 1 behind the halves of guidance, or `SHARED`."""
    if axis == SHARED:
        return spec()
    if axis == 0:
        return spec(DATA)
    return spec(GUIDANCE if np.shape(x)[0] == 2 == axis_size(mesh, GUIDANCE) else None, DATA)


def place_rows(axis: int, x: ArrayLike, mesh: Mesh, *, rows: int, padded: int) -> Array:
    """Place an array, padded with copies of its last row to `padded` rows."""
    if axis != SHARED and padded != rows:
        x = jnp.take(jnp.asarray(x), np.minimum(np.arange(padded), rows - 1), axis=axis)
    placed: Array = jax.device_put(x, NamedSharding(mesh, rows_spec(axis, x, mesh)))
    return placed
