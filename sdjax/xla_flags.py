"""XLA's flags that help on NVIDIA GPUs: set before JAX starts, and only where the user has not.

They are in `XLA_FLAGS`, where anyone can see them (`sdjax version` prints it); whoever sets one there keeps their own.
A program that uses the library sets its own, or calls `set_flags` before anything asks JAX for a device.
"""

import importlib.metadata
import os

GPU_FLAGS = {
    # A matrix product of any shape may be fused with what is around it (https://docs.jax.dev/en/latest/gpu_performance_tips.html).
    "--xla_gpu_triton_gemm_any": "true",
    # Several GPUs: sums over them go on beside other work (the same page).
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
}
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
"""Distributions with which JAX runs on NVIDIA GPUs. An unknown flag ends a process, so others are left alone."""


def merged(given: str, *, has_cuda: bool) -> str:
    """The flags to run with: those that are given, and before them those of ours that they don't name."""
    if not has_cuda:
        return given
    named = {flag.partition("=")[0] for flag in given.split()}
    ours = [f"{name}={value}" for name, value in GPU_FLAGS.items() if name not in named]
    return " ".join([*ours, *([given] if given else [])])


def set_flags() -> None:
    """Put the flags into the environment; without effect once JAX has asked for its devices."""
    flags = merged(os.environ.get("XLA_FLAGS", ""), has_cuda=_has_cuda())
    if flags:
        os.environ["XLA_FLAGS"] = flags


def _has_cuda() -> bool:
    for plugin in CUDA_PLUGINS:
        try:
            importlib.metadata.version(plugin)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False
