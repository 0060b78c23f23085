"""The kind of device that a program is traced for: here, or one that is not at hand.

Everything that depends on the device is a function of a `Target`, which is part of a model's static definition. So
tracing for another device needs none, and a program for one target is never taken for another's.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import jax

Platform: TypeAlias = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        capability: the compute capability of an NVIDIA GPU, (major, minor); None for every other device.
    """

    platform: Platform
    capability: tuple[int, int] | None = None

    @property
    def rows_one_by_one(self) -> bool:
        """Whether the rows of a batch are computed one at a time: on a CPU.

        How a CPU's matrix product sums depends on its shape. So in a shared batch a row's last bits would depend on the
        other rows, and a seed would not give the same bytes alone.
        """
        return self.platform == "cpu"


CPU = Target("cpu")


@cache
def local_target() -> Target:
    """The kind of this process's default device."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return CPU
    if device.platform != "gpu":
        return Target("tpu")
    if "rocm" in device.client.platform_version.lower():
        return Target("gpu")
    major, _, minor = device.compute_capability.partition(".")
    return Target("gpu", (int(major), int(minor)))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def precision(dtype: str) -> Any:
    """Compute float32 products in float32: TPUs and recent GPUs round the factors of a product by default."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")
