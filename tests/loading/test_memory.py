"""Loading takes little more memory than the parameters do, in either layout.

Measured in a process of its own: the peak of its resident memory over what it held before, against the bytes of the
parameters. Other programs can't move that number.
"""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import ml_dtypes  # noqa: F401 (NumPy knows bfloat16 by it)
import numpy as np
import pytest
from originals import FAMILIES, original, pipeline
from safetensors.torch import save_file

LIMIT = 1.3
PARAMETERS = 70 * 10**6

MEASURE = """
import json, sys
from pathlib import Path
import jax
import sdjax
from sdjax.loading import load
from sdjax.pipeline import BUNDLED_FOLDER

def peak():
    # Not getrusage: its peak is inherited from the process that started this one.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

load(BUNDLED_FOLDER, dtype="float32")  # what is imported and allocated once is not the checkpoint's
before = peak()
params = load(sys.argv[1], dtype=sys.argv[2]).params
jax.block_until_ready(params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"grown": peak() - before, "size": size}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of some 300 MB in both layouts."""
    folder = tmp_path_factory.mktemp("large")
    pipe = pipeline("sd1")
    pipe.unet = diffusers.UNet2DConditionModel(**{**FAMILIES["sd1"].unet, "block_out_channels": (256, 512)})
    pipe.save_pretrained(folder / "folder")
    save_file(original("sd1", pipe), folder / "file.safetensors")
    return {"folder": folder / "folder", "file": folder / "file.safetensors"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux' /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_peak_memory_is_little_more_than_the_parameters(layout, dtype, checkpoints):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoints[layout]), dtype],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    print(measured["grown"] / measured["size"])
    # The lower bound guards the measurement itself: parameters that are there must have been seen.
    assert 0.9 * measured["size"] <= measured["grown"] <= LIMIT * measured["size"], measured
    assert measured["size"] > PARAMETERS * np.dtype(dtype).itemsize
