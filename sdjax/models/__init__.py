"""The networks of a Stable Diffusion checkpoint, as Flax modules whose attribute paths are the checkpoint's names."""

from sdjax.models.clip import CLIPText, CLIPTextConfig, TextEncoding
from sdjax.models.definition import Architecture, Definition, Params, bind, define, initialise
from sdjax.models.families import FAMILIES, family_of
from sdjax.models.family import Conditions, Family, Text, TextPart
from sdjax.models.quantised import Quantised, is_quantised, quantise
from sdjax.models.unet import SD, SDXL, AddedConditioning, ControlNet, ControlNetConfig, UNet, UNetConfig
from sdjax.models.vae import VAE, Moments, VAEConfig

__all__ = [
    "FAMILIES",
    "SD",
    "SDXL",
    "VAE",
    "AddedConditioning",
    "Architecture",
    "CLIPText",
    "CLIPTextConfig",
    "Conditions",
    "ControlNet",
    "ControlNetConfig",
    "Definition",
    "Family",
    "Moments",
    "Params",
    "Quantised",
    "Text",
    "TextEncoding",
    "TextPart",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "bind",
    "define",
    "family_of",
    "initialise",
    "is_quantised",
    "quantise",
]
