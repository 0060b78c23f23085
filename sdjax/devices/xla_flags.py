"""XLA's flags that help: set before JAX starts, and only where the user has not.

They are in `XLA_FLAGS`, where anyone can see them (`sdjax version` prints it); whoever sets one there keeps their own.
A program that uses the library sets its own, or calls `set_flags` before anything asks JAX for a device.
"""

import importlib.metadata
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType

CPU_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        # What is read by several results is read once, and a function that is called twice is fused once. Compiling
        # takes a third less time and memory, programs run as fast; results differ in the last bit.
        "--xla_backend_extra_options": "xla_cpu_use_multi_output_fusion,xla_cpu_flatten_after_fusion",
    }
)
GPU_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        # A matrix product of any shape may be fused with what is around it (https://docs.jax.dev/en/latest/gpu_performance_tips.html).
        "--xla_gpu_triton_gemm_any": "true",
        # Several GPUs: sums over them go on beside other work (the same page).
        "--xla_gpu_enable_latency_hiding_scheduler": "true",
    }
)
OF_PLUGINS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"jax-cuda13-plugin": GPU_FLAGS, "jax-cuda12-plugin": GPU_FLAGS, "libtpu": MappingProxyType({})}
)
"""By the distribution with which JAX runs on an accelerator. An unknown flag ends a process, so none is set elsewhere
than where it is known."""


def merged(given: str, flags: Mapping[str, str]) -> str:
    """The flags to run with: those that are given, and before them those of ours that they don't name."""
    named = {flag.partition("=")[0] for flag in given.split()}
    ours = [f"{name}={value}" for name, value in flags.items() if name not in named]
    return " ".join([*ours, *([given] if given else [])])


def set_flags() -> None:
    """Put the flags into the environment; without effect once JAX has asked for its devices."""
    if flags := merged(os.environ.get("XLA_FLAGS", ""), flags_for(_installed_plugins())):
        os.environ["XLA_FLAGS"] = flags


def flags_for(plugins: Iterable[str]) -> Mapping[str, str]:
    """The flags that help where these distributions are installed, of `OF_PLUGINS`."""
    return next((OF_PLUGINS[plugin] for plugin in plugins), CPU_FLAGS)


def _installed_plugins() -> list[str]:
    found = []
    for plugin in OF_PLUGINS:
        try:
            importlib.metadata.version(plugin)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(plugin)
    return found
