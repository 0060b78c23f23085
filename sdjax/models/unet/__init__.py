"""UNets with cross-attention, their ControlNets, and the families that have them."""

from sdjax.models.unet.config import UNetConfig
from sdjax.models.unet.controlnet import ControlNet, ControlNetConfig
from sdjax.models.unet.families import SD, SDXL
from sdjax.models.unet.unet import AddedConditioning, UNet

__all__ = ["SD", "SDXL", "AddedConditioning", "ControlNet", "ControlNetConfig", "UNet", "UNetConfig"]
