"""The sizes that are read from a full-size file are the published ones; shapes alone are made, no numbers."""

from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from originals import open_clip_shapes, unet_name, vae_name

from sdjax.loading.original_text import open_clip_tensors, text_config
from sdjax.loading.original_unet import unet_config, unet_tensors
from sdjax.loading.original_vae import vae_config, vae_tensors
from sdjax.loading.weights import Tensor
from sdjax.models import CLIPTextConfig, UNetConfig, VAEConfig

# As published: runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1, -xl-base-1.0, -xl-refiner-1.0
SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD2 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "sample_size": 96,
    "use_linear_projection": True,
}
XL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **XL,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}


def shapes(named):
    return {name: Tensor(Path("full.safetensors"), name, tuple(tensor.shape), "F16") for name, tensor in named.items()}


@pytest.mark.parametrize(
    ("published", "sd1", "time_ids", "pooled"),
    [
        (SD1, True, 0, 0),
        ({**SD1, "in_channels": 9}, True, 0, 0),
        (SD2, False, 0, 0),
        (XL, False, 6, 1280),
        (REFINER, False, 5, 1280),
    ],
    ids=["sd1", "sd1-inpaint", "sd2", "sdxl", "refiner"],
)
def test_unet_sizes_are_the_published_ones(published, sd1, time_ids, pooled):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**published)
    tensors = shapes({unet_name(name, unet): tensor for name, tensor in unet.state_dict().items()})
    inferred = unet_config(
        tensors,
        heads_of_sd1=sd1,
        sample_size=published["sample_size"],
        time_ids=time_ids,
        pooled=pooled,
        where="full.safetensors",
    )
    found, expected = UNetConfig.from_dict(inferred), UNetConfig.from_dict(dict(unet.config))
    # A level without a transformer has no depth: whatever a config says of it is never read.
    used = [*found.down_attention[:-1], True]
    assert [depth for depth, uses in zip(found.transformer_layers, used, strict=True) if uses] == [
        depth for depth, uses in zip(expected.transformer_layers, used, strict=True) if uses
    ]
    for field in found.__dataclass_fields__:
        if field != "transformer_layers":
            assert getattr(found, field) == getattr(expected, field), field
    assert {name: tensor.shape for name, tensor in unet_tensors(tensors, where="full.safetensors").items()} == {
        name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()
    }


def test_autoencoder_sizes_are_the_published_ones():
    published = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    }
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**published)
    tensors = shapes({vae_name(name): tensor for name, tensor in vae.state_dict().items()})
    inferred = vae_config(tensors, scaling_factor=0.18215, sample_size=512, where="full.safetensors")
    assert VAEConfig.from_dict(inferred) == VAEConfig.from_dict(dict(vae.config))
    assert vae_tensors(tensors, where="full.safetensors").keys() == vae.state_dict().keys()


@pytest.mark.parametrize(
    ("width", "in_file", "whole", "layers", "projection"),
    [(1024, 24, False, 23, None), (1280, 32, True, 32, 1280)],
    ids=["sd2", "sdxl"],
)
def test_open_clip_sizes_are_the_published_ones(width, in_file, whole, layers, projection):
    published = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act="gelu",
        projection_dim=projection or 512,
        eos_token_id=49407,
        architectures=["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
    )
    named = open_clip_tensors(shapes(open_clip_shapes(width, in_file)), whole=whole, where="full.safetensors")
    inferred = text_config(named, hidden_act="gelu", start=49406, end=49407, pad=0, where="full.safetensors")
    assert CLIPTextConfig.from_dict(inferred) == CLIPTextConfig.from_dict(published.to_dict())
