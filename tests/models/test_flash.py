"""Attention on accelerators: the choice of the kernel is a function of numbers, so it is checked without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import flash
from sdjax.models.attention import attention
from sdjax.models.flash import Kernel, choose, padding, run

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "dtype", "tokens", "channels", "kernel"),
    [
        (HOPPER, "bfloat16", 4096, 40, Kernel.CUDNN),  # SD 1.5 at 512 x 512
        (HOPPER, "float16", 1024, 80, Kernel.CUDNN),
        (HOPPER, "bfloat16", 256, 160, Kernel.CUDNN),
        (AMPERE, "bfloat16", 256, 160, Kernel.XLA),  # wider than it takes
        (AMPERE, "bfloat16", 4096, 64, Kernel.CUDNN),  # SD 2, SDXL
        ((12, 0), "bfloat16", 4096, 64, Kernel.CUDNN),
        (HOPPER, "bfloat16", 4096, 42, Kernel.CUDNN),  # padded to 48
        (AMPERE, "bfloat16", 4096, 127, Kernel.CUDNN),
        (HOPPER, "bfloat16", 4096, 512, Kernel.XLA),  # the autoencoder's one head
        (HOPPER, "float32", 4096, 64, Kernel.XLA),
        (TURING, "float16", 4096, 64, Kernel.XLA),
        (HOPPER, "bfloat16", 77, 64, Kernel.XLA),  # a text encoder
        (None, "bfloat16", 4096, 64, Kernel.XLA),  # a TPU, an AMD GPU, a CPU
    ],
)
def test_the_kernel_follows_from_device_dtype_and_shape(capability, dtype, tokens, channels, kernel):
    chosen = choose(capability=capability, dtype=dtype, queries=tokens, keys=tokens, channels=channels)
    assert chosen is kernel


@pytest.mark.parametrize(("channels", "more"), [(40, 0), (41, 7), (7, 1), (64, 0)])
def test_heads_are_padded_to_a_multiple_of_eight(channels, more):
    assert padding(channels) == more


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("channels", [5, 16, 42])
def test_padded_heads_give_the_same_attention(monkeypatch, channels, causal):
    rng = np.random.default_rng(channels)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 19, 3, channels)), jnp.float32) for _ in range(3))
    seen_by_kernel = []
    plain = jax.nn.dot_product_attention

    def without_cudnn(q, k, v, *, implementation, **rest):
        seen_by_kernel.append((implementation, q.shape[-1]))
        return plain(q, k, v, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    out = run(Kernel.CUDNN, query, key, value, causal=causal)
    assert seen_by_kernel == [("cudnn", channels + padding(channels))]
    np.testing.assert_allclose(out, attention(query, key, value, causal=causal), atol=2e-6)


def test_the_default_device_here_has_no_compute_capability():
    assert jax.default_backend() == "cpu"
    assert flash._capability() is None


@pytest.mark.parametrize("causal", [False, True])
def test_accelerators_attend_as_a_cpu_does(monkeypatch, causal):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, 33, 2, 12)), jnp.bfloat16) for _ in range(3)]
    expected = attention(*arrays, causal=causal)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(
        attention(*arrays, causal=causal).astype(jnp.float32), expected.astype(jnp.float32), atol=0.03
    )
