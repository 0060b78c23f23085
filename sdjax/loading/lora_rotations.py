"""Adapters that rotate a weight: OFT and BOFT, of LyCORIS and sd-scripts by outputs, of peft by inputs.

Each is a `lora_kinds.Kind`. LyCORIS's are not linear in the adapter's weight, and follow it there.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike


class Rotation(NamedTuple):
    """OFT (Qiu et al. 2023, arXiv 2306.07280): the outputs rotated, block by block.

    With weight w that is `rescale` (I + w (R' - I)) W, R the `rotations` (blocks, size, size) and R' their transpose;
    `rescale` (out, 1, ...) multiplies outputs, or is None.
    """

    rotations: ArrayLike
    rescale: ArrayLike | None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        blocks, size, _ = np.shape(self.rotations)
        return blocks * size == shape[0] and _rescales(self.rescale, shape)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        rotations = jnp.asarray(self.rotations, jnp.float32)
        blocks, size, _ = rotations.shape
        turned = rotations - jnp.eye(size)
        inside = weight.reshape(blocks, size, -1)
        added = jnp.einsum("knm,kni->kmi", turned, inside, precision=lax.Precision.HIGHEST)
        return _rescaled(weight + scale * added.reshape(weight.shape), self.rescale) - weight


class Butterfly(NamedTuple):
    """BOFT (Liu et al. 2023, arXiv 2311.06243): one rotation after another, over ever wider strides of the outputs.

    `rotations` are (stages, blocks, size, size). The adapter's weight goes from the identity to each; `rescale` as in
    `Rotation`.
    """

    rotations: ArrayLike
    rescale: ArrayLike | None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        stages, blocks, size, _ = np.shape(self.rotations)
        widest = size * 2 ** (stages - 1)
        fitting = blocks * size == shape[0] and size % 2 == 0 and shape[0] % widest == 0
        return fitting and _rescales(self.rescale, shape)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        rotations = jnp.asarray(self.rotations, jnp.float32)
        _, blocks, size, _ = rotations.shape
        x = weight.reshape(weight.shape[0], -1)
        for stage, rotation in enumerate(rotations):
            stride = 2**stage * size // 2
            gathered = x.reshape(-1, 2, stride, x.shape[1]).swapaxes(1, 2).reshape(blocks, size, -1)
            turned = scale * rotation + (1 - scale) * jnp.eye(size)
            gathered = jnp.einsum("bij,bjn->bin", turned, gathered, precision=lax.Precision.HIGHEST)
            x = gathered.reshape(-1, stride, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        return _rescaled(x.reshape(weight.shape), self.rescale) - weight


class InputRotation(NamedTuple):
    """OFT and BOFT of peft: the inputs rotated, block by block: `rescale` W R, a kernel's window counting as inputs."""

    rotations: ArrayLike
    rescale: ArrayLike | None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `Kind`."""
        blocks, size, _ = np.shape(self.rotations)
        return len(shape) > 1 and blocks * size == math.prod(shape[1:]) and _rescales(self.rescale, shape)

    def delta(self, weight: Array, scale: Array) -> Array:
        """See `Kind`."""
        rotations = jnp.asarray(self.rotations, jnp.float32)
        blocks, size, _ = rotations.shape
        inside = weight.reshape(weight.shape[0], blocks, size)
        turned = jnp.einsum("obc,bkc->obk", inside, rotations, precision=lax.Precision.HIGHEST)
        return scale * (_rescaled(turned.reshape(weight.shape), self.rescale) - weight)


def cayley(generators: Any, constraint: float) -> Any:
    """The rotations (I + Q) (I - Q)^-1 of generators G (..., size, size), with Q = G - G', in float64.

    Args:
        generators: what a file holds.
        constraint: the largest norm of all of Q together; 0 is none.
    """
    skew = np.asarray(generators, np.float64)
    skew = skew - skew.swapaxes(-1, -2)
    norm = np.linalg.norm(skew)
    if 0 < constraint < norm:
        skew *= constraint / norm
    identity = np.eye(skew.shape[-1])
    return (identity + skew) @ np.linalg.inv(identity - skew)


def peft_oft_rotations(vectors: Any, size: int, *, largest_norm: float | None, neumann_terms: int | None) -> Any:
    """The rotations of peft's OFT, in float64.

    Args:
        vectors: (blocks, size (size - 1) / 2), what is above the diagonals of skew-symmetric Q.
        size: of a block.
        largest_norm: of each block's Q (COFT); None is no limit.
        neumann_terms: of the series that peft computes in place of (I - Q) (I + Q)^-1; None computes that itself.
    """
    skew = np.zeros((len(vectors), size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = vectors
    skew -= skew.swapaxes(1, 2)
    if largest_norm is not None:
        norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew *= np.where(norms > largest_norm, largest_norm / np.maximum(norms, 1e-300), 1.0)
    identity = np.eye(size)
    if neumann_terms is None:
        return (identity - skew) @ np.linalg.inv(identity + skew)
    # The series of (I + Q) (I - Q)^-1 is I + 2 Q + 2 Q^2 + ...; from Q^3 on peft counts the last power once.
    last = max(neumann_terms - 1, 3) if neumann_terms > 2 else neumann_terms - 1
    rotations, power = np.broadcast_to(identity, skew.shape).copy(), identity
    for exponent in range(1, last + 1):
        power = power @ skew
        rotations += power if exponent == last and exponent > 2 else 2 * power
    return rotations


def _rescales(rescale: ArrayLike | None, shape: tuple[int, ...]) -> bool:
    return rescale is None or np.size(rescale) == shape[0]


def _rescaled(weight: Array, rescale: ArrayLike | None) -> Array:
    if rescale is None:
        return weight
    factors = jnp.asarray(rescale).astype(jnp.float32)
    return weight * factors.reshape(-1, *(1,) * (weight.ndim - 1))
