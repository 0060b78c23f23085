"""Kernels in C++ for the training on a CPU: built when they are first asked for, and registered with XLA.

They need a processor with AMX's bfloat16 instructions and a C++ compiler; without these `available` is false, and the
training runs on XLA's own operations, several times slower.
"""

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax

SOURCES = [str(Path(__file__).parent / name) for name in ("products.cc", "norms.cc")]
COMPILER = ("g++", "-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
TARGETS = {
    "sdjax_convolve": "SdjaxConvolve",
    "sdjax_kernel_gradient": "SdjaxKernelGradient",
    "sdjax_normalise": "SdjaxNormalise",
    "sdjax_normalise_gradient": "SdjaxNormaliseGradient",
}
"""XLA's name of each kernel, and its symbol."""


@cache
def available() -> bool:
    """Whether this processor has the instructions and the kernels could be built; registers them."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    if jax.default_backend() != "cpu" or not {"amx_bf16", "avx512_bf16"} <= set(flags.split()):
        return False
    library = Path(tempfile.mkdtemp(prefix="sdjax-kernels-")) / "kernels.so"
    try:
        subprocess.run([*COMPILER, f"-I{jax.ffi.include_dir()}", *SOURCES, "-o", str(library)], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return False
    kernels = ctypes.CDLL(str(library))
    if not kernels.sdjax_allow_tiles():
        return False
    for name, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(kernels, symbol)), platform="cpu")
    return True
