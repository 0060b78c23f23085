"""The networks of a Stable Diffusion checkpoint, as Flax modules whose attribute paths are the checkpoint's names."""

from sdjax.models.clip import CLIPText, CLIPTextConfig, TextEncoding
from sdjax.models.controlnet import ControlNet, ControlNetConfig
from sdjax.models.definition import Architecture, Definition, Params, bind, define, initialise
from sdjax.models.layers import timestep_embedding
from sdjax.models.quantised import Quantised, is_quantised, quantise
from sdjax.models.unet import AddedConditioning, UNet, UNetConfig
from sdjax.models.vae import VAE, Moments, VAEConfig

__all__ = [
    "VAE",
    "AddedConditioning",
    "Architecture",
    "CLIPText",
    "CLIPTextConfig",
    "ControlNet",
    "ControlNetConfig",
    "Definition",
    "Moments",
    "Params",
    "Quantised",
    "TextEncoding",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "bind",
    "define",
    "initialise",
    "is_quantised",
    "quantise",
    "timestep_embedding",
]
