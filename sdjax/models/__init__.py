"""The networks of a Stable Diffusion checkpoint, as Flax modules whose attribute paths are the checkpoint's names."""

from sdjax.models.clip import CLIPText, CLIPTextConfig, TextEncoding
from sdjax.models.controlnet import ControlNet, ControlNetConfig
from sdjax.models.definition import Definition, Params, bind, define, initialise
from sdjax.models.layers import timestep_embedding
from sdjax.models.unet import AddedConditioning, UNet, UNetConfig
from sdjax.models.vae import VAE, Moments, VAEConfig

__all__ = [
    "VAE",
    "AddedConditioning",
    "CLIPText",
    "CLIPTextConfig",
    "ControlNet",
    "ControlNetConfig",
    "Definition",
    "Moments",
    "Params",
    "TextEncoding",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "bind",
    "define",
    "initialise",
    "timestep_embedding",
]
