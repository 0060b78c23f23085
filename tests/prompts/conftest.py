"""Tiny random checkpoints with deep text encoders, in diffusers and in sdjax."""

from pathlib import Path
from typing import NamedTuple

import diffusers
import pytest
import torch
import transformers

import sdjax
from tests.parity.reference import DDIM, END, TEXT_WIDTH, UNET, XL_UNET, tokenizer

LAYERS = 5


class Both(NamedTuple):
    """One checkpoint, loaded by both sides."""

    reference: diffusers.DiffusionPipeline
    pipe: sdjax.Pipeline


def text_encoder(kind: type, words: int, activation: str, **settings) -> torch.nn.Module:
    """A random text encoder whose layers, norms and biases all matter."""
    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        projection_dim=24,
        hidden_act=activation,
        **{"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1, **settings},
    )
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter) + 0.1)
    if not hasattr(model, "text_model"):
        # transformers 5 flattened it, and diffusers 0.42 still asks for its final norm by the old name.
        object.__setattr__(model, "text_model", model)
    return model.eval()


def make(folder: Path, *, is_xl: bool, eos_token_id: int | None = None) -> Both:
    torch.manual_seed(0)
    settings = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
    words = tokenizer(folder / "words", END)
    parts = {
        "unet": diffusers.UNet2DConditionModel(**(XL_UNET if is_xl else UNET)).eval(),
        "vae": diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=8).eval(),
        "scheduler": diffusers.DDIMScheduler(**DDIM),
        "tokenizer": words,
        "text_encoder": text_encoder(transformers.CLIPTextModel, len(words), "quick_gelu", **settings),
    }
    if is_xl:
        parts |= {
            "tokenizer_2": tokenizer(folder / "words_2", "!"),
            "text_encoder_2": text_encoder(transformers.CLIPTextModelWithProjection, len(words), "gelu", **settings),
        }
        reference = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        reference = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    reference.save_pretrained(folder / "model")
    return Both(reference, sdjax.Pipeline.from_pretrained(folder / "model"))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sd1"), is_xl=False)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sdxl"), is_xl=True)


@pytest.fixture(scope="session")
def tiny():
    return sdjax.Pipeline.from_pretrained()
