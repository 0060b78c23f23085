"""Programs of the package: what XLA plans for them in memory, and what compiling leaves behind."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sdjax.devices import programs
from sdjax.models import VAE, VAEConfig, bind, define

ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are a CPU's")


@ON_CPU
def test_a_decoder_keeps_few_feature_maps_at_once():
    # Half as many levels as Stable Diffusion has, of channels enough for Winograd's forms; nothing is run.
    config = VAEConfig(block_out_channels=(256, 256), layers_per_block=2)
    network, shapes = define(VAE, config, dtype="float32", param_dtype="float32")
    latents = jax.ShapeDtypeStruct((1, 32, 32, config.latent_channels), jnp.float32)

    def function(params, latents):
        return bind(network, params).decode(latents)

    planned, usual = (
        jit(function).lower(shapes, latents).compile().memory_analysis().temp_size_in_bytes
        for jit in (programs.jit, jax.jit)
    )
    assert planned < usual


def test_options_and_giving_back_change_no_number():
    x = jnp.linspace(-1, 1, 4096).reshape(64, 64)

    def function(x):
        return jnp.tanh(x @ x).sum(0)

    expected = jax.jit(function)(x)
    programs.give_back_freed()
    assert (programs.jit(function)(x) == expected).all()
    assert (x == jnp.linspace(-1, 1, 4096).reshape(64, 64)).all()


def test_what_was_freed_is_given_back():
    # In a process of its own: small pieces, some of which stay, so that the heap can't just become shorter.
    script = """
import ctypes, sys
from sdjax.devices import programs
from sdjax.measuring import resident_bytes
if programs._malloc_trim() is None:
    sys.exit("no glibc")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = []
for _ in range(2000):
    pieces.append(libc.malloc(65536))
    ctypes.memset(pieces[-1], 1, 65536)
full = resident_bytes()
for i, piece in enumerate(pieces):
    if i % 8 != 7:
        libc.free(ctypes.c_void_p(piece))
freed = resident_bytes()
programs.give_back_freed()
print(full - freed, full - resident_bytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(Path(programs.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    if "no glibc" in done.stderr:
        pytest.skip("the C library is another one")
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before < 10 * 2**20 < 90 * 2**20 < after


def test_a_library_that_cannot_give_back_is_left_alone(monkeypatch):
    monkeypatch.setattr(programs, "_malloc_trim", lambda: None)
    programs.give_back_freed()


@pytest.mark.parametrize("error", [TypeError, OSError])
def test_a_system_without_the_c_library_is_left_alone(monkeypatch, error):
    def missing(_):
        raise error

    monkeypatch.setattr(programs.ctypes, "CDLL", missing)
    assert programs._malloc_trim.__wrapped__() is None


def test_long_compiling_is_followed_by_giving_back(monkeypatch):
    given = []
    monkeypatch.setattr(programs, "give_back_freed", lambda: given.append(True))
    monkeypatch.setattr(programs, "LONG", 0.0)
    programs.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7))
    assert given
    count = len(given)
    monkeypatch.setattr(programs, "LONG", 1e9)
    programs.jit(lambda x: jnp.cos(x) * 3)(jnp.ones(7))
    assert len(given) == count
