"""A sampler as a table: one row per network call, each row a linear update of the latents and a few remembered values.

The idea: inside a step, everything a sampler computes is a linear combination of the latents, what it remembers, the
network's output and fresh noise. So a quantity *is* its vector of coefficients, NumPy's arithmetic on these vectors
is the sampler's arithmetic, and a formula written as in its paper leaves the table's row behind:

    x0 = (X - noise * OUTPUT) / signal                 # epsilon prediction
    x_next = next_signal * x0 + next_noise * OUTPUT    # DDIM
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sdjax.schedulers.config import Float64, PredictionType
from sdjax.schedulers.spacing import Level

HISTORY = 4
"""Remembered values beside the latents. One number for all samplers, so that changing sampler changes no shape."""

Quantity: TypeAlias = Float64
"""(1 + HISTORY + 2,) coefficients over (latents, remembered values, network output, fresh noise)."""

_BASIS = np.eye(1 + HISTORY + 2)
_BASIS.setflags(write=False)

X: Quantity = _BASIS[0]
"""The latents before the call."""
MEMORY: tuple[Quantity, ...] = tuple(_BASIS[1:HISTORY])
"""What the row before chose to remember, in its order."""
DENOISED: Quantity = _BASIS[HISTORY]
"""The row before's estimate of the clean latents."""
OUTPUT: Quantity = _BASIS[HISTORY + 1]
"""The network's answer to this call."""
NOISE: Quantity = _BASIS[HISTORY + 2]
"""Fresh noise of unit variance."""


class Schedule(NamedTuple):
    """A sampler's walk, in float64 on the host. With `state` of shape (1 + HISTORY, *latents.shape), row i does

        output = network(input_scale[i] * state[0], timesteps[i])
        state = A[i] @ state + B[i] * output + C[i] * noise

    `state[0]` are the latents and `state[-1]`, after a row, the sampler's estimate of the clean latents. Start with
    `state[1:]` zero; what is remembered from before the first row is weighed with 0, so it only has to be finite.
    The arrays are read-only.

    Shapes: timesteps, input_scale, step (rows,); A (rows, 1 + HISTORY, 1 + HISTORY); B, C (rows, 1 + HISTORY);
    signal, noise (rows + 1,); init_noise ().
    """

    timesteps: Float64
    """What the network is told; may be fractional."""
    input_scale: Float64
    A: Float64
    B: Float64
    C: Float64
    signal: Float64
    """Before row i (and after the last) the latents are distributed as signal[i] * x0 + noise[i] * eps."""
    noise: Float64
    init_noise: float
    """Pure start noise of unit variance is multiplied by this."""
    step: NDArray[np.int64]
    """The user's step that each row belongs to; some samplers call the network twice in a step."""

    def first_row(self, step: int) -> int:
        """The row where a step begins: where image-to-image enters the table."""
        return int(np.searchsorted(self.step, step))


class Row(NamedTuple):
    """One network call: where it is made, and the new latents, x0 and memory as combinations of the old."""

    step: int
    timestep: float
    level: Level
    x: Quantity
    denoised: Quantity
    remember: tuple[Quantity, ...] = ()


def lay_out(rows: Sequence[Row], end: Level, *, init_noise: float = 1.0) -> Schedule:
    """Gather rows into a table.

    Args:
        rows: in the order of the calls.
        end: the level of the latents after the last row.
        init_noise: what unit-variance noise is multiplied by to start at the first row.
    """
    update = np.zeros((len(rows), 1 + HISTORY, len(_BASIS)))
    for i, row in enumerate(rows):
        update[i, 0] = row.x
        update[i, 1 : 1 + len(row.remember)] = np.reshape(row.remember, (-1, len(_BASIS)))
        update[i, HISTORY] = row.denoised
    if end.noise == 0:  # what lands on the clean level is the estimate of the clean latents
        update[-1, HISTORY] = update[-1, 0]
    signal = np.array([*(row.level.signal for row in rows), end.signal], np.float64)
    noise = np.array([*(row.level.noise for row in rows), end.noise], np.float64)
    schedule = Schedule(
        timesteps=np.array([row.timestep for row in rows], np.float64),
        # Networks are trained on inputs of unit variance (for data of unit variance).
        input_scale=1 / np.hypot(signal, noise)[:-1],
        A=update[:, :, : 1 + HISTORY],
        B=update[:, :, 1 + HISTORY],
        C=update[:, :, 2 + HISTORY],
        signal=signal,
        noise=noise,
        init_noise=np.float64(init_noise),
        step=np.array([row.step for row in rows], np.int64),
    )
    for field in (schedule.timesteps, schedule.input_scale, update, *schedule[2:7], schedule.step):
        field.setflags(write=False)
    return schedule


def combine(weights: Sequence[float] | Float64, quantities: Sequence[Quantity]) -> Quantity:
    """Weighted sum; quantities beyond the last weight are left out."""
    return sum((w * q for w, q in zip(weights, quantities, strict=False)), start=0 * X)


def predicted_x0(prediction_type: PredictionType, level: Level, x: Quantity = X, output: Quantity = OUTPUT) -> Quantity:
    """The clean latents that a network's output means, for latents x at a level.

    v-prediction (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512, section 4) is defined for variance-preserving
    latents; `size` brings others there.
    """
    signal, noise = level
    if prediction_type == "epsilon":
        return (x - noise * output) / signal
    if prediction_type == "sample":
        return output
    size = math.hypot(signal, noise)
    return (signal * x / size - noise * output) / size


def implied_noise(x0: Quantity, level: Level, x: Quantity = X) -> Quantity:
    """The noise that is in x if the picture in it is x0."""
    return (x - level.signal * x0) / level.noise
