"""How much memory loading takes beside the weights, and decoding a large picture, whole and in tiles.

`python -m benchmarks.memory load --model sd-xl --dtype bfloat16`: the peak of a process that loads a folder, over the
bytes of its parameters. `python -m benchmarks.memory decode --model sd-v1-5 --size 2048`: what XLA sets aside for the
program, whole and in tiles, and what the process then takes, beyond the parameters, to decode a picture.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import random_values
from benchmarks.cases import Case
from benchmarks.folders import with_folder
from benchmarks.models import MODELS
from benchmarks.sides.ours import build
from sdjax.devices import programs
from sdjax.devices.xla_flags import set_flags
from sdjax.generation import decode
from sdjax.inputs import tile_of
from sdjax.measuring import forget_peak, peak_bytes, resident_bytes, timed
from sdjax.pipeline import BUNDLED_FOLDER, Pipeline


def load(folder: str | Path, dtype: str, weights: str | None) -> dict[str, int]:
    """Load a folder in this process: bytes of the parameters, and the peak beyond what was there before.

    On a CPU the parameters are part of that peak, elsewhere they lie on the device.
    """
    Pipeline.from_pretrained(dtype=dtype, weights=weights)  # what is imported and made once is not the checkpoint's
    before = resident_bytes()
    params = jax.block_until_ready(Pipeline.from_pretrained(folder, dtype=dtype, weights=weights).params)
    return {
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "peak_bytes": peak_bytes() - before,
    }


def decoding(model: str, size: int, dtype: str) -> dict[str, dict[str, float]]:
    """Decode a picture of size x size pixels, whole and in tiles: what XLA sets aside, and what the process takes.

    The peak counts from what it holds with parameters and program before, and has the picture in it.
    """
    definition, params = build(Case("vae-decode", model, dtype=dtype), "vae")
    side = size // definition.vae_config.factor
    latents = jnp.asarray(random_values.normal((1, side, side, definition.vae_config.latent_channels)))
    found = {}
    for name, tile in (("whole", None), ("in tiles", tile_of(definition, True, (size, size)))):
        compiled = programs.jit(partial(decode, definition, tile=tile)).lower(params, latents).compile()
        programs.give_back_freed()
        analysis, before = compiled.memory_analysis(), resident_bytes()
        forget_peak()
        run = timed(lambda decoded=compiled: jax.block_until_ready(decoded(params, latents)))
        found[name] = {
            "temporary_bytes": analysis.temp_size_in_bytes,
            "picture_bytes": analysis.output_size_in_bytes,
            "peak_bytes": peak_bytes() - before,
            "seconds": run.seconds,
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what was found as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("load", "decode"))
    parser.add_argument("--model", choices=MODELS, default="bundled")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--weights", choices=("int8",), help="load as Pipeline.from_pretrained(weights=...) does")
    parser.add_argument("--size", type=int, default=2048, help="pixels along a side of the picture to decode")
    parser.add_argument("--folder", type=Path, help="load this one instead of writing one")
    options = parser.parse_args(arguments)
    set_flags()
    if options.what == "decode":
        print(json.dumps(decoding(options.model, options.size, options.dtype)))
    elif options.folder or options.model == "bundled":
        print(json.dumps(load(options.folder or BUNDLED_FOLDER, options.dtype, options.weights)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            case = with_folder(Case("load", options.model, dtype=options.dtype), Path(scratch))
            if case.folder is None:
                parser.error("diffusers, which writes the folder, is absent")
            # A process of its own: this one may have inherited a peak from whoever started it.
            more = ["--weights", options.weights] if options.weights else []
            command = [sys.executable, "-m", "benchmarks.memory", "load", "--folder", case.folder]
            subprocess.run([*command, "--dtype", options.dtype, *more], check=True)


if __name__ == "__main__":
    main()
