"""Tiny models and files that stand in for published ones, under their names.

They have the layouts of published checkpoints and random weights: what is drawn from them is noise, but every option
and every size works.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from sdjax.loading.weights import tensor_name
from sdjax.models import VAE, ControlNet, ControlNetConfig, UNet, UNetConfig, VAEConfig, define
from sdjax.pipeline import BUNDLED_FOLDER
from sdjax.variants import BUNDLED, VARIANTS

PUBLISHED = ("stabilityai/stable-diffusion-xl-refiner-1.0",)
"""Repositories that pages name beside those of `sdjax models`."""
COMMIT = "0" * 40
STEM = "diffusion_pytorch_model"
BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")


def fill_hub_cache(folder: Path) -> None:
    """Fill a cache of the hub (`HF_HOME`) with a stand-in for every repository that pages name."""
    model = folder / "model"
    _write_model(model)
    ids = [row.source for name, row in VARIANTS.items() if name != BUNDLED]
    for repository in (*ids, *PUBLISHED):
        place = folder / "hub" / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        (place / "snapshots").mkdir()
        (place / "snapshots" / COMMIT).symlink_to(model)


def write_controlnet(folder: Path) -> None:
    """A ControlNet for the stand-ins."""
    config = {**_unet_config(), "conditioning_embedding_out_channels": [8, 16, 16, 32]}
    for name in ("out_channels", "up_block_types", "sample_size"):
        del config[name]
    config["_class_name"] = "ControlNetModel"
    _write(folder, ControlNet, ControlNetConfig.from_dict(config), config)


def write_embedding(file: Path) -> None:
    """A learned word of two vectors for the stand-ins, in the layout of diffusers."""
    width = _text_config()["hidden_size"]
    save_file({f"<{file.stem}>": np.random.default_rng(0).normal(size=(2, width)).astype(np.float32)}, file)


FILES = {"controlnet-canny": write_controlnet, "toy.safetensors": write_embedding}
"""What a block may ask for by its name."""


def _text_config():
    return json.loads((BUNDLED_FOLDER / "text_encoder" / "config.json").read_text())


def _unet_config():
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 4,
        "block_out_channels": [16, 32],
        "cross_attention_dim": _text_config()["hidden_size"],
        "down_block_types": list(BLOCKS),
        "in_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 4,
        "sample_size": 8,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(BLOCKS)],
    }


def _vae_config():
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [8, 8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 64,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def _write_model(folder: Path) -> None:
    for part in ("text_encoder", "tokenizer", "scheduler", "model_index.json"):
        source = BUNDLED_FOLDER / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
    _write(folder / "unet", UNet, UNetConfig.from_dict(_unet_config()), _unet_config())
    _write(folder / "vae", VAE, VAEConfig.from_dict(_vae_config()), _vae_config())


def _write(folder: Path, model, config, written) -> None:
    _, shapes = define(model, config, dtype="float32", param_dtype="float32")
    rng = np.random.default_rng(0)
    tensors = {tensor_name(path): _drawn(rng, path, leaf.shape) for path, leaf in flatten_dict(shapes).items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / f"{STEM}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(written))


def _drawn(rng: np.random.Generator, path: tuple, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that keep a layer's outputs about as large as its inputs."""
    if len(shape) > 1:
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return np.full(shape, path[-1] == "weight", np.float32)
