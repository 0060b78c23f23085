"""Stage 5: the trained parts, put together as a folder in diffusers layout with float16 weights.

python -m training.export --folder sdjax/bundled

With a card of its defaults and of the words that its captions are made of.
"""

import argparse
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from sdjax.loading.card import Card, write_card
from sdjax.loading.folder import STEMS
from sdjax.loading.saving import tensors_of
from training import autoencoder, diffusion, latents, text, tokenizer
from training.captions import COLOR_WORDS, KIND_WORDS, vocabulary

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


CARD = Card(description="coloured shapes, one to three in a picture", steps=20, guidance_scale=3.0)


def card() -> Card:
    """The defaults, and the vocabulary with the words first that tell most."""
    telling = [word for table in (KIND_WORDS, COLOR_WORDS) for words in table.values() for word in words]
    others = [word for word in vocabulary() if word not in {*telling, ",", "."}]
    return replace(CARD, vocabulary=(*telling, *others))


def vae_config() -> dict[str, object]:
    """The autoencoder's config.json."""
    sizes = dataclasses.asdict(autoencoder.CONFIG)
    blocks = len(autoencoder.CONFIG.block_out_channels)
    return sizes | {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }


def text_config() -> dict[str, object]:
    """The text encoder's config.json."""
    sizes = {key: value for key, value in dataclasses.asdict(text.CONFIG).items() if key != "projection_dim"}
    end = text.CONFIG.eos_token_id
    return sizes | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": end - 1,
        "pad_token_id": end,
    }


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description="Write the bundled model.")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--folder", type=Path, default=Path("sdjax/bundled"))
    args = parser.parse_args()
    parts = {
        "unet": (diffusion.UNET, diffusion.load(args.runs / "diffusion")),
        "vae": (vae_config(), latents.load_autoencoder(args.runs / "autoencoder", args.runs / "latents")),
        "text_encoder": (text_config(), text.load(args.runs / "text")),
    }
    for name, (config, params) in parts.items():
        folder = args.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        halves = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
        save_file(tensors_of(halves), folder / f"{STEMS[name]}.safetensors", {"format": "pt"})
    tokenizer.write(args.folder / "tokenizer")
    (args.folder / "scheduler").mkdir(exist_ok=True)
    (args.folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(diffusion.SCHEDULER, indent=2) + "\n")
    write_card(card(), args.folder)
    (args.folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")


if __name__ == "__main__":
    main()
