"""Random parameters of tiny models, without files: what a LoRA can be read for and applied to."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from sdjax.models import CLIPText, CLIPTextConfig, UNet, UNetConfig, define
from tests.parity.reference import UNET, XL_UNET

TEXT = CLIPTextConfig(
    vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=None
)
PROJECTED_TEXT = CLIPTextConfig(
    vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=24
)


def tiny_params(name: str, dtype="float32"):
    """Parameters of "sd" (one text encoder) or "xl" (two), every leaf random."""
    rng = np.random.default_rng(0)

    def random(model, config):
        _, shapes = define(model, config, dtype=dtype, param_dtype=dtype)
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)

    parts = {"unet": random(UNet, UNetConfig.from_dict(XL_UNET if name == "xl" else UNET))}
    parts["text_encoder"] = random(CLIPText, TEXT)
    if name == "xl":
        parts["text_encoder_2"] = random(CLIPText, PROJECTED_TEXT)
    return FrozenDict(parts)
