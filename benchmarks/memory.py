"""How much memory loading takes beside the weights, and decoding a large picture, whole and in tiles.

`python -m benchmarks.memory load --model sd-xl --dtype bfloat16`: the peak of a process that loads a folder, over the
bytes of its parameters. `python -m benchmarks.memory decode --model sd-v1-5 --size 2048`: what XLA sets aside for the
program, whole and in tiles; nothing is run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from benchmarks.folders import with_folder
from benchmarks.models import MODELS
from sdjax import compiling
from sdjax.generation import decode
from sdjax.inputs import tile_of
from sdjax.measuring import peak_bytes, resident_bytes
from sdjax.models import VAE, Definition, VAEConfig, define
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


def decoding(model: str, size: int, dtype: str) -> dict[str, dict[str, int]]:
    """Bytes that XLA sets aside to decode one picture of size x size pixels, whole and in tiles: no weights needed."""
    config = VAEConfig.from_dict(MODELS[model].vae)
    network, shapes = define(VAE, config, dtype=dtype, param_dtype=dtype)
    definition: Any = Definition(None, network, (), None, config, dtype)  # type: ignore[arg-type] (the decoder alone)
    side = size // config.factor
    latents = jax.ShapeDtypeStruct((1, side, side, config.latent_channels), jnp.float32)
    found = {}
    for name, tile in (("whole", None), ("in tiles", tile_of(definition, True, (size, size)))):
        compiled = compiling.jit(partial(decode, definition, tile=tile)).lower({"vae": shapes}, latents).compile()
        analysis = compiled.memory_analysis()
        found[name] = {"temporary_bytes": analysis.temp_size_in_bytes, "picture_bytes": analysis.output_size_in_bytes}
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
