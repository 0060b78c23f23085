"""Tiny random checkpoints of every architecture, made and saved by diffusers, and loaded by both sides."""

import json
import string
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

torch.set_num_threads(1)

START, END = "<|startoftext|>", "<|endoftext|>"
SDXL_IDS = 6
TEXT_WIDTH = 32

UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
}
SD2_UNET = {**UNET, "use_linear_projection": True, "attention_head_dim": (2, 4)}
XL_UNET = {
    **SD2_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + SDXL_IDS * 8,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
V_PREDICTION = {**DDIM, "prediction_type": "v_prediction"}
TURBO = {**BETAS, "timestep_spacing": "trailing"}

ARCHITECTURES = {
    "sd-v1-5": (UNET, DDIM, "quick_gelu"),
    "sd-v2-1": (SD2_UNET, V_PREDICTION, "gelu"),
    "sd-xl": (XL_UNET, DDIM, "quick_gelu"),
    "sdxl-turbo": (XL_UNET, TURBO, "quick_gelu"),
    "sd-v1-5-inpaint": ({**UNET, "in_channels": 9}, DDIM, "quick_gelu"),
    "sd-v2-inpaint": ({**SD2_UNET, "in_channels": 9}, DDIM, "gelu"),
    "sd-xl-inpaint": ({**XL_UNET, "in_channels": 9}, DDIM, "quick_gelu"),
}
TEXT_TO_IMAGE = ("sd-v1-5", "sd-v2-1", "sd-xl", "sdxl-turbo")


def tokenizer(folder: Path, pad: str) -> transformers.CLIPTokenizer:
    """A tokenizer of single characters and a few words, 77 tokens long."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.printable.strip(), "Ġ"]
    merges = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges))
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token=pad,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        model_max_length=77,
    )


def text_encoder(kind: type, size: int, activation: str) -> torch.nn.Module:
    """A random text encoder; its weights are larger than at initialisation, so that the words matter."""
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=24,
        hidden_act=activation,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def pipeline(name: str, folder: Path) -> diffusers.DiffusionPipeline:
    """Make the checkpoint of an architecture, save it under `folder`, and give diffusers' own pipeline for it."""
    unet_config, scheduler_config, activation = ARCHITECTURES[name]
    torch.manual_seed(0)
    parts = {
        "unet": diffusers.UNet2DConditionModel(**unet_config).eval(),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=8,
            scaling_factor=0.13025 if "xl" in name else 0.18215,
            force_upcast="xl" in name,
        ).eval(),
        "scheduler": (
            diffusers.EulerAncestralDiscreteScheduler(**scheduler_config)
            if "turbo" in name
            else diffusers.DDIMScheduler(**scheduler_config)
        ),
    }
    words = tokenizer(folder / "words", END)
    parts |= {"tokenizer": words, "text_encoder": text_encoder(transformers.CLIPTextModel, len(words), activation)}
    if "xl" in name:
        second = text_encoder(transformers.CLIPTextModelWithProjection, len(words), "gelu")
        parts |= {"tokenizer_2": tokenizer(folder / "words_2", "!"), "text_encoder_2": second}
        made = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        made = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.save_pretrained(folder / "model")
    made.set_progress_bar_config(disable=True)
    return made


def channels_last(x: torch.Tensor) -> np.ndarray:
    """(batch, channels, height, width) to (batch, height, width, channels)."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def channels_first(x: np.ndarray) -> torch.Tensor:
    """The inverse of `channels_last`."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))
