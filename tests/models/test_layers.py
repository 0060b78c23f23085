"""Group normalisation against PyTorch, in the shapes where summing matters."""

import numpy as np
import pytest
import torch

from sdjax.devices.target import CPU
from sdjax.models.kernels import forms_for
from sdjax.models.layers import GroupNorm


def constant(shape, mean, _):
    return np.full(shape, mean)


@pytest.mark.parametrize("shape", [(2, 3, 5, 12), (2, 64, 64, 12), (1, 65, 64, 12), (1, 256, 256, 8), (2, 1, 1, 8)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_group_norm_agrees_with_pytorch_far_from_zero_too(shape, offset):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + np.float32(offset)
    norm = GroupNorm(4, shape[-1], epsilon=1e-5, dtype="float32", forms=forms_for(CPU), make=constant)
    truth = torch.nn.functional.group_norm(torch.from_numpy(x.transpose(0, 3, 1, 2)).double(), 4, eps=1e-5)
    np.testing.assert_allclose(norm(x), truth.numpy().transpose(0, 2, 3, 1), atol=1e-4, rtol=0)
