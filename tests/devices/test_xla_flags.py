"""XLA's flags: set where the user has not, known to the installed release, and drawing the same up to rounding."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sdjax import xla_flags
from sdjax.devices.xla_flags import CPU_FLAGS, GPU_FLAGS, flags_for, merged

OF_CPU, OF_GPU = ([f"{name}={value}" for name, value in flags.items()] for flags in (CPU_FLAGS, GPU_FLAGS))


@pytest.mark.parametrize(
    ("given", "ours", "flags"),
    [
        ("", GPU_FLAGS, OF_GPU),
        ("", {}, []),
        ("--xla_dump_to=/tmp/x", {}, ["--xla_dump_to=/tmp/x"]),
        ("--xla_dump_to=/tmp/x", GPU_FLAGS, [*OF_GPU, "--xla_dump_to=/tmp/x"]),
        ("--xla_gpu_triton_gemm_any=false", GPU_FLAGS, [OF_GPU[1], "--xla_gpu_triton_gemm_any=false"]),
        (" ".join(OF_GPU), GPU_FLAGS, OF_GPU),
        ("--xla_backend_extra_options=x", CPU_FLAGS, ["--xla_backend_extra_options=x"]),
    ],
)
def test_flags_that_the_user_sets_win(given, ours, flags):
    assert merged(given, ours).split() == flags


@pytest.mark.parametrize(
    ("plugins", "flags"),
    [([], CPU_FLAGS), (["jax-cuda12-plugin"], GPU_FLAGS), (["jax-cuda13-plugin"], GPU_FLAGS), (["libtpu"], {})],
)
def test_every_backend_has_its_own(plugins, flags):
    assert flags_for(plugins) == flags


def test_they_are_in_the_environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    monkeypatch.setattr(xla_flags, "_installed_plugins", lambda: ["jax-cuda12-plugin"])
    xla_flags.set_flags()
    assert os.environ["XLA_FLAGS"].split() == [*OF_GPU, "--xla_dump_to=/tmp/x"]


def test_the_installed_release_knows_them():
    # An unknown flag ends the process.
    run("import jax; jax.devices()", " ".join([*OF_CPU, *OF_GPU]))


def test_those_for_a_cpu_change_a_picture_by_rounding_alone(tmp_path):
    drawn = []
    for i, flags in enumerate(["", *OF_CPU]):
        path = tmp_path / f"{i}.npy"
        draw = "sdjax.Pipeline.from_pretrained()('a red circle', seed=1, steps=4, output='latents').images"
        run(f"import numpy, sdjax; numpy.save({str(path)!r}, {draw})", flags)
        drawn.append(np.load(path))
    plain, flagged = drawn
    np.testing.assert_allclose(flagged, plain, atol=2e-5)
    assert np.abs(plain).max() > 1


def run(program, flags):
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
