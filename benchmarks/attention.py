"""The kernels of attention beside each other: `python -m benchmarks.attention`, at the sizes of published models."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.devices.target import Target, local_target
from sdjax.measuring import summary, timed
from sdjax.models.kernels import attend, forms_for
from sdjax.models.kernels.attention import Library, attention

SHAPES = {
    "SD 1.5, 64 x 64": (2, 4096, 4096, 8, 40),
    "SD 1.5, 32 x 32": (2, 1024, 1024, 8, 80),
    "SD 1.5, 16 x 16": (2, 256, 256, 8, 160),
    "SD 1.5, text": (2, 4096, 77, 8, 40),
    "SDXL, 64 x 64": (2, 4096, 4096, 10, 64),
    "SDXL, 32 x 32": (2, 1024, 1024, 20, 64),
    "VAE, 64 x 64": (1, 4096, 4096, 1, 512),
}
"""(batch, queries, keys, heads, channels)."""
SMALL = {"SD 1.5, 16 x 16": SHAPES["SD 1.5, 16 x 16"]}
"""What a CPU does in no time."""


def measure(shape: tuple[int, int, int, int, int], dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds of each kernel that this device has for a shape, and of what the models use."""
    batch, queries, keys, heads, channels = shape
    random = np.random.default_rng(0)

    def normal(tokens: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((batch, tokens, heads, channels), np.float32), dtype)

    arrays = normal(queries), normal(keys), normal(keys)
    ways = {
        "the models'": partial(attend, forms_for(local_target())),
        "cudnn": partial(attention, form=Library("cudnn")),
        "xla": partial(attention, form=Library("xla")),
    }
    measured: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            compiled = jax.jit(way).lower(*arrays).compile()
            jax.block_until_ready(compiled(*arrays))
        except Exception as error:
            # Whatever a backend raises for what it lacks: that is the finding.
            measured[name] = {"skipped": str(error).splitlines()[0][:120] if str(error) else type(error).__name__}
            continue
        seconds = [timed(lambda c=compiled: jax.block_until_ready(c(*arrays))).seconds for _ in range(repeats)]
        flops = 4 * batch * heads * queries * keys * channels
        measured[name] = {**summary(seconds)._asdict(), "flops_per_second": flops / summary(seconds).seconds}
    return measured


def choices(shape: tuple[int, int, int, int, int]) -> list[str]:
    """What is chosen on the generations of GPUs that there are, for a reader to hold against the times."""
    _, queries, keys, _, channels = shape
    sizes = {"queries": queries, "keys": keys, "channels": channels, "dtype": "bfloat16", "causal": False}
    forms = {number: forms_for(Target("gpu", (number, 0))).attention(**sizes) for number in (8, 9)}
    return [f"{number}.x {form.implementation}" for number, form in forms.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every shape; a line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="gpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if jax.default_backend() != options.device:
        parser.error(f"JAX runs on {jax.default_backend()} here, not on {options.device}")
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    results = []
    for name, shape in (SMALL if options.device == "cpu" else SHAPES).items():
        measured = measure(shape, dtype, options.repeats)
        results.append({"name": name, "shape": shape, "dtype": dtype, "kernels": measured})
        told = [
            f"{kernel}: {found.get('skipped') or format(1000 * found['seconds'], '.3g') + ' ms'}"
            for kernel, found in measured.items()
        ]
        print(f"attention {name}: {', '.join(told)}; to be chosen: {', '.join(choices(shape))}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
