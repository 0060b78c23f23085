"""XLA's flags for GPUs: set where the user has not, and known to the installed release."""

import os
import subprocess
import sys

import pytest

from sdjax import xla_flags
from sdjax.xla_flags import GPU_FLAGS, merged

OURS = [f"{name}={value}" for name, value in GPU_FLAGS.items()]


@pytest.mark.parametrize(
    ("given", "has_cuda", "flags"),
    [
        ("", True, OURS),
        ("", False, []),
        ("--xla_dump_to=/tmp/x", False, ["--xla_dump_to=/tmp/x"]),
        ("--xla_dump_to=/tmp/x", True, [*OURS, "--xla_dump_to=/tmp/x"]),
        ("--xla_gpu_triton_gemm_any=false", True, [OURS[1], "--xla_gpu_triton_gemm_any=false"]),
        (" ".join(OURS), True, OURS),
    ],
)
def test_flags_that_the_user_sets_win(given, has_cuda, flags):
    assert merged(given, has_cuda=has_cuda).split() == flags


def test_they_are_in_the_environment_where_jax_runs_on_nvidia_gpus(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    monkeypatch.setattr(xla_flags, "_has_cuda", lambda: True)
    xla_flags.set_flags()
    assert os.environ["XLA_FLAGS"].split() == [*OURS, "--xla_dump_to=/tmp/x"]


def test_the_installed_release_knows_them():
    # An unknown flag ends the process.
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": " ".join(OURS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
