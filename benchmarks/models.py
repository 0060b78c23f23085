"""The published sizes of the models that are timed, as their config.json files have them (facts, no weights)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parent.parent / "sdjax" / "bundled"


@dataclass(frozen=True)
class Model:
    """What a benchmark needs to know of a checkpoint.

    Attributes:
        size: pixels along one side of a picture.
        steps: of the sampler, for a whole picture.
        guided: whether every step calls the UNet with and without the prompt.
        unet, vae, text_encoders: config.json contents.
    """

    size: int
    steps: int
    guided: bool
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: Mapping[str, Mapping[str, Any]]

    @property
    def latent_size(self) -> int:
        """Latents along one side."""
        return self.size >> (len(self.vae["block_out_channels"]) - 1)

    @property
    def tokens(self) -> int:
        """Tokens that the text encoders read."""
        length: int = next(iter(self.text_encoders.values()))["max_position_embeddings"]
        return length

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch that one picture takes."""
        return 2 if self.guided else 1


def text_encoder(width: int, layers: int, heads: int, activation: str, projection: int) -> dict[str, Any]:
    """A CLIP text encoder's config."""
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "projection_dim": projection,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }


CLIP_L = text_encoder(768, 12, 12, "quick_gelu", 768)
OPENCLIP_H = text_encoder(1024, 23, 16, "gelu", 512)
OPENCLIP_G = text_encoder(1280, 32, 20, "gelu", 1280)

UNET_1 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
}
UNET_2 = {
    **UNET_1,
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
UNET_XL = {
    **UNET_1,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}
XL_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_G}


def _bundled() -> Model:
    def config(part: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((BUNDLED / part / "config.json").read_text(encoding="utf-8"))
        return read

    return Model(64, 20, True, config("unet"), config("vae"), {"text_encoder": config("text_encoder")})


MODELS: Mapping[str, Model] = {
    "bundled": _bundled(),
    "sd-v1-5": Model(512, 20, True, UNET_1, VAE, {"text_encoder": CLIP_L}),
    "sd-v2-1": Model(768, 20, True, UNET_2, VAE, {"text_encoder": OPENCLIP_H}),
    "sd-xl": Model(1024, 20, True, UNET_XL, VAE_XL, XL_ENCODERS),
    "sdxl-turbo": Model(512, 4, False, UNET_XL, VAE_XL, XL_ENCODERS),
}
