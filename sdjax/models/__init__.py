"""The networks of a Stable Diffusion checkpoint, as Flax modules whose attribute paths are the checkpoint's names."""

from sdjax.models.clip import CLIPText, CLIPTextConfig, TextEncoding
from sdjax.models.definition import Definition, Params, bind, define, initialise
from sdjax.models.unet import AddedConditioning, UNet, UNetConfig
from sdjax.models.vae import VAE, Moments, VAEConfig

__all__ = [
    "VAE",
    "AddedConditioning",
    "CLIPText",
    "CLIPTextConfig",
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
]
